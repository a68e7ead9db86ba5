"""Permute and unpermute on a GPU, one launch each, and each the other's gradient. Definition, twins: ``reference.py``.

Sums run over the ranks in their order, in fp32: a token's sum does not depend on what else was sent.

Shapes: as there; BW is a block of a row's width, PP of N * K, as powers of two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from meteora_kernels.launch import EXACT
from meteora_kernels.permute.reference import NOWHERE

WIDTH_AT_ONCE = 1024


@triton.jit(do_not_specialize=["tokens", "places"])
def permute_kernel(
    x_TH, local_DTNK, weights_TNK, position_DT, rows_SH, ids_SNK, weights_SNK, tokens, places, H, SLOTS: tl.constexpr,
    PP: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Grid (D, places): one row of one rank; ``SLOTS`` is N * K."""
    d = tl.program_id(0)
    t = tl.program_id(1).to(tl.int64)
    row = tl.load(position_DT + d * places + t)
    if row >= 0:
        p = tl.arange(0, PP)
        real = p < tl.where(t < tokens, SLOTS, 0)
        ids = tl.load(local_DTNK + (d.to(tl.int64) * tokens + t) * SLOTS + p, mask=real, other=-1)
        weights = tl.load(weights_TNK + t * SLOTS + p, mask=real & (ids >= 0), other=0.0)
        tl.store(ids_SNK + row * SLOTS + p, ids.to(tl.int32), mask=p < SLOTS)
        tl.store(weights_SNK + row * SLOTS + p, weights, mask=p < SLOTS)
        read = tl.where(tl.max(ids, axis=0) >= 0, H, 0)
        for first in range(0, H, BW):
            h = first + tl.arange(0, BW)
            values = tl.load(x_TH + t * H + h, mask=h < read, other=0.0)
            tl.store(rows_SH + row * H + h, values, mask=h < H)


@triton.jit(do_not_specialize=["tokens", "places"])
def unpermute_kernel(rows_SO, position_DT, out_TO, D, tokens, places, width, BW: tl.constexpr):
    """Grid (tokens, blocks of the width)."""
    t = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BW + tl.arange(0, BW)
    total = tl.zeros([BW], tl.float32)
    for d in range(0, D):
        row = tl.load(position_DT + d * places + t)
        total += tl.load(rows_SO + row * width + o, mask=o < tl.where(row >= 0, width, 0), other=0.0).to(tl.float32)
    tl.store(out_TO + t * width + o, total.to(out_TO.dtype.element_ty), mask=o < width)


def permute(
    x_TH: Tensor, local_DTNK: Tensor, weights_TNK: Tensor, position_DT: Tensor, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``permute_reference``, with gradients to rows and weights."""
    if torch.is_grad_enabled() and (x_TH.requires_grad or weights_TNK.requires_grad):
        sent: tuple[Tensor, Tensor, Tensor] = _Permute.apply(x_TH, weights_TNK, local_DTNK, position_DT, rows)
        return sent
    return _permute(x_TH, local_DTNK, weights_TNK, position_DT, rows)


def unpermute(rows_SO: Tensor, position_DT: Tensor, tokens: int) -> Tensor:
    """As ``unpermute_reference``, in the type of the rows and with a gradient to them."""
    if torch.is_grad_enabled() and rows_SO.requires_grad:
        sums: Tensor = _Unpermute.apply(rows_SO, position_DT, tokens)
        return sums
    return _unpermute(rows_SO, position_DT, tokens)


def _permute(
    x_TH: Tensor, local_DTNK: Tensor, weights_TNK: Tensor, position_DT: Tensor, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    ranks, places = position_DT.shape
    tokens, width = x_TH.shape
    slots = local_DTNK.shape[2:]
    rows_SH = torch.empty(rows, width, dtype=x_TH.dtype, device=x_TH.device)
    ids_SNK = torch.empty(rows, *slots, dtype=torch.int32, device=x_TH.device)
    weights_SNK = torch.empty(rows, *slots, dtype=torch.float32, device=x_TH.device)
    if rows:
        permute_kernel[ranks, places](
            x_TH.contiguous(), local_DTNK.contiguous(), weights_TNK.float().contiguous(), position_DT.contiguous(),
            rows_SH, ids_SNK, weights_SNK, tokens, places, width, SLOTS=slots.numel(),
            PP=triton.next_power_of_2(slots.numel()), BW=_block(width), **EXACT,
        )  # fmt: skip
    return rows_SH, ids_SNK, weights_SNK


def _unpermute(rows_SO: Tensor, position_DT: Tensor, tokens: int) -> Tensor:
    ranks, places = position_DT.shape
    width = rows_SO.shape[1]
    out_TO = torch.empty(tokens, width, dtype=rows_SO.dtype, device=rows_SO.device)
    if tokens:
        block = _block(width)
        unpermute_kernel[tokens, triton.cdiv(width, block)](
            rows_SO.contiguous(), position_DT.contiguous(), out_TO, ranks, tokens, places, width, BW=block, **EXACT
        )
    return out_TO


def _block(width: int) -> int:
    size: int = triton.next_power_of_2(width)
    return min(size, WIDTH_AT_ONCE)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, weights_TNK: Tensor, local_DTNK: Tensor, position_DT: Tensor, rows: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(local_DTNK, position_DT)
        rows_SH, ids_SNK, weights_SNK = _permute(x_TH, local_DTNK, weights_TNK, position_DT, rows)
        ctx.mark_non_differentiable(ids_SNK)
        return rows_SH, ids_SNK, weights_SNK

    @staticmethod
    def backward(ctx: Any, grad_SH: Tensor, _: Tensor, grad_SNK: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        local_DTNK, position_DT = ctx.saved_tensors
        tokens = local_DTNK.shape[1]
        # A row that nobody wants went out as zeros, and gives its token nothing.
        wanted_DT = (local_DTNK >= 0).flatten(2).any(-1)
        position_DT = torch.where(wanted_DT, position_DT[:, :tokens], NOWHERE)
        grad_DTNK = grad_SNK[position_DT.clamp_min(0)]
        grad_weights = torch.where((local_DTNK >= 0) & (position_DT >= 0)[..., None, None], grad_DTNK, 0.0).sum(0)
        return _unpermute(grad_SH, position_DT, tokens), grad_weights, None, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_SO: Tensor, position_DT: Tensor, tokens: int) -> Tensor:
        ctx.save_for_backward(position_DT)
        ctx.rows = rows_SO.shape[0]
        return _unpermute(rows_SO, position_DT, tokens)

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor, None, None]:
        (position_DT,) = ctx.saved_tensors
        ranks, tokens = position_DT.shape[0], grad_TO.shape[0]
        here = torch.zeros(ranks, tokens, 1, 1, dtype=torch.long, device=grad_TO.device)
        weights = torch.zeros(tokens, 1, 1, device=grad_TO.device)
        return _permute(grad_TO, here, weights, position_DT, ctx.rows)[0], None, None
