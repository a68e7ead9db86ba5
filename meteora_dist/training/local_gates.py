"""Fits every gate on its own input, by cross-entropy alone, without a backward pass through the base model.

With one active expert the language-model loss gives gates no gradient at all, and the gate loss of one gate does not
depend on another gate once the routing is forced. So each gate is a linear classifier on the input it sees, and the
frozen model only has to run forward.

Shapes: B sequences, L positions, T = B * L packed tokens, N linears of a group, E experts, P = N * E.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from meteora_dist.moe.gate import gate_logits
from meteora_dist.moe.inject import RoutedModel
from meteora_dist.moe.routing import RoutingChoice, named, plan_step, slots_of
from meteora_dist.training.gate_loss import IGNORE, gate_loss, shifted_labels


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
    def labels_BL(self) -> Tensor:
        """The expert of every token, ``IGNORE`` on padding."""
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
    """Of one batch, before its updates: ``loss`` is L_gate in nats, ``accuracy`` the share of right top-1 choices."""

    loss: float
    accuracy: float


def fit_gates(
    routed: RoutedModel,
    batches: Iterable[GateBatch],
    steps: int,
    fit: LocalFit,
    report: Callable[[int, GateMetrics], None],
) -> dict[str, Tensor]:
    """Fits the gates of ``routed`` in place, from where they stand.

    Args:
        routed: The frozen model with all experts on this rank.
        batches: Labelled sequences.
        steps: How many batches there will be; it shapes the learning rate.
        fit: How.
        report: Called with the batch's number and its metrics.

    Returns:
        The gate of every linear, [E, H], fp32.
    """
    gates = [nn.Parameter(group.gate_PH) for group in routed.groups]
    optimizer = torch.optim.AdamW(gates, lr=fit.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _cosine(steps * fit.updates, fit.warm_up))
    generator = torch.Generator().manual_seed(fit.seed)
    for number, batch in enumerate(batches):
        inputs = capture_inputs(routed, batch)
        kept_T = shifted_labels(batch.labels_BL).flatten() != IGNORE
        report(number, _measure(routed, inputs, gates, batch))
        labels_T = shifted_labels(batch.labels_BL).flatten()[kept_T]
        order_T = torch.randperm(len(labels_T), generator=generator)
        kept_inputs = [x_TH[kept_T] for x_TH in inputs]
        for part in order_T.chunk(fit.updates):
            for group, gate_PH, x_TH in zip(routed.groups, gates, kept_inputs, strict=True):
                logits_TNE = gate_logits(x_TH[part], gate_PH, len(group.names))
                labels_TN = labels_T[part][:, None].expand(logits_TNE.shape[:2])
                nn.functional.cross_entropy(logits_TNE.flatten(0, 1), labels_TN.flatten()).backward()
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


@torch.no_grad()
def _measure(routed: RoutedModel, inputs: list[Tensor], gates: list[nn.Parameter], batch: GateBatch) -> GateMetrics:
    shape = batch.ids_BL.shape
    logits_BLE = [
        logits_TE.unflatten(0, shape)
        for group, gate_PH, x_TH in zip(routed.groups, gates, inputs, strict=True)
        for logits_TE in gate_logits(x_TH, gate_PH, len(group.names)).unbind(1)
    ]
    labels_BL = shifted_labels(batch.labels_BL)
    right = [(logits.argmax(-1) == labels_BL)[labels_BL != IGNORE].float().mean() for logits in logits_BLE]
    return GateMetrics(float(gate_loss(logits_BLE, batch.labels_BL)), float(torch.stack(right).mean()))


def _cosine(steps: int, warm_up: float) -> Callable[[int], float]:
    warm_steps = max(1, round(warm_up * steps))

    def factor(step: int) -> float:
        return min((step + 1) / warm_steps, 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0))))

    return factor
