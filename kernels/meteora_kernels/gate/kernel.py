"""Gate on a GPU: one program for every token at every linear picks its experts. Formula and twin: ``reference.py``.

Logits may come in planes, parts of a sum over the input width: they are added in the order of the planes, so that it
makes no difference how many programs computed them.

Shapes: as in ``choice.py``; S planes. KP and BE are K and a block of experts, as powers of two.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from meteora_kernels.gate.choice import NO_EXPERT, Chosen, GateChoice
from meteora_kernels.launch import EXACT

MOST_EXPERTS_AT_ONCE = 1024
"""Logits a program holds at once; more experts are met block by block."""


def choice_args(choice: GateChoice) -> tuple[Tensor | None, ...]:
    """The tensors of a choice, in the order kernels take them."""
    tables = (choice.prototype_E, choice.absent_N1, choice.slot_E, choice.local_G)
    return (choice.auto_T, choice.top_k_T, choice.temperature_T1, choice.ids_TK, choice.weights_TK, *tables)


def pick_sizes(experts: int, slots: int) -> dict[str, int]:
    """KP and BE."""
    block = min(triton.next_power_of_2(max(experts, 1)), MOST_EXPERTS_AT_ONCE)
    return {"KP": triton.next_power_of_2(max(slots, 1)), "BE": block}


@triton.jit
def sum_planes(planes, plane_stride, offsets, mask, PLANES: tl.constexpr):
    """Adds up S planes at ``offsets``, in their order."""
    total = tl.load(planes + offsets, mask=mask, other=0.0)
    for s in tl.static_range(1, PLANES):
        total += tl.load(planes + s * plane_stride + offsets, mask=mask, other=0.0)
    return total


@triton.jit
def top_of_row(planes, plane_stride, row, prototype_E, limit, E, K: tl.constexpr, KP: tl.constexpr, BE: tl.constexpr,
               PLANES: tl.constexpr):  # fmt: skip
    """The ``limit`` largest logits of the row at offset ``row``, [KP], with their ids; -inf and -1 beyond them."""
    k = tl.arange(0, KP)
    values = tl.full([KP], float("-inf"), tl.float32)
    ids = tl.full([KP], -1, tl.int32)
    last = float("inf")
    last_id = -1
    for j in tl.static_range(K):
        best = float("-inf")
        best_id = E
        for first in range(0, E, BE):
            e = first + tl.arange(0, BE)
            logit = sum_planes(planes, plane_stride, row + e, e < E, PLANES)
            if prototype_E is not None:
                logit = tl.where(tl.load(prototype_E + e, mask=e < E, other=0) != 0, tl.abs(logit), logit)
            # A logit that is not a number goes first, as in a sort: its weight will not be a number either.
            logit = tl.where(logit != logit, float("inf"), logit)
            left = (e < E) & ((logit < last) | ((logit == last) & (e > last_id)))
            top = tl.max(tl.where(left, logit, float("-inf")), axis=0)
            top_id = tl.min(tl.where(left & (logit == top), e, E), axis=0)
            # Later blocks have larger ids, so a tie goes to what was found before.
            better = (top_id < E) & ((top > best) | (best_id == E))
            best = tl.where(better, top, best)
            best_id = tl.where(better, top_id, best_id)
        taken = (k == j) & (j < limit) & (best_id < E)
        values = tl.where(taken, best, values)
        ids = tl.where(taken, best_id, ids)
        last = best
        last_id = best_id
    return values, ids


@triton.jit
def pick(
    planes, plane_stride, row, t, n, auto_T, top_k_T, temperature_T, ids_TK, weights_TK, prototype_E, absent_N, slot_E,
    local_G, E, K: tl.constexpr, KP: tl.constexpr, BE: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """Slots, local ids and weights of token t at linear n, each [KP]."""
    k = tl.arange(0, KP)
    ids = tl.full([KP], -1, tl.int32)
    weights = tl.zeros([KP], tl.float32)
    if planes is not None:
        limit = K
        if top_k_T is not None:
            limit = tl.load(top_k_T + t).to(tl.int32)
        values, ids = top_of_row(planes, plane_stride, row, prototype_E, limit, E, K, KP, BE, PLANES)
        if temperature_T is not None:
            values = tl.where(ids >= 0, values / tl.load(temperature_T + t), float("-inf"))
        powers = tl.where(ids >= 0, tl.exp(values - tl.max(values, axis=0)), 0.0)
        weights = powers / tl.sum(powers, axis=0)
    if ids_TK is not None:
        fixed = tl.load(ids_TK + t * K + k, mask=k < K, other=-1).to(tl.int32)
        given = tl.load(weights_TK + t * K + k, mask=k < K, other=0.0)
        if planes is None:
            ids = fixed
            weights = given
        elif auto_T is not None:
            auto = tl.load(auto_T + t) != 0
            ids = tl.where(auto, ids, fixed)
            weights = tl.where(auto, weights, given)
    if absent_N is not None:
        ids = tl.where(tl.load(absent_N + n) != 0, -1, ids)
    weights = tl.where(ids >= 0, weights, 0.0)
    if slot_E is not None:
        ids = tl.load(slot_E + ids, mask=ids >= 0, other=-1).to(tl.int32)
    local = ids
    if local_G is not None:
        local = tl.load(local_G + ids, mask=ids >= 0, other=-1).to(tl.int32)
    return ids, local, weights


@triton.jit
def choose_kernel(
    planes, plane_stride, row_stride, auto_T, top_k_T, temperature_T, ids_TK, weights_TK, prototype_E, absent_N,
    slot_E, local_G, slots_out, local_out, weights_out, E, N, K: tl.constexpr, KP: tl.constexpr, BE: tl.constexpr,
    PLANES: tl.constexpr,
):  # fmt: skip
    """Grid (T, N)."""
    t = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1)
    slots, local, weights = pick(
        planes, plane_stride, t * row_stride + n * E, t, n, auto_T, top_k_T, temperature_T, ids_TK, weights_TK,
        prototype_E, absent_N, slot_E, local_G, E, K, KP, BE, PLANES,
    )  # fmt: skip
    k = tl.arange(0, KP)
    place = (t * N + n) * K + k
    tl.store(slots_out + place, slots.to(tl.int64), mask=k < K)
    tl.store(local_out + place, local.to(tl.int64), mask=k < K)
    tl.store(weights_out + place, weights, mask=k < K)


@triton.jit
def choose_backward_kernel(
    logits, ids_TNK, weights_TNK, grad_weights, temperature_T, prototype_E, auto_T, grad_logits, E, N,
    K: tl.constexpr, KP: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """dL/dlogits of one row: of the softmax over the chosen, 0 elsewhere. Grid (T, N)."""
    t = tl.program_id(0).to(tl.int64)
    row = t * N + tl.program_id(1)
    k = tl.arange(0, KP)
    ids = tl.load(ids_TNK + row * K + k, mask=k < K, other=-1)
    weights = tl.load(weights_TNK + row * K + k, mask=k < K, other=0.0)
    grads = tl.load(grad_weights + row * K + k, mask=k < K, other=0.0)
    grads = weights * (grads - tl.sum(weights * grads, axis=0))
    if temperature_T is not None:
        grads = grads / tl.load(temperature_T + t)
    if auto_T is not None:
        grads = tl.where(tl.load(auto_T + t) != 0, grads, 0.0)
    grads = tl.where(ids >= 0, grads, 0.0)
    for first in range(0, E, BE):
        e = first + tl.arange(0, BE)
        found = tl.sum(tl.where(ids[None, :] == e[:, None], grads[None, :], 0.0), axis=1)
        if prototype_E is not None:
            logit = tl.load(logits + row * E + e, mask=e < E, other=0.0)
            negative = (tl.load(prototype_E + e, mask=e < E, other=0) != 0) & (logit < 0)
            found = tl.where(negative, -found, found)
        tl.store(grad_logits + row * E + e, found, mask=e < E)


def choose(logits_TNE: Tensor | None, choice: GateChoice, tokens: int, linears: int) -> Chosen:
    """As ``choose_reference``; weights have a gradient to the logits, where these want one."""
    if logits_TNE is None or not (torch.is_grad_enabled() and logits_TNE.requires_grad):
        return launch_choose(logits_TNE, choice, tokens, linears)
    # What the chosen are called has no gradient, and is looked up apart.
    ids_TNK, weights_TNK = _Choose.apply(logits_TNE, replace(choice, slot_E=None, local_G=None))
    slots_TNK = _looked_up(ids_TNK, choice.slot_E)
    return Chosen(slots_TNK, _looked_up(slots_TNK, choice.local_G), weights_TNK)


def _looked_up(ids: Tensor, table: Tensor | None) -> Tensor:
    return ids if table is None else torch.where(ids >= 0, table[ids.clamp_min(0)], NO_EXPERT)


def launch_choose(planes: Tensor | None, choice: GateChoice, tokens: int, linears: int) -> Chosen:
    """One launch, without gradients.

    Args:
        planes: Logits [T, N, E], or their parts [S, T, N, E]; fp32, contiguous. None where no token is gated.
        choice: What the pass says about it.
        tokens: T.
        linears: N.
    """
    if planes is not None and planes.dim() == 3:
        planes = planes[None]
    device = planes.device if planes is not None else _device(choice)
    chosen = Chosen.unset(tokens, linears, choice.slots, device)
    if not chosen.slots_TNK.numel():
        return chosen
    experts = 1 if planes is None else planes.shape[-1]
    strides = (0, 0) if planes is None else (planes.stride(0), planes.stride(1))
    choose_kernel[tokens, linears](
        planes, *strides, *choice_args(choice), chosen.slots_TNK, chosen.local_TNK, chosen.weights_TNK, experts,
        linears,
        K=choice.slots, PLANES=1 if planes is None else planes.shape[0], **pick_sizes(experts, choice.slots), **EXACT,
    )  # fmt: skip
    return chosen


def _device(choice: GateChoice) -> torch.device:
    assert choice.ids_TK is not None, "a pass without gates names its experts"
    return choice.ids_TK.device


class _Choose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TNE: Tensor, choice: GateChoice) -> tuple[Tensor, Tensor]:
        chosen = launch_choose(logits_TNE.contiguous(), choice, *logits_TNE.shape[:2])
        ctx.choice = choice
        ctx.save_for_backward(logits_TNE, chosen.slots_TNK, chosen.weights_TNK)
        ctx.mark_non_differentiable(chosen.slots_TNK)
        return chosen.slots_TNK, chosen.weights_TNK

    @staticmethod
    def backward(ctx: Any, _: Tensor, grad_TNK: Tensor) -> tuple[Tensor, None]:
        logits_TNE, ids_TNK, weights_TNK = ctx.saved_tensors
        tokens, linears, experts = logits_TNE.shape
        grad_TNE = torch.empty_like(logits_TNE, memory_format=torch.contiguous_format)
        choice, slots = ctx.choice, ids_TNK.shape[-1]
        if grad_TNE.numel():
            choose_backward_kernel[tokens, linears](
                logits_TNE.contiguous(), ids_TNK, weights_TNK, grad_TNK.contiguous(), choice.temperature_T1,
                choice.prototype_E, choice.auto_T, grad_TNE, experts, linears, K=slots,
                KP=triton.next_power_of_2(slots), BE=min(triton.next_power_of_2(experts), 128), **EXACT,
            )  # fmt: skip
        return grad_TNE, None
