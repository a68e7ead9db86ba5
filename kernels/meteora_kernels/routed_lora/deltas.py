"""Deltas of linears as kernels write them: one [T, O_n] after the other in one row of memory, some tokens at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Deltas:
    """The memory, and which tokens come next.

    Attributes:
        row: T * (O_1 + ... + O_N) numbers.
        tokens: T.
        first: Where the tokens of the next launch begin.
    """

    row: Tensor
    tokens: int
    first: int = 0

    @classmethod
    def like(cls, x_TH: Tensor, widths: Sequence[int]) -> Deltas:
        """Uninitialised, in the type of x and for its tokens."""
        row = torch.empty(x_TH.shape[0] * sum(widths), dtype=x_TH.dtype, device=x_TH.device)
        return cls(row, x_TH.shape[0])

    def at(self, first: int) -> Deltas:
        """The same memory, for tokens from ``first`` on."""
        return replace(self, first=first)

    def by_linear(self, widths: Sequence[int]) -> tuple[Tensor, ...]:
        """The N deltas, each [T, O_n] and contiguous."""
        parts = self.row.split([self.tokens * width for width in widths])
        return tuple(part.view(self.tokens, width) for part, width in zip(parts, widths, strict=True))
