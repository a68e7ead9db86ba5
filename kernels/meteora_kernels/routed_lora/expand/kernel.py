"""Grouped expand on a GPU: sum over slots of w s z B, with weight and scale inside. Twin: ``expand_reference``.

With u in the place of z and A in that of B it is the gradient of the input. Shapes: as in ``blocks``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from meteora_kernels.launch import Launch
from meteora_kernels.routed_lora.blocks.kernel import (
    NOBODY,
    TILE_ROWS,
    TYPES,
    block_of_pairs,
    expert_after,
    matrix_args,
    rank_block,
)
from meteora_kernels.routed_lora.deltas import Deltas
from meteora_kernels.routed_lora.tables import Matrices, Tables

ONE_STAGE = {"num_stages": 1}
"""Its product reads an operand from registers, which ptxas before 13.3 can get wrong in a pipelined loop on sm_90."""


@triton.jit
def scaled_block(shrunk, plane_stride, place, mine, weights, scale, columns, held, R, K: tl.constexpr, KP: tl.constexpr,
                 PLANES: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    """Sum over the slots of one expert of w s z, [16, BR]: ``place`` are slots [16, KP], ``columns`` ranks [BR]."""
    k_all = tl.arange(0, KP)
    total = tl.zeros([TILE_ROWS, BR], tl.float32)
    for k in tl.static_range(K):
        here = mine & (k_all == k)[None, :]
        used = tl.sum(here.to(tl.int32), axis=1) > 0
        weight = tl.sum(tl.where(here, weights, 0.0), axis=1) * scale
        slot = tl.sum(tl.where((k_all == k)[None, :], place, 0), axis=1)
        spot = slot[:, None] * R + columns[None, :]
        mask = used[:, None] & held[None, :]
        z = tl.load(shrunk + spot, mask=mask, other=0.0)
        for s in tl.static_range(1, PLANES):
            z += tl.load(shrunk + s * plane_stride + spot, mask=mask, other=0.0)
        total += weight[:, None] * z
    return total


@triton.jit(do_not_specialize=["tokens", "out_tokens", "out_first"])
def expand_kernel(
    shrunk, ids_TNK, weights_TNK, scales_NE, address_NE, rows_NE, first_NE, width_N, start_N, linear_J, first_J, out,
    out_tokens, out_first, tokens, E, N, R, K: tl.constexpr, KP: tl.constexpr, PLANES: tl.constexpr,
    ROWS: tl.constexpr, BR: tl.constexpr, BO: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Grid (token blocks, tiles of features). Without ``linear_J`` all linears add to one output."""
    lane = tl.arange(0, TILE_ROWS)
    t = tl.program_id(0) * ROWS + lane
    live = (lane < ROWS) & (t < tokens)
    tile = tl.program_id(1)
    n_first = 0
    n_last = N
    o = tile * BO + tl.arange(0, BO)
    if linear_J is not None:
        n_first = tl.load(linear_J + tile)
        n_last = n_first + 1
        o = tl.load(first_J + tile) + tl.arange(0, BO)
    width = tl.load(width_N + n_first)
    start = tl.load(start_N + n_first)
    r = tl.arange(0, BR)
    plane_stride = tokens.to(tl.int64) * N * K * R
    acc = tl.zeros([TILE_ROWS, BO], tl.float32)
    for n in range(n_first, n_last):
        place, ids = block_of_pairs(ids_TNK, t, n, live, N, K, KP)
        weights = tl.load(weights_TNK + place, mask=ids >= 0, other=0.0)
        e = expert_after(ids, -1)
        while e < NOBODY:
            mine = ids == e
            matrix = tl.load(address_NE + n * E + e).to(tl.pointer_type(TYPE))
            rows = tl.load(rows_NE + n * E + e)
            first = tl.load(first_NE + n * E + e)
            scale = tl.load(scales_NE + n * E + e)
            part = tl.zeros([TILE_ROWS, BO], tl.float32)
            for r0 in range(0, rows, BR):
                held = r0 + r < rows
                z = scaled_block(
                    shrunk, plane_stride, place, mine, weights, scale, first + r0 + r, held, R, K, KP, PLANES, BR
                )
                ms = tl.load(
                    matrix + (r0 + r).to(tl.int64)[:, None] * width + o[None, :],
                    mask=held[:, None] & (o < width)[None, :], other=0.0,
                )  # fmt: skip
                part = tl.dot(z.to(TYPE), ms, part, input_precision="ieee")
            # Rows of other experts met zeros there; a matrix with infinities must not make them NaN.
            takes = tl.sum(mine.to(tl.int32), axis=1) > 0
            acc += tl.where(takes[:, None], part, 0.0)
            e = expert_after(ids, e)
    spot = start * out_tokens + (out_first + t).to(tl.int64)[:, None] * width + o[None, :]
    tl.store(out + spot, acc.to(out.dtype.element_ty), mask=live[:, None] & (o < width)[None, :])


def launch_expand(
    planes: Tensor, tables: Tables, scales_NE: Tensor, ids_TNK: Tensor, weights_TNK: Tensor, out: Deltas,
    dtype: torch.dtype, launch: Launch,
) -> None:  # fmt: skip
    """Writes the deltas of all linears into ``out``.

    Args:
        planes: Of the shrunk inputs, [L, T, N, K, R].
        tables: Of the experts.
        scales_NE: Their scales.
        ids_TNK: Expert of every slot.
        weights_TNK: Weight of every slot, fp32.
        out: Theirs.
        dtype: Of the matrices.
        launch: How.
    """
    tiles = tables.linear_J, tables.first_J
    _expand(planes, tables.b, scales_NE, ids_TNK, weights_TNK, out, dtype, launch, tiles, tables.tile)


def launch_expand_back(
    planes: Tensor, tables: Tables, scales_NE: Tensor, ids_TNK: Tensor, weights_TNK: Tensor, out: Deltas,
    dtype: torch.dtype, launch: Launch,
) -> None:  # fmt: skip
    """Writes dL/dx of the shared input into ``out``, from planes of u; the others as in ``launch_expand``."""
    _expand(planes, tables.a, scales_NE, ids_TNK, weights_TNK, out, dtype, launch, (None, None), launch.outputs)


def _expand(
    planes: Tensor, matrices: Matrices, scales_NE: Tensor, ids_TNK: Tensor, weights_TNK: Tensor, out: Deltas,
    dtype: torch.dtype, launch: Launch, tiles: tuple[Tensor | None, Tensor | None], tile: int,
) -> None:  # fmt: skip
    tokens, linears, slots = ids_TNK.shape
    count = triton.cdiv(matrices.widths[0], tile) if tiles[0] is None else tiles[0].numel()
    if not tokens:
        return
    expand_kernel[triton.cdiv(tokens, launch.rows), count](
        planes, ids_TNK, weights_TNK, scales_NE, *matrix_args(matrices), *tiles, out.row, out.tokens,
        out.first, tokens,
        matrices.rows_NE.shape[1], linears, planes.shape[-1], K=slots, KP=triton.next_power_of_2(slots),
        PLANES=planes.shape[0], ROWS=launch.rows, BR=rank_block(matrices), BO=tile, TYPE=TYPES[dtype],
        **launch.options | ONE_STAGE,
    )  # fmt: skip
