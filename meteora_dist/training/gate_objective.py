"""The objective of MeteoRA (arXiv 2405.13053): gates learn which expert a token belongs to.

    L = L_LM + beta * L_gate

L_gate is the mean cross-entropy of raw fp32 gate logits against the expert of each position that counts, over all
gates and positions, shifted like the labels of L_LM. With K = 1 weights are constant: L_LM has no gradient there.

Shapes: B sequences, L positions, T = B * L, G gates, E experts, K slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from meteora_dist.bank import Bank
from meteora_dist.moe.inject import inject
from meteora_dist.moe.layer import RoutedGroup
from meteora_dist.moe.routing import RoutingChoice, StepRouting, named, plan_step, slots_of
from meteora_dist.training.data import Batch
from meteora_dist.training.gate_loss import IGNORE, shifted_labels
from meteora_dist.training.objective import Gather, Objective, ParameterGroup, Sums
from meteora_dist.training.settings import GateSettings
from meteora_dist.training.trained_group import GroupTraining, Pass, Tap, TrainedGroup


class GateObjective(Objective):
    """A frozen base model with the experts of a bank, and gates that are trained.

    Attributes:
        settings: The gates' options.
        groups: Routed groups, in the order a pass meets them.
        gates: Names of the G gated linears, in that order.
    """

    def __init__(
        self, model: PreTrainedModel, bank: Bank, trained: int, settings: GateSettings, dtype: torch.dtype
    ) -> None:
        """Routes ``model`` through ``bank``.

        Args:
            model: Frozen; changed in place.
            bank: The experts, and the gates that training starts from.
            trained: How many experts, the last of the bank, have their gate rows trained.
            settings: The gates' options.
            dtype: The experts compute in.

        Raises:
            CheckpointError: The bank does not fit the model.
        """
        super().__init__()
        self.settings = settings
        prototypes = torch.tensor(bank.prototypes, device=model.device) if any(bank.prototypes) else None
        training = GroupTraining(
            trained=trained,
            local=settings.objective == "local",
            experts=tuple(range(len(bank.names))) if settings.lora_learning_rate is not None else (),
            lora_dropout=settings.lora_dropout,
            prototype_E=prototypes,
        )
        self._taps: list[Tap] = []

        def tapped(group: RoutedGroup) -> Tap:
            self._taps.append(Tap(TrainedGroup(group, training)))
            return self._taps[-1]

        self.model = inject(model, bank, dtype, before=tapped).model
        self.groups = nn.ModuleList(tap.group for tap in self._taps)
        self.gates = tuple(name for tap in self._taps for name in tap.names)
        self._experts = bank.names
        self._beta = 1.0 if training.local else settings.beta

    def counts(self, batch: Batch) -> tuple[int, ...]:
        """See ``Objective``: positions."""
        return (batch.counted,)

    def forward(self, batch: Batch, scales: Sequence[float]) -> tuple[Tensor, Sums]:
        """See ``Objective``."""
        under_way = Pass(self._route(batch), shifted_labels(batch.expert_labels).flatten())
        for tap in self._taps:
            tap.under_way = under_way
        lm = self._pass(batch)
        under_way.measuring = False
        loss_G, right_G = (torch.cat(parts) for parts in zip(*under_way.measured, strict=True))
        under_way.measured.clear()
        loss = self._beta * loss_G.mean()
        sums = {
            "counted": loss_G.new_tensor([float(batch.counted)]),
            "gate_loss": loss_G.detach(),
            "gate_right": right_G,
        }
        if lm is not None:
            loss = loss + lm
            sums["lm_loss"] = lm.detach()[None]
        return scales[0] * loss, sums

    def parameter_groups(self) -> list[ParameterGroup]:
        """See ``Objective``: the gates at the loop's rate, the adapters at their own."""
        found = [ParameterGroup([tap.group.trained_NAH for tap in self._taps])]
        loras = [tap.group.lora for tap in self._taps if tap.group.lora is not None]
        return [*found, ParameterGroup(loras, self.settings.lora_learning_rate)] if loras else found

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """See ``Objective``: loss, its terms, and each gate's cross-entropy and accuracy by layer and by linear."""
        counted = sums["counted"].clamp_min(1)
        ce_G, accuracy_G = sums["gate_loss"] / counted, sums["gate_right"] / counted
        found = {"loss": self._beta * float(ce_G.mean()), "gate_ce": float(ce_G.mean())}
        found["gate_accuracy"] = float(accuracy_G.mean())
        if "lm_loss" in sums:
            found["lm_loss"] = float(sums["lm_loss"] / counted)
            found["loss"] += found["lm_loss"]
        for section, gates in self._sections().items():
            found[f"gate_ce/{section}"] = float(ce_G[gates].mean())
            found[f"gate_accuracy/{section}"] = float(accuracy_G[gates].mean())
        return found

    def export(self, gather: Gather) -> dict[str, Tensor]:
        """See ``Objective``: ``gate.<linear>`` [A, H]; with joint training ``lora.<expert>.<linear>.a`` and ``.b``."""
        found: dict[str, Tensor] = {}
        for tap in self._taps:
            rows_NAH = gather(tap.group.trained_NAH).cpu()
            found |= {f"gate.{name}": rows_AH.clone() for name, rows_AH in zip(tap.names, rows_NAH, strict=True)}
            found |= tap.group.export(self._experts, gather)
        return found

    def _route(self, batch: Batch) -> StepRouting:
        """Forced tokens run with the expert that their gates are to name, which is that of the next token."""
        auto = RoutingChoice(top_k=self.settings.top_k)
        choices: list[RoutingChoice] = []
        lengths: list[int] = []
        for experts_L, forced in zip(batch.experts_BL.cpu(), batch.forced, strict=True):
            if not forced:
                choices, lengths = [*choices, auto], [*lengths, len(experts_L)]
                continue
            runs = torch.cat([experts_L[1:], experts_L[-1:]]).unique_consecutive(return_counts=True)
            for expert, length in zip(*(run.tolist() for run in runs), strict=True):
                choices, lengths = [*choices, named(expert)], [*lengths, length]
        experts = len(self._experts)
        with batch.ids_BL.device:
            return plan_step(choices, lengths, experts, slots_of(choices, experts))

    def _pass(self, batch: Batch) -> Tensor | None:
        """Runs the model; the sum of its cross-entropies over positions that count, in nats, where it is asked for."""
        inputs = {"input_ids": batch.ids_BL, "attention_mask": batch.mask_BL, "use_cache": False}
        if not self.settings.lm:
            self.model.get_decoder()(**inputs)
            return None
        logits_BLV = self.model(**inputs).logits
        labels_BL = shifted_labels(batch.token_labels)
        return cross_entropy(
            logits_BLV.flatten(0, 1).float(), labels_BL.flatten(), ignore_index=IGNORE, reduction="sum"
        )

    def _sections(self) -> dict[str, list[int]]:
        """Indices of the gates of every layer and of every kind of linear."""
        sections: dict[str, list[int]] = {}
        for index, name in enumerate(self.gates):
            sections.setdefault(f"linear/{name.rpartition('.')[2]}", []).append(index)
            layer = next((part for part in name.split(".") if part.isdigit()), None)
            if layer is not None:
                sections.setdefault(f"layer/{layer}", []).append(index)
        return sections
