"""Where kernels find the matrices of a stack: addresses and sizes of every pair, on its device.

The matrices stay the stack's, each where it is: a stack with other experts has other tables, and nothing is copied.

Shapes: N linears that share one input, E experts, R rank, J tiles of all outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from meteora_kernels.routed_lora.stack import LoraPart, LoraStack

TableOf = Callable[[Sequence[Sequence[int]], torch.dtype], Tensor]


@dataclass(frozen=True, slots=True)
class Matrices:
    """One matrix of every pair, A or transposed B: [rows, width], rows one after the other.

    Attributes:
        address_NE: Of its first number, int64; 0 for what is missing.
        rows_NE: Its rows held here, int32.
        first_NE: Number of the first of them among the pair's R, int32.
        offset_NE: Its place in one row of all matrices, as gradients stand, int64.
        width_N: int32.
        start_N: Features of linears before n, where each has its own input; 0 where they share one. int64.
        widths: As ``width_N``, on the host.
        rows: As ``rows_NE``, on the host.
    """

    address_NE: Tensor
    rows_NE: Tensor
    first_NE: Tensor
    offset_NE: Tensor
    width_N: Tensor
    start_N: Tensor
    widths: tuple[int, ...]
    rows: tuple[tuple[int, ...], ...]

    @property
    def numel(self) -> int:
        """Numbers in all matrices."""
        return sum(width * sum(rows) for width, rows in zip(self.widths, self.rows, strict=True))

    @property
    def most_rows(self) -> int:
        """Of any matrix."""
        return max((rows for row in self.rows for rows in row), default=0)

    def split(self, flat: Tensor) -> list[Tensor]:
        """Views of one row of all matrices, those that are missing left out: by linear, then by expert."""
        shapes = [(rows, width) for row, width in zip(self.rows, self.widths, strict=True) for rows in row if rows]
        return [part.view(shape) for part, shape in zip(flat.split([r * w for r, w in shapes]), shapes, strict=True)]


@dataclass(frozen=True, slots=True)
class Tables:
    """All of a stack that kernels read beside the matrices.

    Attributes:
        a: The A matrices; their linears share one input.
        b: The transposed B matrices.
        linear_J: For tiles of ``tile`` output features, over all linears one after the other: which linear, int32.
        first_J: The first feature of each tile, int32.
        tile: Output features of a tile.
        address_N: Of each linear's packed B, int64; nothing for a stack that is not packed.
        columns_N: Rows of it, int32.
        column_N: Rows of those before it, int32.
    """

    a: Matrices
    b: Matrices
    linear_J: Tensor
    first_J: Tensor
    tile: int
    address_N: Tensor
    columns_N: Tensor
    column_N: Tensor


def tables_of(stack: LoraStack, tile: int) -> Tables:
    """The tables of a stack whose matrices are all in place.

    Args:
        stack: The stack.
        tile: Output features of a tile.
    """
    device = stack.scales_NE.device

    def table(rows: Sequence[Sequence[int]], dtype: torch.dtype) -> Tensor:
        return torch.tensor(rows, dtype=dtype).view(len(rows), len(rows[0])).to(device)

    def row(values: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(device)

    widths = stack.out_features
    tiles = [(n, first) for n, width in enumerate(widths) for first in range(0, width, tile)]
    b_CO = stack.packed.b_CO if stack.packed else ()
    columns = [matrix.shape[0] for matrix in b_CO]
    return Tables(
        a=_matrices(stack, lambda part: (part.a_RH, part.first_a), (stack.in_features,) * len(widths), True, table),
        b=_matrices(stack, lambda part: (part.b_RO, part.first_b), widths, False, table),
        linear_J=row([n for n, _ in tiles], torch.int32),
        first_J=row([first for _, first in tiles], torch.int32),
        tile=tile,
        address_N=row([matrix.data_ptr() for matrix in b_CO], torch.int64),
        columns_N=row(columns, torch.int32),
        column_N=row([sum(columns[:n]) for n in range(len(columns))], torch.int32),
    )


def _matrices(
    stack: LoraStack,
    of: Callable[[LoraPart], tuple[Tensor, int]],
    widths: tuple[int, ...],
    shared: bool,
    table: TableOf,
) -> Matrices:
    held = [[of(part) if (part := expert[n]) else None for expert in stack.experts] for n in range(len(widths))]
    for row in held:
        for entry in row:
            assert entry is None or entry[0].is_contiguous(), "kernels read matrices row by row"
    rows = tuple(tuple(0 if entry is None else entry[0].shape[0] for entry in row) for row in held)
    sizes = [count * width for row, width in zip(rows, widths, strict=True) for count in row]
    starts = [0] * len(widths) if shared else [0, *accumulate(widths[:-1])]
    offsets = [0, *accumulate(sizes)][: len(sizes)]
    per_linear = len(stack.experts)
    return Matrices(
        address_NE=table([[0 if entry is None else entry[0].data_ptr() for entry in row] for row in held], torch.int64),
        rows_NE=table(rows, torch.int32),
        first_NE=table([[0 if entry is None else entry[1] for entry in row] for row in held], torch.int32),
        offset_NE=table([offsets[n * per_linear : (n + 1) * per_linear] for n in range(len(widths))], torch.int64),
        width_N=table([[width] for width in widths], torch.int32).flatten(),
        start_N=table([[start] for start in starts], torch.int64).flatten(),
        widths=widths,
        rows=rows,
    )
