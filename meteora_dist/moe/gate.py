"""From gate logits to the experts of every token, whatever its request chose.

Shapes: T tokens, N linears that share one input, E experts of a generation, K slots of the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from meteora_dist.moe.routing import NO_EXPERT, MixedRouting, PassRouting, StepRouting
from meteora_kernels.gate.choice import GateChoice
from meteora_kernels.gate.reference import topk_softmax
from meteora_kernels.routed_lora import plan


def gate_logits(x_TH: Tensor, gate_PH: Tensor, num_linears: int) -> Tensor:
    """fp32 logits_TNE of N gates stacked as ``gate_PH``, P = N * E, rows ordered by linear, then expert."""
    return plan.gate_logits(x_TH, gate_PH).view(-1, num_linears, gate_PH.shape[0] // num_linears)


@dataclass(frozen=True, slots=True)
class GroupGates:
    """The gates of N linears that share one input.

    Attributes:
        num_linears: N.
        stacked: Stacked gates (see ``gate_logits``) of every live generation.
        absent: For each of them, which linears no expert of the generation adapts, bool [N, 1]; None for none.
        complete: Makes whole logits_TNE of those of gates that saw a part of their input.
        layer: Number of the decoder layer they are part of.
    """

    num_linears: int
    stacked: Sequence[Tensor]
    absent: Sequence[Tensor | None]
    complete: Callable[[Tensor], Tensor] = lambda logits: logits
    layer: int = 0


def choice_of(step: StepRouting, absent_N1: Tensor | None = None, local_G: Tensor | None = None) -> GateChoice:
    """What kernels must know of a pass; the other arguments as in ``GateChoice``."""
    fixed = not step.gated or step.auto_T is not None
    return GateChoice(
        slots=step.slots,
        gated=step.gated,
        auto_T=step.auto_T,
        top_k_T=step.top_k_T,
        temperature_T1=step.temperature_T1,
        ids_TK=step.ids_TK if fixed else None,
        weights_TK=step.weights_TK if fixed else None,
        prototype_E=step.prototype_E,
        absent_N1=absent_N1,
        slot_E=step.slot_E,
        local_G=local_G,
    )


def route(x_TH: Tensor, gates: GroupGates, step: PassRouting) -> tuple[Tensor, Tensor]:
    """Routes a pass by the gates of its requests' generations, and adds up the shares the pass records.

    Args:
        x_TH: What the N linears read.
        gates: Theirs.
        step: What the requests chose.

    Returns:
        Slots of the roster and weights, each [T, N, K]; ``NO_EXPERT`` with weight 0 where a slot is empty.
    """
    if isinstance(step, StepRouting):
        return _route_generation(x_TH, gates, step)
    return _route_mixed_generations(x_TH, gates, step)


def _route_mixed_generations(x_TH: Tensor, gates: GroupGates, step: MixedRouting) -> tuple[Tensor, Tensor]:
    shape = (x_TH.shape[0], gates.num_linears, step.slots)
    slots_TNK = torch.empty(shape, dtype=torch.long, device=x_TH.device)
    weights_TNK = torch.empty(shape, device=x_TH.device)
    for rows_T, part in step.parts:
        slots_TNK[rows_T], weights_TNK[rows_T] = _route_generation(x_TH[rows_T], gates, part)
    return slots_TNK, weights_TNK


def _route_generation(x_TH: Tensor, gates: GroupGates, step: StepRouting) -> tuple[Tensor, Tensor]:
    ids_TNK, weights_TNK = _choose(x_TH, gates, step)
    absent_N1 = gates.absent[step.index]
    if absent_N1 is not None:
        ids_TNK, weights_TNK = ids_TNK.masked_fill(absent_N1, NO_EXPERT), weights_TNK.masked_fill(absent_N1, 0.0)
    if step.shares_TE is not None:
        step.shares_TE.scatter_add_(1, ids_TNK.flatten(1).clamp_min(0), weights_TNK.flatten(1))
    if step.layers is not None:
        step.layers.add(gates.layer, ids_TNK.flatten(1), weights_TNK.flatten(1))
    if step.slot_E is None:
        return ids_TNK, weights_TNK
    return torch.where(ids_TNK >= 0, step.slot_E[ids_TNK.clamp_min(0)], NO_EXPERT), weights_TNK


def _choose(x_TH: Tensor, gates: GroupGates, step: StepRouting) -> tuple[Tensor, Tensor]:
    """Expert ids of the generation, and weights."""
    if not step.gated:
        shape = (-1, gates.num_linears, -1)
        return step.ids_TK[:, None].expand(shape), step.weights_TK[:, None].expand(shape)
    logits_TNE = gates.complete(gate_logits(x_TH, gates.stacked[step.index], gates.num_linears))
    if plan.runs_kernels(x_TH.device):
        chosen = plan.choose(logits_TNE, choice_of(replace(step, slot_E=None)))
        return chosen.slots_TNK, chosen.weights_TNK
    if plan.chooses_compiled(logits_TNE):
        return plan.choose_compiled(logits_TNE, choice_of(step))
    return choose(scores(logits_TNE, step.prototype_E), step)


def scores(logits_TNE: Tensor, prototype_E: Tensor | None) -> Tensor:
    """What experts are ranked by: their logits, and of prototypes the size of theirs."""
    return logits_TNE if prototype_E is None else torch.where(prototype_E, logits_TNE.abs(), logits_TNE)


def choose(logits_TNE: Tensor, step: StepRouting) -> tuple[Tensor, Tensor]:
    """Expert ids and weights, each [T, N, K], of a pass whose gates decide for some tokens or for all.

    Args:
        logits_TNE: The ``scores`` of the generation's experts, for all tokens.
        step: What the requests chose.
    """
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
    # Another generation in use may have more experts, and K be more than this one has.
    logits_TNE = pad(logits_TNE, (0, max(0, step.slots - logits_TNE.shape[-1])), value=float("-inf"))
    unused_T1K = (torch.arange(step.slots, device=logits_TNE.device) >= top_k_T[:, None])[:, None]
    ids_TNK, _ = topk_softmax(logits_TNE, step.slots)
    chosen_TNK = logits_TNE.gather(-1, ids_TNK)
    if step.temperature_T1 is not None:
        chosen_TNK = chosen_TNK / step.temperature_T1[:, None]
    weights_TNK = torch.softmax(chosen_TNK.masked_fill(unused_T1K, float("-inf")), dim=-1)
    return ids_TNK.masked_fill(unused_T1K, NO_EXPERT), weights_TNK
