"""The LoRA pairs of many experts for linears that share one input, packed for matrix products.

Shapes: H input width, O_n output width of linear n, N linears, E experts, C_n = sum over e of r_ne (the columns of
linear n), C = sum over n of C_n. A missing pair has rank 0 and takes no column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor, float]
"""a_RH, b_OR and the scale s of one expert: delta = s (x a^T) b^T."""


@dataclass(frozen=True, slots=True)
class LoraStack:
    """Experts of N linears that share one input.

    Attributes:
        a_CH: All A matrices, ordered by linear, then by expert, then by rank.
        b_CO: For each linear, its experts' transposed B matrices, [C_n, O_n].
        scales_NE: s of every pair; 0 where the expert lacks the linear.
        pair_of_C: For every column of ``a_CH``, n * E + e of the pair it belongs to.
        offsets: ``offsets[n][e]`` is the first column of pair (n, e) among the columns of linear n; E + 1 entries.
    """

    a_CH: Tensor
    b_CO: tuple[Tensor, ...]
    scales_NE: Tensor
    pair_of_C: Tensor
    offsets: tuple[tuple[int, ...], ...]

    @property
    def num_linears(self) -> int:
        """N."""
        return len(self.b_CO)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.scales_NE.shape[1]

    @property
    def columns(self) -> tuple[int, ...]:
        """C_n of every linear."""
        return tuple(offsets[-1] for offsets in self.offsets)

    def pair(self, linear: int, expert: int) -> tuple[Tensor, Tensor]:
        """Views a_RH and b_RO of one expert in one linear; R is 0 where it lacks the linear."""
        first, last = self.offsets[linear][expert : expert + 2]
        start = sum(self.columns[:linear])
        return self.a_CH[start + first : start + last], self.b_CO[linear][first:last]


def pack(
    pairs: Sequence[Sequence[Pair | None]], in_features: int, out_features: Sequence[int], dtype: torch.dtype
) -> LoraStack:
    """Packs ``pairs[n][e]``; None where expert e lacks linear n.

    Args:
        pairs: N rows of E pairs.
        in_features: H.
        out_features: O_n of every linear.
        dtype: Of the packed matrices.
    """
    rows_a, stacks_b, scales, owners, offsets = [], [], [], [], []
    for n, (row, width) in enumerate(zip(pairs, out_features, strict=True)):
        marks, columns_b = [0], []
        for e, pair in enumerate(row):
            rank = 0 if pair is None else pair[0].shape[0]
            marks.append(marks[-1] + rank)
            owners += [n * len(row) + e] * rank
            if pair is not None:
                rows_a.append(pair[0].to(dtype))
                columns_b.append(pair[1].to(dtype).T)
        stacks_b.append(torch.cat([torch.empty(0, width, dtype=dtype), *columns_b]).contiguous())
        scales.append([0.0 if pair is None else pair[2] for pair in row])
        offsets.append(tuple(marks))
    return LoraStack(
        a_CH=torch.cat([torch.empty(0, in_features, dtype=dtype), *rows_a]).contiguous(),
        b_CO=tuple(stacks_b),
        scales_NE=torch.tensor(scales, dtype=torch.float32).reshape(len(pairs), -1),
        pair_of_C=torch.tensor(owners, dtype=torch.long),
        offsets=tuple(offsets),
    )
