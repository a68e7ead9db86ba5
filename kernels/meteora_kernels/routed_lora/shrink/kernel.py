"""Grouped shrink on a GPU: x A^T of every slot, after picking the experts if need be. Twin: ``shrink_reference``.

With dy in the place of x and B in that of A it is the u = dy B of the backward. Shapes: as in ``blocks``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from meteora_kernels.gate.choice import Chosen, GateChoice
from meteora_kernels.gate.kernel import choice_args, pick, pick_sizes
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
from meteora_kernels.routed_lora.tables import Matrices, Tables


@triton.jit
def weight_of_slot(mine, values, k: tl.constexpr, KP: tl.constexpr):
    """Column k of ``values`` where ``mine``, [16]."""
    here = mine & (tl.arange(0, KP) == k)[None, :]
    return tl.sum(tl.where(here, values, 0.0), axis=1)


@triton.jit
def shrink_block(
    x, ids_TNK, address_NE, rows_NE, first_NE, width_N, start_N, out, tokens, E, N, block, n, plane, R,
    K: tl.constexpr, KP: tl.constexpr, SPLITS: tl.constexpr, PLANES: tl.constexpr, ROWS: tl.constexpr,
    BR: tl.constexpr, BH: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """One plane of the shrunk inputs of a block of tokens at linear n."""
    lane = tl.arange(0, TILE_ROWS)
    t = block * ROWS + lane
    live = (lane < ROWS) & (t < tokens)
    _, ids = block_of_pairs(ids_TNK, t, n, live, N, K, KP)
    width = tl.load(width_N + n)
    length = tl.cdiv(width, SPLITS * BH) * BH
    x_row = tl.load(start_N + n) * tokens + t.to(tl.int64) * width
    out_row = plane.to(tl.int64) * tokens * N * K * R + (t.to(tl.int64) * N + n) * K * R
    r = tl.arange(0, BR)
    e = expert_after(ids, -1)
    while e < NOBODY:
        mine = ids == e
        takes = tl.sum(mine.to(tl.int32), axis=1) > 0
        matrix = tl.load(address_NE + n * E + e).to(tl.pointer_type(TYPE))
        rows = tl.load(rows_NE + n * E + e)
        first = tl.load(first_NE + n * E + e)
        for r0 in range(0, rows, BR):
            held = r0 + r < rows
            matrix_row = (r0 + r).to(tl.int64) * width
            total = tl.zeros([TILE_ROWS, BR], tl.float32)
            for s in range(plane * (SPLITS // PLANES), (plane + 1) * (SPLITS // PLANES)):
                acc = tl.zeros([TILE_ROWS, BR], tl.float32)
                for h0 in range(s * length, min((s + 1) * length, width), BH):
                    h = h0 + tl.arange(0, BH)
                    xs = tl.load(x + x_row[:, None] + h[None, :], mask=takes[:, None] & (h < width)[None, :], other=0.0)
                    ms = tl.load(
                        matrix + matrix_row[None, :] + h[:, None], mask=held[None, :] & (h < width)[:, None], other=0.0
                    )
                    acc = tl.dot(xs.to(TYPE), ms, acc, input_precision="ieee")
                total += acc
            for k in tl.static_range(K):
                used = weight_of_slot(mine, 1.0, k, KP) > 0
                spot = out_row[:, None] + k * R + first + (r0 + r)[None, :]
                tl.store(out + spot, total, mask=used[:, None] & held[None, :])
        e = expert_after(ids, e)


@triton.jit(do_not_specialize=["tokens"])
def shrink_kernel(
    x, ids_TNK, address_NE, rows_NE, first_NE, width_N, start_N, out, tokens, E, N, R,
    K: tl.constexpr, KP: tl.constexpr, SPLITS: tl.constexpr, PLANES: tl.constexpr, ROWS: tl.constexpr,
    BR: tl.constexpr, BH: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Grid (token blocks, N, planes)."""
    shrink_block(
        x, ids_TNK, address_NE, rows_NE, first_NE, width_N, start_N, out, tokens, E, N, tl.program_id(0),
        tl.program_id(1), tl.program_id(2), R, K, KP, SPLITS, PLANES, ROWS, BR, BH, TYPE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def route_shrink_kernel(
    planes, plane_stride, row_stride, auto_T, top_k_T, temperature_T, ids_TK, weights_TK, prototype_E, absent_N,
    slot_E, local_G, slots_out, local_out, weights_out, gate_experts,
    x, address_NE, rows_NE, first_NE, width_N, start_N, out, tokens, E, N, R,
    K: tl.constexpr, KP: tl.constexpr, BE: tl.constexpr, LOGIT_PLANES: tl.constexpr, SPLITS: tl.constexpr,
    PLANES: tl.constexpr, ROWS: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Picks the experts of a block of tokens, then shrinks by them. Grid (token blocks, N, planes)."""
    n = tl.program_id(1)
    k = tl.arange(0, KP)
    for row in range(ROWS):
        t = (tl.program_id(0) * ROWS + row).to(tl.int64)
        if t < tokens:
            slots, local, weights = pick(
                planes, plane_stride, t * row_stride + n * gate_experts, t, n, auto_T, top_k_T, temperature_T, ids_TK,
                weights_TK, prototype_E, absent_N, slot_E, local_G, gate_experts, K, KP, BE, LOGIT_PLANES,
            )  # fmt: skip
            place = (t * N + n) * K + k
            # Programs of other planes write the same numbers to the same places.
            tl.store(slots_out + place, slots.to(tl.int64), mask=k < K)
            tl.store(local_out + place, local.to(tl.int64), mask=k < K)
            tl.store(weights_out + place, weights, mask=k < K)
    tl.debug_barrier()
    shrink_block(
        x, local_out, address_NE, rows_NE, first_NE, width_N, start_N, out, tokens, E, N, tl.program_id(0), n,
        tl.program_id(2), R, K, KP, SPLITS, PLANES, ROWS, BR, BH, TYPE,
    )  # fmt: skip


def launch_shrink(
    x: Tensor, matrices: Matrices, ids_TNK: Tensor, rank: int, dtype: torch.dtype, launch: Launch, zeroed: bool
) -> Tensor:
    """Planes [L, T, N, K, R] of ``x A^T`` for every slot, fp32.

    Args:
        x: What A reads: [T, H] shared by all linears, or one [T, O_n] after the other in one row.
        matrices: A.
        ids_TNK: Expert of every slot, int64, -1 where empty.
        rank: R.
        dtype: Of the matrices.
        launch: How.
        zeroed: Whether to leave 0, rather than anything, where an expert has no rank.
    """
    tokens, linears, slots = ids_TNK.shape
    new = torch.zeros if zeroed else torch.empty
    out = new(launch.planes, tokens, linears, slots, rank, dtype=torch.float32, device=ids_TNK.device)
    if out.numel():
        grid = triton.cdiv(tokens, launch.rows), linears, launch.planes
        shrink_kernel[grid](
            x, ids_TNK, *matrix_args(matrices), out, tokens, matrices.rows_NE.shape[1], linears, rank, K=slots,
            KP=triton.next_power_of_2(slots), SPLITS=launch.splits, PLANES=launch.planes, ROWS=launch.rows,
            BR=rank_block(matrices), BH=launch.inputs, TYPE=TYPES[dtype], **launch.options,
        )  # fmt: skip
    return out


def launch_route_shrink(
    planes: Tensor | None, choice: GateChoice, x_TH: Tensor, tables: Tables, rank: int, dtype: torch.dtype,
    launch: Launch,
) -> tuple[Chosen, Tensor]:  # fmt: skip
    """``launch_choose`` and ``launch_shrink`` in one launch: the chosen, and planes [L, T, N, K, R].

    Args:
        planes: Parts of the logits [L, T, N * E]; None where no token is gated.
        choice: What the pass says about the choice of experts.
        x_TH: Input of the linears.
        tables: Of their experts.
        rank: R.
        dtype: Of the matrices.
        launch: How.
    """
    tokens, linears, slots = x_TH.shape[0], len(tables.b.widths), choice.slots
    chosen = Chosen.unset(tokens, linears, slots, x_TH.device)
    out = torch.empty(launch.planes, tokens, linears, slots, rank, dtype=torch.float32, device=x_TH.device)
    experts = 1 if planes is None else planes.shape[-1] // linears
    strides = (0, 0) if planes is None else (planes.stride(0), planes.stride(1))
    grid = triton.cdiv(tokens, launch.rows), linears, launch.planes
    route_shrink_kernel[grid](
        planes, *strides, *choice_args(choice), chosen.slots_TNK, chosen.local_TNK, chosen.weights_TNK, experts, x_TH,
        *matrix_args(tables.a), out, tokens, tables.a.rows_NE.shape[1], linears, rank, K=slots,
        LOGIT_PLANES=1 if planes is None else planes.shape[0], SPLITS=launch.splits, PLANES=launch.planes,
        ROWS=launch.rows, BR=rank_block(tables.a), BH=launch.inputs, TYPE=TYPES[dtype],
        **pick_sizes(experts, slots), **launch.options,
    )  # fmt: skip
    return chosen, out
