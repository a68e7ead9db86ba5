"""Gradients of the matrices on a GPU: dB = sum w s z^T dy and dA = sum w s u^T x over an expert's pairs.

Twin: ``outer_reference``. Every program owns a tile of one matrix and adds up its pairs in their order: no atomics.
Shapes: as in ``blocks``; BP is a block of pairs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from meteora_kernels.launch import EXACT, Launch
from meteora_kernels.routed_lora.blocks.kernel import rank_block
from meteora_kernels.routed_lora.tables import Matrices


@triton.jit(do_not_specialize=["tokens"])
def outer_kernel(
    shrunk, x, weights_TNK, scales_NE, order_NP, start_NE, rows_NE, first_NE, offset_NE, width_N, start_N, out, tokens,
    E, N, R, K: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """The gradient of one expert's matrix, over its pairs in their order. Grid (N * E, tiles of features)."""
    n = tl.program_id(0) // E
    e = tl.program_id(0) % E
    begin = tl.load(start_NE + n * (E + 1) + e)
    end = tl.load(start_NE + n * (E + 1) + e + 1)
    rows = tl.load(rows_NE + n * E + e)
    first = tl.load(first_NE + n * E + e)
    scale = tl.load(scales_NE + n * E + e)
    width = tl.load(width_N + n)
    x_start = tl.load(start_N + n) * tokens
    out_start = tl.load(offset_NE + n * E + e)
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    r = tl.arange(0, BR)
    for r0 in range(0, rows, BR):
        held = r0 + r < rows
        acc = tl.zeros([BR, BO], tl.float32)
        for p0 in range(begin, end, BP):
            place = p0 + tl.arange(0, BP)
            pair = tl.load(order_NP + n.to(tl.int64) * tokens * K + place, mask=place < end, other=0)
            t = (pair // K).to(tl.int64)
            slot = (t * N + n) * K + pair % K
            weight = tl.load(weights_TNK + slot, mask=place < end, other=0.0) * scale
            z = tl.load(
                shrunk + slot[None, :] * R + (first + r0 + r)[:, None],
                mask=held[:, None] & (place < end)[None, :], other=0.0,
            ) * weight[None, :]  # fmt: skip
            xs = tl.load(
                x + x_start + t[:, None] * width + o[None, :],
                mask=(place < end)[:, None] & (o < width)[None, :], other=0.0,
            )  # fmt: skip
            acc = tl.dot(z.to(x.dtype.element_ty), xs, acc, input_precision="ieee")
        spot = out_start + (r0 + r).to(tl.int64)[:, None] * width + o[None, :]
        tl.store(out + spot, acc.to(out.dtype.element_ty), mask=held[:, None] & (o < width)[None, :])


def launch_outer(
    shrunk_TNKR: Tensor, x: Tensor, matrices: Matrices, scales_NE: Tensor, weights_TNK: Tensor,
    order: tuple[Tensor, Tensor], launch: Launch,
) -> Tensor:  # fmt: skip
    """Gradients of all matrices in one row (see ``Matrices.offset_NE``), in x's dtype.

    Args:
        shrunk_TNKR: What meets the weights: u for A, z for B.
        x: What A reads, or dy for B; as in ``launch_shrink``.
        matrices: A or B.
        scales_NE: Scales of the pairs.
        weights_TNK: Weight of every slot, fp32.
        order: The pairs by expert, as from ``pair_order``.
        launch: How.
    """
    tokens, linears, slots, rank = shrunk_TNKR.shape
    out = torch.empty(matrices.numel, dtype=x.dtype, device=x.device)
    if out.numel():
        experts = matrices.rows_NE.shape[1]
        outer_kernel[linears * experts, triton.cdiv(max(matrices.widths), launch.outputs)](
            shrunk_TNKR, x, weights_TNK, scales_NE, *order, matrices.rows_NE, matrices.first_NE, matrices.offset_NE,
            matrices.width_N, matrices.start_N, out, tokens, experts, linears, rank, K=slots, BP=launch.pairs,
            BR=rank_block(matrices), BO=launch.outputs, **EXACT,
        )  # fmt: skip
    return out
