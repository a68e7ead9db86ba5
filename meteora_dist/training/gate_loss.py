"""The gate loss of MeteoRA: every gate learns to name the expert its token belongs to.

Shapes: B sequences, L positions, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

IGNORE = -100
"""Label of a position that does not count."""


def shifted_labels(labels_BL: Tensor) -> Tensor:
    """Labels [B, L] against which the logits at each position stand: those of the next one, ``IGNORE`` at the end."""
    return torch.cat([labels_BL[:, 1:], torch.full_like(labels_BL[:, :1], IGNORE)], dim=1)


def gate_loss(logits_BLE: Iterable[Tensor], labels_BL: Tensor) -> Tensor:
    """``L_gate``: mean cross-entropy of raw gate logits over all gates and all positions that count.

    All gates share the labels, so the mean over gates and positions is the mean of the gates' means. Logits at t
    stand against labels at t + 1, as in the language-model loss (reference code of arXiv 2405.13053).

    Args:
        logits_BLE: One tensor [B, L, E] a gate.
        labels_BL: Expert id of every position, ``IGNORE`` where it does not count.

    Returns:
        A scalar, fp32, in nats; ln E for gates that are all zero.
    """
    labels_T = shifted_labels(labels_BL).flatten()
    losses = [cross_entropy(logits.flatten(0, 1).float(), labels_T, ignore_index=IGNORE) for logits in logits_BLE]
    return torch.stack(losses).mean()
