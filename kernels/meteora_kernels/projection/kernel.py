"""Projection on a GPU: gates and A matrices in one launch. Formula and twin: ``reference.py``.

Gates are fp32 and multiplied as fp32 (three TF32 products where x is narrower); A in its own type. A row of the result
does not depend on the rows beside it: tiles have 16 or 32 rows, for which Triton uses the same instruction, whose sums
run over the input width alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from meteora_kernels.launch import Launch
from meteora_kernels.projection.reference import split_length


@triton.jit
def project_tile(x, weight, t, m, tokens, rows, H, s, LENGTH, PRECISION: tl.constexpr, BT: tl.constexpr,
                 BC: tl.constexpr, BH: tl.constexpr):  # fmt: skip
    """Part s of the product of tokens t and weight rows m, [BT, BC]."""
    acc = tl.zeros([BT, BC], tl.float32)
    for first in range(s * LENGTH, min((s + 1) * LENGTH, H), BH):
        h = first + tl.arange(0, BH)
        xs = tl.load(
            x + t.to(tl.int64)[:, None] * H + h[None, :], mask=(t < tokens)[:, None] & (h < H)[None, :], other=0.0
        )
        ws = tl.load(
            weight + m.to(tl.int64)[None, :] * H + h[:, None], mask=(m < rows)[None, :] & (h < H)[:, None], other=0.0
        )
        acc = tl.dot(xs.to(weight.dtype.element_ty), ws, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["tokens"])
def project_kernel(
    x, gate_PH, a_CH, out, tokens, P, C, H, LENGTH, GATE_PRECISION: tl.constexpr, SPLITS: tl.constexpr,
    PLANES: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Grid (token blocks, column tiles: those of the gates first, planes)."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    tile = tl.program_id(1)
    plane = tl.program_id(2)
    gate_tiles = tl.cdiv(P, BC)
    total = tl.zeros([BT, BC], tl.float32)
    column = tile * BC + tl.arange(0, BC)
    rows = P
    first = 0
    if tile < gate_tiles:
        if gate_PH is not None:
            for s in range(plane * (SPLITS // PLANES), (plane + 1) * (SPLITS // PLANES)):
                total += project_tile(x, gate_PH, t, column, tokens, P, H, s, LENGTH, GATE_PRECISION, BT, BC, BH)
    else:
        column = column - gate_tiles * BC
        rows = C
        first = P
        if a_CH is not None:
            for s in range(plane * (SPLITS // PLANES), (plane + 1) * (SPLITS // PLANES)):
                total += project_tile(x, a_CH, t, column, tokens, C, H, s, LENGTH, "ieee", BT, BC, BH)
    place = (plane.to(tl.int64) * tokens + t)[:, None] * (P + C) + first + column[None, :]
    tl.store(out + place, total, mask=(t < tokens)[:, None] & (column < rows)[None, :])


def launch_project(x_TH: Tensor, gate_PH: Tensor | None, a_CH: Tensor | None, launch: Launch) -> Tensor:
    """Planes [L, T, M] of ``project_reference``'s parts, in one launch and without gradients; see there."""
    tokens, width = x_TH.shape
    gates, columns = (0 if weight is None else weight.shape[0] for weight in (gate_PH, a_CH))
    out = torch.empty(launch.planes, tokens, gates + columns, dtype=torch.float32, device=x_TH.device)
    block = launch.project_columns
    if out.numel():
        grid = (
            triton.cdiv(tokens, launch.project_rows),
            triton.cdiv(gates, block) + triton.cdiv(columns, block),
            launch.planes,
        )
        project_kernel[grid](
            x_TH.contiguous(), gate_PH, a_CH, out, tokens, gates, columns, width,
            split_length(width, launch.splits, launch.inputs),
            GATE_PRECISION="ieee" if x_TH.dtype == torch.float32 else "tf32x3", SPLITS=launch.splits,
            PLANES=launch.planes, BT=launch.project_rows, BC=block, BH=launch.inputs,
            **launch.options,
        )  # fmt: skip
    return out


def gate_logits(x_TH: Tensor, gate_PH: Tensor, launch: Launch) -> Tensor:
    """fp32 logits [T, P], with gradients to both; ``launch`` has a single plane."""
    assert launch.planes == 1, "logits are whole sums"
    if torch.is_grad_enabled() and (x_TH.requires_grad or gate_PH.requires_grad):
        logits: Tensor = _GateLogits.apply(x_TH, gate_PH, launch)
        return logits
    return launch_project(x_TH, gate_PH, None, launch)[0]


class _GateLogits(torch.autograd.Function):
    """The backward of a plain product is two plain products, which are the vendor's."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, gate_PH: Tensor, launch: Launch) -> Tensor:
        ctx.save_for_backward(x_TH, gate_PH)
        return launch_project(x_TH, gate_PH, None, launch)[0]

    @staticmethod
    def backward(ctx: Any, grad_TP: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_TH, gate_PH = ctx.saved_tensors
        grad_x = (grad_TP @ gate_PH).to(x_TH.dtype) if ctx.needs_input_grad[0] else None
        grad_gate = grad_TP.T @ x_TH.float() if ctx.needs_input_grad[1] else None
        return grad_x, grad_gate, None
