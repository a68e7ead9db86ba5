"""Routed LoRA on a GPU, dense regime: pick experts and scale their columns, then expand. Twins: ``reference.py``.

After the projection, which has made logits and shrunk columns at once, two launches remain. Columns of experts a token
does not use become 0 and are multiplied all the same.

Shapes: as there; L planes. KP, BC and BO are blocks of K, C and O, as powers of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from meteora_kernels.gate.choice import Chosen, GateChoice
from meteora_kernels.gate.kernel import choice_args, pick, pick_sizes, sum_planes
from meteora_kernels.launch import EXACT, Launch
from meteora_kernels.routed_lora.blocks.kernel import TYPES
from meteora_kernels.routed_lora.deltas import Deltas
from meteora_kernels.routed_lora.stack import LoraStack
from meteora_kernels.routed_lora.tables import Tables

COLUMNS_AT_ONCE = 64


@triton.jit
def scale_columns(
    planes, plane_stride, row_stride, skip, t, n, local, weights, pair_of_C, scales_NE, column_N, columns_N, scaled, E,
    C, PLANES: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Scales the columns of token t at linear n, by its experts ``local`` and ``weights``, each [KP]."""
    begin = tl.load(column_N + n)
    end = begin + tl.load(columns_N + n)
    for first in range(begin, end, BC):
        c = first + tl.arange(0, BC)
        pair = tl.load(pair_of_C + c, mask=c < end, other=0)
        expert = pair - n * E
        weight = tl.sum(tl.where(local[:, None] == expert[None, :], weights[:, None], 0.0), axis=0)
        scale = tl.load(scales_NE + pair, mask=c < end, other=0.0)
        z = sum_planes(planes, plane_stride, t * row_stride + skip + c, c < end, PLANES)
        # What is not used must not matter, not even when it is no number.
        z = tl.where(weight != 0.0, z * (weight * scale), 0.0)
        tl.store(scaled + t * C + c, z.to(scaled.dtype.element_ty), mask=c < end)


@triton.jit
def route_scale_kernel(
    planes, plane_stride, row_stride, auto_T, top_k_T, temperature_T, ids_TK, weights_TK, prototype_E, absent_N,
    slot_E, local_G, slots_out, local_out, weights_out, gate_experts, skip, pair_of_C, scales_NE, column_N, columns_N,
    scaled, E, C, N, GATED: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BE: tl.constexpr, PLANES: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Picks the experts of a token at a linear, and scales its columns. Grid (T, N)."""
    t = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1)
    k = tl.arange(0, KP)
    if GATED:
        slots, local, weights = pick(
            planes, plane_stride, t * row_stride + n * gate_experts, t, n, auto_T, top_k_T, temperature_T, ids_TK,
            weights_TK, prototype_E, absent_N, slot_E, local_G, gate_experts, K, KP, BE, PLANES,
        )  # fmt: skip
    else:
        slots, local, weights = pick(
            None, 0, 0, t, n, auto_T, top_k_T, temperature_T, ids_TK, weights_TK, prototype_E, absent_N, slot_E,
            local_G, gate_experts, K, KP, BE, PLANES,
        )  # fmt: skip
    place = (t * N + n) * K + k
    tl.store(slots_out + place, slots.to(tl.int64), mask=k < K)
    tl.store(local_out + place, local.to(tl.int64), mask=k < K)
    tl.store(weights_out + place, weights, mask=k < K)
    scale_columns(
        planes, plane_stride, row_stride, skip, t, n, local, tl.where(local >= 0, weights, 0.0), pair_of_C, scales_NE,
        column_N, columns_N, scaled, E, C, PLANES, BC,
    )  # fmt: skip


@triton.jit
def scale_kernel(
    planes, plane_stride, row_stride, ids_TNK, weights_TNK, pair_of_C, scales_NE, column_N, columns_N, scaled, E, C, N,
    K: tl.constexpr, KP: tl.constexpr, PLANES: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Scales the columns of a token at a linear by experts that are known. Grid (T, N)."""
    t = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1)
    k = tl.arange(0, KP)
    place = (t * N + n) * K + k
    ids = tl.load(ids_TNK + place, mask=k < K, other=-1)
    weights = tl.load(weights_TNK + place, mask=(k < K) & (ids >= 0), other=0.0)
    scale_columns(
        planes, plane_stride, row_stride, 0, t, n, ids, weights, pair_of_C, scales_NE, column_N, columns_N, scaled, E,
        C, PLANES, BC,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "out_tokens", "out_first"])
