"""Routed LoRA on a GPU: the operators of this package, made of its kernels.

They have the arguments and results of their torch twins (``reference.py``, ``dense.py``, ``grouped.py``), and
gradients to the input, the weights, and the matrices.

    fused     projection (gates and A), pick and scale, expand          a packed stack
              projection (gates), pick and shrink, expand               any other
    apart     projection (A), scale, expand; or shrink, expand          where rows travel between gates and experts

Shapes: T tokens, N linears that share one input, K slots, H input width, O_n output widths, P = N * E gate rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from meteora_kernels.dense_lora.kernel import launch_expand_dense, launch_route_scale, launch_scale
from meteora_kernels.gate.choice import Chosen, GateChoice
from meteora_kernels.launch import Launch
from meteora_kernels.pair_order.kernel import pair_order
from meteora_kernels.projection.kernel import launch_project
from meteora_kernels.routed_lora.deltas import Deltas
from meteora_kernels.routed_lora.expand.kernel import launch_expand, launch_expand_back
from meteora_kernels.routed_lora.outer.kernel import launch_outer
from meteora_kernels.routed_lora.shrink.kernel import launch_route_shrink, launch_shrink
from meteora_kernels.routed_lora.stack import LoraStack
from meteora_kernels.routed_lora.tables import Tables


def fused(
    x_TH: Tensor, gate_PH: Tensor | None, choice: GateChoice, stack: LoraStack, tables: Tables, launch: Launch
) -> tuple[Chosen, tuple[Tensor, ...]]:
    """Routes a pass and computes its deltas in three launches, two where no token is gated; without gradients.

    Where there are so many experts that logits take more memory than the deltas, tokens are served in parts.

    Args:
        x_TH: The linears' shared input.
        gate_PH: Their gates, fp32, rows by linear, then expert; None where no token is gated.
        choice: What the pass says about the choice of experts; ``local_G`` counts in the experts of ``stack``.
        stack: The experts.
        tables: Theirs.
        launch: How.

    Returns:
        The chosen, and the N deltas [T, O_n] in x's dtype.
    """
    x_TH, out = x_TH.contiguous(), Deltas.like(x_TH, stack.out_features)
    if not out.tokens:
        nobody = Chosen.unset(0, stack.num_linears, choice.slots, x_TH.device)
        return nobody, out.by_linear(stack.out_features)
    gates = 0 if gate_PH is None else gate_PH.shape[0]
    size = tokens_at_once(x_TH, stack, gates, choice.slots, launch)
    chosen = [
        _fused_part(x_TH[first : first + size], gate_PH, choice.part(first, size), stack, tables, launch, out.at(first))
        for first in range(0, out.tokens, size)
    ]
    return chosen[0] if len(chosen) == 1 else Chosen.join(chosen), out.by_linear(stack.out_features)


def _fused_part(
    x_TH: Tensor, gate_PH: Tensor | None, choice: GateChoice, stack: LoraStack, tables: Tables, launch: Launch,
    out: Deltas,
) -> Chosen:  # fmt: skip
    if stack.packed is not None:
        planes = launch_project(x_TH, gate_PH, stack.packed.a_CH, launch)
        chosen, scaled_TC = launch_route_scale(planes, choice, stack, tables)
        launch_expand_dense(scaled_TC, tables, out, stack.dtype, launch)
        return chosen
    logits = None if gate_PH is None else launch_project(x_TH, gate_PH, None, launch)
    chosen, shrunk = launch_route_shrink(logits, choice, x_TH, tables, stack.max_rank, stack.dtype, launch)
    launch_expand(shrunk, tables, stack.scales_NE, chosen.local_TNK, chosen.weights_TNK, out, stack.dtype, launch)
    return chosen


def tokens_at_once(x_TH: Tensor, stack: LoraStack, gates: int, slots: int, launch: Launch) -> int:
    """How many tokens may be served together: what lies between the launches may take half more than the deltas.

    A few tokens always may: nothing they need is large.
    """
    if launch.planes > 1:
        return max(1, x_TH.shape[0])
    columns = 0 if stack.packed is None else stack.packed.a_CH.shape[0]
    shrunk = 0 if columns else stack.num_linears * slots * stack.max_rank
    extra = 4 * (gates + columns + shrunk) + columns * x_TH.element_size()
    spare = 3 * x_TH.shape[0] * sum(stack.out_features) * x_TH.element_size() // 2
    return max(1, min(x_TH.shape[0], spare // max(extra, 1)))


def routed_lora(
    x_TH: Tensor, stack: LoraStack, tables: Tables, ids_TNK: Tensor, weights_TNK: Tensor, launch: Launch
) -> tuple[Tensor, ...]:
    """The deltas of the N linears, each [T, O_n], in x's dtype; with gradients where they are wanted.

    Args:
        x_TH: The linears' shared input.
        stack: Their experts, whole pairs.
        tables: Theirs.
        ids_TNK: Expert of every slot, int64, -1 where empty.
        weights_TNK: Weight of every slot, fp32.
        launch: How.
    """
    x_TH, ids_TNK, weights_TNK = x_TH.contiguous(), ids_TNK.contiguous(), weights_TNK.contiguous()
    matrices = _matrices(stack)
    if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in (x_TH, weights_TNK, *matrices)):
        row: Tensor = _RoutedLora.apply(x_TH, weights_TNK, ids_TNK, stack, tables, launch, *matrices)  # type: ignore[no-untyped-call]
    else:
        row = _forward(x_TH, stack, tables, ids_TNK, weights_TNK, launch)
    return Deltas(row, x_TH.shape[0]).by_linear(stack.out_features)


def shrink(x_TH: Tensor, stack: LoraStack, tables: Tables, ids_TNK: Tensor, launch: Launch) -> Tensor:
    """The shrunk inputs [T, N, K, R], fp32, 0 in ranks that are not held here; ``launch`` has a single plane."""
    assert launch.planes == 1, "what others add to must be whole"
    ids_TNK = ids_TNK.contiguous()
    return launch_shrink(x_TH.contiguous(), tables.a, ids_TNK, stack.max_rank, stack.dtype, launch, zeroed=True)[0]


def expand(
    shrunk_TNKR: Tensor, stack: LoraStack, tables: Tables, ids_TNK: Tensor, weights_TNK: Tensor, launch: Launch
) -> tuple[Tensor, ...]:
    """The deltas of the N linears, each [T, O_n], in the dtype of the matrices, from the ranks held here."""
    tokens = shrunk_TNKR.shape[0]
    out = Deltas(torch.empty(tokens * sum(stack.out_features), dtype=stack.dtype, device=shrunk_TNKR.device), tokens)
    ids_TNK, weights_TNK = ids_TNK.contiguous(), weights_TNK.contiguous()
    planes = shrunk_TNKR.contiguous()[None]
    launch_expand(planes, tables, stack.scales_NE, ids_TNK, weights_TNK, out, stack.dtype, launch)
    return out.by_linear(stack.out_features)


class _RoutedLora(torch.autograd.Function):
    """One row of all deltas; its backward is the same for both regimes."""

    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, weights_TNK: Tensor, ids_TNK: Tensor, stack: LoraStack, tables: Tables, launch: Launch,
        *matrices: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.stack, ctx.tables, ctx.launch = stack, tables, launch
        ctx.save_for_backward(x_TH, weights_TNK, ids_TNK)
        return _forward(x_TH, stack, tables, ids_TNK, weights_TNK, launch)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, weights_TNK, ids_TNK = ctx.saved_tensors
        stack, tables, launch = ctx.stack, ctx.tables, ctx.launch
        grad = grad.contiguous()
        needs_x, needs_weights, *_ = ctx.needs_input_grad
        needs_matrices = ctx.needs_input_grad[6:]
        # Both are wanted whole, and 0 where a pair has no rank: they meet each other.
        u, z = (
            launch_shrink(rows, side, ids_TNK, stack.max_rank, stack.dtype, launch, zeroed=True).sum(0)
            for rows, side in ((grad, tables.b), (x_TH, tables.a))
        )
        grad_x = grad_weights = None
        if needs_x:
            grad_x = torch.empty_like(x_TH)
            out = Deltas(grad_x.view(-1), grad_x.shape[0])
            launch_expand_back(u[None], tables, stack.scales_NE, ids_TNK, weights_TNK, out, stack.dtype, launch)
        if needs_weights:
            linears = torch.arange(stack.num_linears, device=ids_TNK.device)[:, None]
            scales_TNK = stack.scales_NE[linears, ids_TNK.clamp_min(0)].masked_fill(ids_TNK < 0, 0.0)
            grad_weights = (u * z).sum(-1) * scales_TNK
        grads: list[Tensor | None] = [None] * len(needs_matrices)
        if any(needs_matrices):
            grads = list(_matrix_gradients(x_TH, grad, u, z, stack, tables, ids_TNK, weights_TNK, launch))
        return grad_x, grad_weights, None, None, None, None, *grads


def _matrix_gradients(
    x_TH: Tensor, grad: Tensor, u: Tensor, z: Tensor, stack: LoraStack, tables: Tables, ids_TNK: Tensor,
    weights_TNK: Tensor, launch: Launch,
) -> Sequence[Tensor]:  # fmt: skip
    """In the order of ``_matrices``."""
    order = pair_order(ids_TNK, stack.num_experts)
    of_a = launch_outer(u, x_TH, tables.a, stack.scales_NE, weights_TNK, order, launch)
    of_b = launch_outer(z, grad, tables.b, stack.scales_NE, weights_TNK, order, launch)
    if stack.packed is None:
        return [*tables.a.split(of_a), *tables.b.split(of_b)]
    sizes = [b_CO.numel() for b_CO in stack.packed.b_CO]
    parts = zip(of_b.split(sizes), stack.packed.b_CO, strict=True)
    return [of_a.view_as(stack.packed.a_CH), *(part.view_as(b_CO) for part, b_CO in parts)]


def _matrices(stack: LoraStack) -> list[Tensor]:
    """What may want a gradient: the packed matrices, or every pair's, A before B, by linear, then by expert."""
    if stack.packed is not None:
        return [stack.packed.a_CH, *stack.packed.b_CO]
    parts = [part for n in range(stack.num_linears) for expert in stack.experts if (part := expert[n])]
    held_a = [part.a_RH for part in parts if part.a_RH.shape[0]]
    return [*held_a, *(part.b_RO for part in parts if part.b_RO.shape[0])]


