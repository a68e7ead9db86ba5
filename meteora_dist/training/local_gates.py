"""Fits every gate on its own input, by cross-entropy alone, without a backward pass through the base model.

With one active expert the language-model loss gives gates no gradient at all, and the gate loss of one gate does not
depend on another gate once the routing is forced. So each gate is a linear classifier on the input it sees, and the
frozen model only has to run forward.

Shapes: B sequences, L positions, T = B * L packed tokens, N linears of a group, E experts, P = N * E.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from meteora_dist.moe.gate import gate_logits
from meteora_dist.moe.layer import RoutedGroup
from meteora_dist.moe.routed_model import RoutedModel
from meteora_dist.moe.routing import RoutingChoice, named, plan_step, slots_of
from meteora_dist.training.gate_loss import IGNORE, shifted_labels, token_gate_loss


@dataclass(frozen=True, slots=True)
class GateBatch:
    """Sequences whose tokens belong to known experts.

    Attributes:
        ids_BL: Token ids, padded on the right.
        mask_BL: 1 for a token, 0 for padding.
        experts: The expert of each sequence.
        forced: Whether each sequence runs with its own expert; otherwise the gates route it, as they will in use.
    """

    ids_BL: Tensor
    mask_BL: Tensor
    experts: tuple[int, ...]
    forced: tuple[bool, ...]

    @property
    def labels(self) -> Tensor:
        """The expert of every token, [B, L], ``IGNORE`` on padding."""
        return torch.tensor(self.experts)[:, None].expand_as(self.ids_BL).masked_fill(self.mask_BL == 0, IGNORE)


@dataclass(frozen=True, slots=True)
class LocalFit:
    """How gates are fitted.

    Attributes:
        learning_rate: Peak rate of AdamW; cosine to 0 after the warm-up.
        warm_up: Share of the steps with a rising rate.
        updates: Optimiser steps on each batch, each on its own random part of the tokens.
        seed: Of the parts' order.
    """

    learning_rate: float = 7e-3
    warm_up: float = 0.05
    updates: int = 4
    seed: int = 0


@dataclass(frozen=True, slots=True)
class GateMetrics:
    """Of one step, before its updates: ``loss`` is L_gate in nats, ``accuracy`` the share of right top-1 choices."""

    loss: float
    accuracy: float


def fit_gates(
    routed: RoutedModel,
    steps: Sequence[Sequence[GateBatch]],
    fit: LocalFit,
    report: Callable[[int, GateMetrics], None],
) -> dict[str, Tensor]:
    """Fits the gates of ``routed`` in place, from where they stand.

    Args:
        routed: The frozen model with all experts on this rank.
        steps: The batches of every step; a step learns from all its batches at once.
        fit: How.
        report: Called with the step's number and its metrics.

    Returns:
        The gate of every linear, [E, H], fp32.
    """
    gates = [nn.Parameter(_gate(group)) for group in routed.groups]
    optimizer = torch.optim.AdamW(gates, lr=fit.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _cosine(len(steps) * fit.updates, fit.warm_up))
    generator = torch.Generator().manual_seed(fit.seed)
    for number, batches in enumerate(steps):
        captured = [capture_inputs(routed, batch) for batch in batches]
        targets = [shifted_labels(batch.labels).flatten() for batch in batches]
        labels_T = torch.cat([labels[labels != IGNORE] for labels in targets])
        inputs = [
            torch.cat([x_TH[labels != IGNORE] for x_TH, labels in zip(parts, targets, strict=True)])
            for parts in zip(*captured, strict=True)
        ]
        report(number, _measure(routed, inputs, labels_T))
        for part in torch.randperm(len(labels_T), generator=generator).chunk(fit.updates):
            for group, gate_PH, x_TH in zip(routed.groups, gates, inputs, strict=True):
                _gate_loss_of(group, gate_PH, x_TH[part], labels_T[part]).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
    return {
        name: gate_EH.detach().clone()
        for group, gate_PH in zip(routed.groups, gates, strict=True)
        for name, gate_EH in zip(group.names, gate_PH.chunk(len(group.names)), strict=True)
    }


@torch.no_grad()
def capture_inputs(routed: RoutedModel, batch: GateBatch) -> list[Tensor]:
    """Runs the batch forward and returns what every group read, x_TH, in the order of ``routed.groups``."""
    inputs: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Tensor]) -> None:
        inputs.append(arguments[0])

    choices = [
        named(expert) if forced else RoutingChoice() for expert, forced in zip(batch.experts, batch.forced, strict=True)
    ]
    lengths = [batch.ids_BL.shape[1]] * len(choices)
    step = plan_step(choices, lengths, routed.num_experts, slots_of(choices, routed.num_experts))
    hooks = [group.register_forward_pre_hook(keep) for group in routed.groups]
    try:
        with routed.context.routed(step):
            routed.model.get_decoder()(input_ids=batch.ids_BL, attention_mask=batch.mask_BL, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


def _gate(group: RoutedGroup) -> Tensor:
    """The group's stacked gates gate_PH; training knows one generation."""
    (gate_PH,) = group.state.gates
    return gate_PH


def _gate_loss_of(group: RoutedGroup, gate_PH: Tensor, x_TH: Tensor, labels_T: Tensor) -> Tensor:
    """L_gate of one group's gates; its gradient at each gate does not depend on the other groups."""
    logits_TNE = gate_logits(x_TH, gate_PH, len(group.names))
    return token_gate_loss(logits_TNE.unbind(1), labels_T)


@torch.no_grad()
def _measure(routed: RoutedModel, inputs: list[Tensor], labels_T: Tensor) -> GateMetrics:
    logits_TE = [
        logits
        for group, x_TH in zip(routed.groups, inputs, strict=True)
        for logits in gate_logits(x_TH, _gate(group), len(group.names)).unbind(1)
    ]
    right = torch.stack([(logits.argmax(-1) == labels_T).float().mean() for logits in logits_TE])
    return GateMetrics(float(token_gate_loss(logits_TE, labels_T)), float(right.mean()))


def _cosine(steps: int, warm_up: float) -> Callable[[int], float]:
    warm_steps = max(1, round(warm_up * steps))

    def factor(step: int) -> float:
        return min((step + 1) / warm_steps, 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0))))

    return factor