def expand_dense_kernel(
    scaled, address_N, columns_N, column_N, width_N, start_N, linear_J, first_J, out, out_tokens,
    out_first, tokens, C, BT: tl.constexpr,
    BC: tl.constexpr, BO: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Grid (token blocks, tiles of features)."""
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    n = tl.load(linear_J + tl.program_id(1))
    o = tl.load(first_J + tl.program_id(1)) + tl.arange(0, BO)
    width = tl.load(width_N + n)
    columns = tl.load(columns_N + n)
    matrix = tl.load(address_N + n).to(tl.pointer_type(TYPE))
    row = t * C + tl.load(column_N + n)
    acc = tl.zeros([BT, BO], tl.float32)
    for first in range(0, columns, BC):
        c = first + tl.arange(0, BC)
        zs = tl.load(scaled + row[:, None] + c[None, :], mask=(t < tokens)[:, None] & (c < columns)[None, :], other=0.0)
        ms = tl.load(
            matrix + c.to(tl.int64)[:, None] * width + o[None, :],
            mask=(c < columns)[:, None] & (o < width)[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(zs, ms, acc, input_precision="ieee")
    spot = tl.load(start_N + n) * out_tokens + (out_first + t)[:, None] * width + o[None, :]
    tl.store(out + spot, acc.to(out.dtype.element_ty), mask=(t < tokens)[:, None] & (o < width)[None, :])


def launch_route_scale(planes: Tensor, choice: GateChoice, stack: LoraStack, tables: Tables) -> tuple[Chosen, Tensor]:
    """Picks experts and scales columns in one launch: the chosen, and z_TC in the type of the matrices.

    Args:
        planes: Of the projection, [L, T, N * E + C], or [L, T, C] where no token is gated.
        choice: What the pass says about the choice of experts.
        stack: A packed stack.
        tables: Of its matrices.
    """
    packed = stack.packed
    assert packed is not None, "the dense regime reads packed matrices"
    tokens, linears, columns = planes.shape[1], stack.num_linears, packed.a_CH.shape[0]
    chosen = Chosen.unset(tokens, linears, choice.slots, planes.device)
    scaled_TC = torch.empty(tokens, columns, dtype=stack.dtype, device=planes.device)
    skip = planes.shape[-1] - columns
    experts = max(1, skip // linears)
    route_scale_kernel[tokens, linears](
        planes, planes.stride(0), planes.stride(1), *choice_args(choice), chosen.slots_TNK, chosen.local_TNK,
        chosen.weights_TNK, experts, skip, packed.pair_of_C, stack.scales_NE, tables.column_N, tables.columns_N,
        scaled_TC, stack.num_experts, columns, linears, GATED=choice.gated, K=choice.slots,
        PLANES=planes.shape[0], BC=COLUMNS_AT_ONCE, **pick_sizes(experts, choice.slots), **EXACT,
    )  # fmt: skip
    return chosen, scaled_TC


def launch_scale(planes: Tensor, ids_TNK: Tensor, weights_TNK: Tensor, stack: LoraStack, tables: Tables) -> Tensor:
    """z_TC in the type of the matrices, of planes [L, T, C] of the shrunk columns, for experts that are known."""
    packed = stack.packed
    assert packed is not None, "the dense regime reads packed matrices"
    tokens, linears, slots = ids_TNK.shape
    columns = packed.a_CH.shape[0]
    scaled_TC = torch.empty(tokens, columns, dtype=stack.dtype, device=planes.device)
    scale_kernel[tokens, linears](
        planes, planes.stride(0), planes.stride(1), ids_TNK, weights_TNK, packed.pair_of_C, stack.scales_NE,
        tables.column_N, tables.columns_N, scaled_TC, stack.num_experts, columns, linears, K=slots,
        KP=triton.next_power_of_2(slots), PLANES=planes.shape[0], BC=COLUMNS_AT_ONCE, **EXACT,
    )  # fmt: skip
    return scaled_TC


def launch_expand_dense(scaled_TC: Tensor, tables: Tables, out: Deltas, dtype: torch.dtype, launch: Launch) -> None:
    """Writes the deltas of all linears into ``out``."""
    tokens, columns = scaled_TC.shape
    expand_dense_kernel[triton.cdiv(tokens, launch.project_rows), tables.linear_J.numel()](
        scaled_TC, tables.address_N, tables.columns_N, tables.column_N, tables.b.width_N, tables.b.start_N,
        tables.linear_J, tables.first_J, out.row, out.tokens, out.first, tokens, columns, BT=launch.project_rows,
        BC=COLUMNS_AT_ONCE, BO=tables.tile, TYPE=TYPES[dtype], **launch.options,
    )  # fmt: skip
