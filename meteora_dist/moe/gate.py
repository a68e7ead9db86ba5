"""From gate logits to the experts of every token, whatever its request chose.

Shapes: T tokens, N linears that share one input, E experts, K slots of the pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from meteora_dist.moe.routing import NO_EXPERT, StepRouting
from meteora_kernels.gate.reference import topk_softmax


def gate_logits(x_TH: Tensor, gate_PH: Tensor, num_linears: int) -> Tensor:
    """fp32 logits_TNE of N gates stacked as ``gate_PH``, P = N * E, rows ordered by linear, then expert."""
    logits_TP = linear(x_TH.float(), gate_PH)
    return logits_TP.view(-1, num_linears, gate_PH.shape[0] // num_linears)


def route(x_TH: Tensor, gate_PH: Tensor, num_linears: int, step: StepRouting) -> tuple[Tensor, Tensor]:
    """The pass's expert ids and weights, each [T, N, K]; ``NO_EXPERT`` with weight 0 where a slot is empty."""
    shape = (-1, num_linears, -1)
    if not step.gated:
        return step.ids_TK[:, None].expand(shape), step.weights_TK[:, None].expand(shape)
    logits_TNE = gate_logits(x_TH, gate_PH, num_linears)
    if step.top_k_T is None:
        temperature_T11 = None if step.temperature_T1 is None else step.temperature_T1[:, None]
        ids_TNK, weights_TNK = topk_softmax(logits_TNE, step.slots, temperature_T11)
    else:
        ids_TNK, weights_TNK = _route_mixed_top_k(logits_TNE, step, step.top_k_T)
    if step.auto_T is None:
        return ids_TNK, weights_TNK
    auto_T11 = step.auto_T[:, None, None]
    ids_TNK = torch.where(auto_T11, ids_TNK, step.ids_TK[:, None])
    return ids_TNK, torch.where(auto_T11, weights_TNK, step.weights_TK[:, None])


def _route_mixed_top_k(logits_TNE: Tensor, step: StepRouting, top_k_T: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens that use fewer than K experts: the slots beyond theirs are emptied before the softmax."""
    unused_T1K = (torch.arange(step.slots, device=logits_TNE.device) >= top_k_T[:, None])[:, None]
    ids_TNK, _ = topk_softmax(logits_TNE, step.slots)
    chosen_TNK = logits_TNE.gather(-1, ids_TNK)
    if step.temperature_T1 is not None:
        chosen_TNK = chosen_TNK / step.temperature_T1[:, None]
    weights_TNK = torch.softmax(chosen_TNK.masked_fill(unused_T1K, float("-inf")), dim=-1)
    return ids_TNK.masked_fill(unused_T1K, NO_EXPERT), weights_TNK
