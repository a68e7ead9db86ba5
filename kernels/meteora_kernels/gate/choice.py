"""What a pass says about the choice of experts, token by token: all that the gate needs beside the logits.

Shapes: T tokens, N linears that share one input, E experts the gates know, G slots they may stand in, K slots a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

NO_EXPERT = -1
"""An empty slot."""


@dataclass(frozen=True, slots=True)
class GateChoice:
    """How every token of a pass gets its experts. None stands for the plain case of each field.

    Attributes:
        slots: K.
        gated: Whether the gates decide for any token; otherwise there are no logits.
        auto_T: True where the gates decide, bool. None: for all, if ``gated``.
        top_k_T: Experts the gates may pick for a token, 1 to K, int64. None: K.
        temperature_T1: Divides the chosen logits, fp32. None: 1.
        ids_TK: Experts of tokens the gates do not decide for, int64, ``NO_EXPERT`` where empty. None: there are none.
        weights_TK: Their weights, fp32.
        prototype_E: True for experts whose logit counts by its size, |g . x|, bool. None: none.
        absent_N1: True for linears that use no expert at all, bool. None: none.
        slot_E: The number an expert goes by outside the gates, int64. None: its own.
        local_G: Where this process holds it, int64, ``NO_EXPERT`` for elsewhere. None: under that number.
    """

    slots: int
    gated: bool = True
    auto_T: Tensor | None = None
    top_k_T: Tensor | None = None
    temperature_T1: Tensor | None = None
    ids_TK: Tensor | None = None
    weights_TK: Tensor | None = None
    prototype_E: Tensor | None = None
    absent_N1: Tensor | None = None
    slot_E: Tensor | None = None
    local_G: Tensor | None = None

    def part(self, first: int, size: int) -> GateChoice:
        """Of ``size`` tokens from ``first`` on."""
        fields = ("auto_T", "top_k_T", "temperature_T1", "ids_TK", "weights_TK")
        rows = {field: tensor[first : first + size] for field in fields if (tensor := getattr(self, field)) is not None}
        return replace(self, **rows)


@dataclass(frozen=True, slots=True)
class Chosen:
    """The experts of a pass.

    Attributes:
        slots_TNK: By ``GateChoice.slot_E``, int64, ``NO_EXPERT`` where empty.
        local_TNK: By ``GateChoice.local_G``, int64.
        weights_TNK: fp32, 0 where empty.
    """

    slots_TNK: Tensor
    local_TNK: Tensor
    weights_TNK: Tensor

    @classmethod
    def unset(cls, tokens: int, linears: int, slots: int, device: torch.device) -> Chosen:
        """Uninitialised."""
        slots_TNK, local_TNK = (torch.empty(tokens, linears, slots, dtype=torch.long, device=device) for _ in range(2))
        return cls(slots_TNK, local_TNK, torch.empty(tokens, linears, slots, dtype=torch.float32, device=device))

    @classmethod
    def join(cls, parts: Sequence[Chosen]) -> Chosen:
        """The experts of parts of a pass, one after the other."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in cls.__slots__))
