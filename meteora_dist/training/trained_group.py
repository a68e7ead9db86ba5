"""A routed group whose gates are trained, and if asked for its experts: what stands before it while a model trains.

It routes by gates of its own, parameters that DeepSpeed sees and may shard, and measures what they say.

Shapes: T tokens, H input width, N linears that share it, E experts, A of them with trained rows, the last ones, F = E -
A others, K slots, O_n output widths, R rank.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout

from meteora_dist.moe.gate import choose, gate_logits, scores
from meteora_dist.moe.layer import RoutedGroup
from meteora_dist.moe.routing import StepRouting
from meteora_dist.training.gate_loss import IGNORE
from meteora_dist.training.trained_experts import GroupExperts


@dataclass(frozen=True, slots=True)
class GroupTraining:
    """How a group is trained.

    Attributes:
        trained: A.
        local: Whether gates are fitted on detached inputs, and the deltas carry no gradient.
        experts: Which experts are trained too.
        lora_dropout: Before the experts, not before the gates.
        prototype_E: See ``LiveGeneration``.
    """

    trained: int
    local: bool = False
    experts: tuple[int, ...] = ()
    lora_dropout: float = 0.0
    prototype_E: Tensor | None = None


class TrainedGroup(GroupExperts):
    """Routes and computes a group's deltas, and tells how well each of its gates named the experts."""

    frozen_NFH: Tensor

    def __init__(self, group: RoutedGroup, training: GroupTraining) -> None:
        """Takes gates, and if they are to be trained experts, from ``group``, which has one generation."""
        super().__init__(group, training.experts)
        self.how = training
        gate_NEH = group.state.gates[0].unflatten(0, (len(group.names), -1))
        frozen = gate_NEH.shape[1] - training.trained
        self.register_buffer("frozen_NFH", gate_NEH[:, :frozen].clone())
        self.trained_NAH = nn.Parameter(gate_NEH[:, frozen:].clone())
        group.state = replace(group.state, gates=())

    def forward(self, x_TH: Tensor, step: StepRouting, labels_T: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Deltas and measures.

        Args:
            x_TH: The linears' shared input.
            step: How the pass is routed.
            labels_T: Expert that each position must name, already shifted; ``IGNORE`` where it does not count.

        Returns:
            The N deltas [T, O_n], each gate's sum of cross-entropies [N] in nats, and its number of right choices [N].
        """
        gate_PH = torch.cat([self.frozen_NFH, self.trained_NAH], dim=1).flatten(0, 1)
        seen_TH = x_TH.detach() if self.how.local else x_TH
        logits_TNE = scores(gate_logits(seen_TH, gate_PH, len(self.names)), self.how.prototype_E)
        with torch.no_grad() if self.how.local else nullcontext():
            slots_TNK, weights_TNK = choose(logits_TNE, step)
            dropped_TH = dropout(x_TH, self.how.lora_dropout, self.training)
            deltas = self.deltas(dropped_TH, slots_TNK, weights_TNK)
        # All of it leaves as output: there ZeRO stage 3 hooks the gathering for the backward pass.
        return deltas, *measure(logits_TNE, labels_T)


def measure(logits_TNE: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    """Each gate's sum of cross-entropies of raw logits, in nats, and its number of right top-1 choices, both [N]."""
    labels_TN = labels_T[:, None].expand(logits_TNE.shape[:2])
    # Experts last: a softmax over another dimension takes several times as long on a CPU.
    losses = cross_entropy(logits_TNE.flatten(0, 1), labels_TN.flatten(), ignore_index=IGNORE, reduction="none")
    right_TN = logits_TNE.detach().argmax(-1) == labels_TN
    return losses.view_as(labels_TN).sum(0), right_TN.sum(0).float()


@dataclass(slots=True)
class Pass:
    """The pass under way: what every group of a model needs to know, and where it leaves what it measured.

    Layers that are run again in the backward pass read it once more, so it stays until the next pass begins.

    Attributes:
        step: How the pass is routed.
        labels_T: See ``TrainedGroup.forward``.
        measured: Losses and right choices of the groups called so far.
        measuring: Whether groups are called for the first time.
    """

    step: StepRouting
    labels_T: Tensor
    measured: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    measuring: bool = True


class Tap:
    """What the linears get their deltas from: calls the trained group and keeps what it measured."""

    def __init__(self, group: TrainedGroup) -> None:
        """Stands before ``group``; ``under_way`` is set before each pass."""
        self.group = group
        self.under_way: Pass | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """See ``RoutedGroup``."""
        return self.group.names

    def __call__(self, x_TH: Tensor) -> tuple[Tensor, ...]:
        """See ``RoutedGroup.forward``."""
        under_way = self.under_way
        assert under_way is not None, "a trained group is called within a pass of its objective"
        deltas: tuple[Tensor, ...]
        deltas, loss_N, right_N = self.group(x_TH, under_way.step, under_way.labels_T)
        if under_way.measuring:
            under_way.measured.append((loss_N, right_N))
        return deltas