def _forward(
    x_TH: Tensor, stack: LoraStack, tables: Tables, ids_TNK: Tensor, weights_TNK: Tensor, launch: Launch
) -> Tensor:
    """One row of all deltas."""
    out = Deltas.like(x_TH, stack.out_features)
    size = tokens_at_once(x_TH, stack, 0, ids_TNK.shape[-1], launch)
    for first in range(0, x_TH.shape[0], size):
        rows = slice(first, first + size)
        _forward_part(x_TH[rows], stack, tables, ids_TNK[rows], weights_TNK[rows], launch, out.at(first))
    return out.row


def _forward_part(
    x_TH: Tensor, stack: LoraStack, tables: Tables, ids_TNK: Tensor, weights_TNK: Tensor, launch: Launch, out: Deltas
) -> None:
    if stack.packed is not None:
        planes = launch_project(x_TH, None, stack.packed.a_CH, launch)
        scaled_TC = launch_scale(planes, ids_TNK, weights_TNK, stack, tables)
        launch_expand_dense(scaled_TC, tables, out, stack.dtype, launch)
    else:
        planes = launch_shrink(x_TH, tables.a, ids_TNK, stack.max_rank, stack.dtype, launch, zeroed=False)
        launch_expand(planes, tables, stack.scales_NE, ids_TNK, weights_TNK, out, stack.dtype, launch)
