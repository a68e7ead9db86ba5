"""Which experts act on which token: the choice a request makes, and the routing of one forward pass.

Several bank generations may be live at once. Expert ids and shares count in the order of the request's own
generation; only what ``meteora_dist.moe.gate.route`` returns counts in the slots of the roster.

Shapes: T tokens of the pass, K expert slots a token, E experts of a generation, L decoder layers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from meteora_dist.moe.layer_shares import LayerShares
from meteora_dist.moe.roster import Roster

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
class LiveGeneration:
    """What routing must know of a bank generation that requests use.

    Attributes:
        num_experts: E.
        linears_L: Linears of each layer that at least one of them adapts.
        index: Its place among the live generations, and so among the gates of every routed group.
        slot_E: The roster's slot of every expert; None where expert e is in slot e.
        prototype_E: True for experts whose gate rows are prototypes: their logit is |g . x|. None when none are.
    """

    num_experts: int
    linears_L: tuple[int, ...]
    index: int = 0
    slot_E: Tensor | None = None
    prototype_E: Tensor | None = None

    @property
    def num_linears(self) -> int:
        """Linears that at least one of its experts adapts."""
        return sum(self.linears_L)


def live_generations(
    roster: Roster, prototypes: Mapping[int, Sequence[bool]], linears: Mapping[int, tuple[int, ...]]
) -> dict[int, LiveGeneration]:
    """What routing must know of the live generations, by number; their gates stand in the same order.

    Args:
        roster: The live generations.
        prototypes: For each of them, whether each expert's gate rows are prototypes.
        linears: For each of them, how many linears of each layer at least one expert adapts.
    """
    return {
        number: LiveGeneration(
            num_experts=len(slots),
            linears_L=linears[number],
            index=index,
            slot_E=None if slots == tuple(range(len(slots))) else torch.tensor(slots),
            prototype_E=torch.tensor(prototypes[number]) if any(prototypes[number]) else None,
        )
        for index, (number, slots) in enumerate(roster.generations.items())
    }


@dataclass(frozen=True, slots=True)
class StepRouting:
    """The routing of one forward pass over requests of one generation, for its packed tokens.

    Attributes:
        auto_T: True where the gates decide. None when they decide for all tokens.
        gated: Whether the gates decide for any token.
        top_k_T: Experts the gates may pick, at most K. None when K for all.
        temperature_T1: Divides the chosen logits. None when 1 for all.
        ids_TK: Experts of the tokens the gates do not decide for, ``NO_EXPERT`` where unused.
        weights_TK: Their weights, 0 where unused, fp32.
        shares_TE: Sum of gate weights over routed linears, filled by the pass; None when nobody asked.
        index: Of the generation, see ``LiveGeneration``.
        slot_E: Of the generation, see ``LiveGeneration``.
        prototype_E: Of the generation, see ``LiveGeneration``.
        layers: The shares layer by layer, filled by the pass; None when nobody asked. Goes with ``shares_TE``.
    """

    auto_T: Tensor | None
    gated: bool
    top_k_T: Tensor | None
    temperature_T1: Tensor | None
    ids_TK: Tensor
    weights_TK: Tensor
    shares_TE: Tensor | None = None
    index: int = 0
    slot_E: Tensor | None = None
    prototype_E: Tensor | None = None
    layers: LayerShares | None = None

    @property
    def slots(self) -> int:
        """K of this pass."""
        return self.ids_TK.shape[1]

    def shares_of(self, token: int, count: int = 1) -> Tensor | None:
        """Shares of ``count`` tokens of the pass from ``token`` on, added up, [E]; None when nobody asked."""
        if not 0 <= token <= token + count <= len(self.ids_TK):
            raise IndexError(f"the pass has {len(self.ids_TK)} tokens, and none at {token} to {token + count - 1}")
        return None if self.shares_TE is None else self.shares_TE[token : token + count].sum(0)

    def layer_shares_of(self, token: int) -> Tensor:
        """The shares of a token in each layer, [L, E]; raises IndexError when nobody asked for them."""
        if self.layers is None:
            raise IndexError("shares by layer were not asked for")
        return self.layers.at(token)


@dataclass(frozen=True, slots=True)
class MixedRouting:
    """The routing of one forward pass over requests of several generations.

    Attributes:
        parts: For every generation its tokens, as rising positions in the pass, and their routing.
    """

    parts: tuple[tuple[Tensor, StepRouting], ...]

    @property
    def slots(self) -> int:
        """K of this pass."""
        return self.parts[0][1].slots

    def shares_of(self, token: int, count: int = 1) -> Tensor | None:
        """As in ``StepRouting``, for tokens of one request, [E of its generation]."""
        part, place = self._part_of(token)
        return part.shares_of(place, count)

    def layer_shares_of(self, token: int) -> Tensor:
        """As in ``StepRouting``, [L, E of the generation]."""
        part, place = self._part_of(token)
        return part.layer_shares_of(place)

    def _part_of(self, token: int) -> tuple[StepRouting, int]:
        """The routing of a token's generation, and its place there."""
        for rows_T, part in self.parts:
            place = int(torch.searchsorted(rows_T, token))
            if place < len(rows_T) and rows_T[place] == token:
                return part, place
        raise IndexError(f"the pass has no token {token}")


PassRouting = StepRouting | MixedRouting


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


def slots_of_pass(
    choices: Sequence[RoutingChoice], generations: Sequence[int], live: Mapping[int, LiveGeneration]
) -> int:
    """As ``slots_of``, for requests of several generations."""
    pairs = zip(choices, generations, strict=True)
    return max((slots_of([choice], live[generation].num_experts) for choice, generation in pairs), default=0)


def plan_pass(
    choices: Sequence[RoutingChoice],
    lengths: Sequence[int],
    generations: Sequence[int],
    live: Mapping[int, LiveGeneration],
    slots: int,
    trace: bool = False,
    layered: Collection[int] = (),
) -> PassRouting:
    """As ``plan_step``, for requests of several generations.

    Args:
        choices: Each request's choice.
        lengths: Each request's tokens in this pass.
        generations: Each request's bank generation.
        live: The live generations by number.
        slots: K, at least ``slots_of_pass(choices, generations, live)``; all ranks of a pass share it.
        trace: Whether to record shares.
        layered: Places of the requests for whose last token they are recorded layer by layer as well; with ``trace``.
    """

    def plan(requests: Sequence[int], generation: int) -> StepRouting:
        chosen, counts = [choices[r] for r in requests], [lengths[r] for r in requests]
        bank = live[generation]
        step = plan_step(chosen, counts, bank.num_experts, slots, trace)
        slot_E, prototype_E = (
            None if table is None else table.to(step.ids_TK.device) for table in (bank.slot_E, bank.prototype_E)
        )
        lasts = [end - 1 for r, end in zip(requests, accumulate(counts), strict=True) if r in layered]
        layers = LayerShares.empty(lasts, len(bank.linears_L), bank.num_experts) if lasts else None
        return replace(step, index=bank.index, slot_E=slot_E, prototype_E=prototype_E, layers=layers)

    used = sorted(set(generations))
    if len(used) == 1:
        return plan(range(len(choices)), used[0])
    owner_T = torch.tensor(generations).repeat_interleave(torch.tensor(lengths))
    parts = []
    for generation in used:
        requests = [r for r, other in enumerate(generations) if other == generation]
        parts.append(((owner_T == generation).nonzero()[:, 0], plan(requests, generation)))
    return MixedRouting(tuple(parts))
