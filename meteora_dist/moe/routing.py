"""Which experts act on which token: the choice a request makes, and the routing of one forward pass.

Shapes: T tokens of the pass, K expert slots a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

NO_EXPERT = -1
"""Fills the expert slots of a token that uses fewer than K experts."""

RoutingMode = Literal["auto", "fixed", "base"]


@dataclass(frozen=True, slots=True)
class RoutingChoice:
    """How one request is routed.

    Attributes:
        mode: ``auto`` lets the gates pick for every token; ``fixed`` applies ``experts`` to every token (one with
            weight 1 is the named mode, several are a blend); ``base`` applies none.
        top_k: Experts a token uses under ``auto``.
        temperature: Divides the chosen gate logits before the softmax under ``auto``.
        experts: (expert index, weight) pairs under ``fixed``.
    """

    mode: RoutingMode = "auto"
    top_k: int = 2
    temperature: float = 1.0
    experts: tuple[tuple[int, float], ...] = ()

    @property
    def slots(self) -> int:
        """Expert slots a token of this request fills."""
        return {"auto": self.top_k, "fixed": len(self.experts), "base": 0}[self.mode]


BASE = RoutingChoice(mode="base")


def named(expert: int) -> RoutingChoice:
    """The choice of one expert by index."""
    return RoutingChoice(mode="fixed", experts=((expert, 1.0),))


@dataclass(frozen=True, slots=True)
class StepRouting:
    """The routing of one forward pass, for its packed tokens.

    Attributes:
        auto_T: True where the gates decide. None when they decide for all tokens.
        gated: Whether the gates decide for any token.
        top_k_T: Experts the gates may pick, at most K. None when K for all.
        temperature_T1: Divides the chosen logits. None when 1 for all.
        ids_TK: Experts of the tokens the gates do not decide for, ``NO_EXPERT`` where unused.
        weights_TK: Their weights, 0 where unused, fp32.
        shares_TE: Sum of gate weights over routed linears, filled by the pass; None when nobody asked.
    """

    auto_T: Tensor | None
    gated: bool
    top_k_T: Tensor | None
    temperature_T1: Tensor | None
    ids_TK: Tensor
    weights_TK: Tensor
    shares_TE: Tensor | None = None

    @property
    def slots(self) -> int:
        """K of this pass."""
        return self.ids_TK.shape[1]


def slots_of(choices: Sequence[RoutingChoice], num_experts: int) -> int:
    """Expert slots a pass over these requests needs; 0 when none uses an expert."""
    return max((min(choice.slots, num_experts) for choice in choices), default=0)


def plan_step(
    choices: Sequence[RoutingChoice],
    lengths: Sequence[int],
    num_experts: int,
    slots: int,
    trace: bool = False,
) -> StepRouting:
    """The routing of a pass over requests packed one after another.

    Args:
        choices: Each request's choice.
        lengths: Each request's tokens in this pass.
        num_experts: E; ``top_k`` above it means all.
        slots: K, at least ``slots_of(choices, num_experts)``; all ranks of a pass share it.
        trace: Whether to record shares.
    """
    counts = torch.tensor(lengths)

    def spread(values: Sequence[object], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).repeat_interleave(counts, dim=0)

    autos = [choice.mode == "auto" for choice in choices]
    top_ks = [min(choice.top_k, num_experts) if auto else slots for choice, auto in zip(choices, autos, strict=True)]
    temperatures = [choice.temperature if auto else 1.0 for choice, auto in zip(choices, autos, strict=True)]
    empty = [(NO_EXPERT, 0.0)] * slots
    fixed = [([*choice.experts, *empty] if choice.mode == "fixed" else empty)[:slots] for choice in choices]
    ids_TK = spread([[expert for expert, _ in row] for row in fixed], torch.long)
    return StepRouting(
        auto_T=None if all(autos) else spread(autos, torch.bool),
        gated=any(autos),
        top_k_T=None if set(top_ks) <= {slots} else spread(top_ks, torch.long),
        temperature_T1=None if set(temperatures) <= {1.0} else spread(temperatures, torch.float32)[:, None],
        ids_TK=ids_TK,
        weights_TK=spread([[weight for _, weight in row] for row in fixed], torch.float32),
        shares_TE=torch.zeros(ids_TK.shape[0], num_experts) if trace else None,
    )
