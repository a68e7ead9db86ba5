"""The objective of Mixture-of-LoRAs (Feng et al., arXiv 2403.03432): routers and LoRAs, trained together.

    L = L_LM + eta * mean over layers of CE(router logits, domain)

Every sequence runs with its own domain's expert, several domains in one pass. Only trained experts have parameters: the
LoRAs and router rows of the others are buffers, and the sequences of their domains teach the trained rows what not to
choose. L_LM is the mean over the answers' tokens of trained experts, the routers' term the mean over sequences.

Shapes: B sequences, L positions, D decoder layers, E experts, A of them trained, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from meteora_dist.bank import Bank
from meteora_dist.moe.inject import inject
from meteora_dist.moe.layer import RoutedGroup
from meteora_dist.moe.routers import Span, decoder_layers, elect, pooled_states, router_logits
from meteora_dist.moe.routing import StepRouting, named, plan_step
from meteora_dist.training.data import Batch
from meteora_dist.training.gate_loss import IGNORE, shifted_labels
from meteora_dist.training.objective import Gather, Objective, ParameterGroup, Sums
from meteora_dist.training.settings import MoaSettings
from meteora_dist.training.trained_experts import GroupExperts


def router_losses(logits_DBE: Tensor, experts_B: Tensor) -> Tensor:
    """Cross-entropy of router logits against each sequence's expert, mean over the D layers: [B], fp32, in nats."""
    labels_DB = experts_B.expand(logits_DBE.shape[:2])
    losses_DB = cross_entropy(logits_DBE.float().movedim(2, 1), labels_DB, reduction="none")
    return losses_DB.mean(0)


class NamedExperts(GroupExperts):
    """A group in which every token has the expert of its sequence."""

    def forward(self, x_TH: Tensor, step: StepRouting) -> tuple[Tensor, ...]:
        """The N deltas [T, O_n] of the linears' shared input."""
        shape = (-1, len(self.names), -1)
        return self.deltas(x_TH, step.ids_TK[:, None].expand(shape), step.weights_TK[:, None].expand(shape))


class _Tap:
    """What the linears get their deltas from; ``step`` is set before each pass, None for one without experts."""

    def __init__(self, group: RoutedGroup, trained: Sequence[int]) -> None:
        self.group = NamedExperts(group, trained)
        self.step: StepRouting | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """See ``RoutedGroup``."""
        return self.group.names

    def __call__(self, x_TH: Tensor) -> tuple[Tensor, ...] | None:
        """See ``RoutedGroup.forward``."""
        if self.step is None:
            return None
        deltas: tuple[Tensor, ...] = self.group(x_TH, self.step)
        return deltas


class MoaObjective(Objective):
    """A frozen base model with the experts of a bank; routers, and LoRAs if wanted, of the trained ones are parameters.

    Held-out rows are judged as routers vote in use: on the base model's states; their language-model loss is that of
    every expert, trained or not.

    Attributes:
        settings: What is learned.
        trained: Indices of the trained experts, rising.
        rows_DAH: The trained experts' router rows.
    """

    frozen_DEH: Tensor
    absent_E: Tensor

    def __init__(
        self, model: PreTrainedModel, bank: Bank, trained: Sequence[int], settings: MoaSettings, dtype: torch.dtype
    ) -> None:
        """Starts from the bank as it is; an expert without router rows starts from zeros.

        Args:
            model: Frozen; changed in place.
            bank: Experts, and routers if it has some.
            trained: Indices of the trained experts.
            settings: What is learned.
            dtype: The experts compute in.

        Raises:
            CheckpointError: The bank does not fit the model.
        """
        super().__init__()
        self.settings = settings
        self.trained = tuple(sorted(trained))
        self._joint = settings.lora_learning_rate is not None
        self._taps: list[_Tap] = []

        def tapped(group: RoutedGroup) -> _Tap:
            self._taps.append(_Tap(group, self.trained if self._joint else ()))
            return self._taps[-1]

        routed = inject(model, bank, dtype, before=tapped)
        self.model = model
        self.groups = nn.ModuleList(tap.group for tap in self._taps)
        self._names = bank.names
        self._layers = tuple(decoder_layers(model))
        routers = next(iter(routed.routers.values()), None)
        shape = len(self._layers), len(bank.names), model.config.get_text_config().hidden_size
        router_DEH = torch.zeros(shape, device=model.device) if routers is None else routers.weights_LEH.clone()
        self.rows_DAH = nn.Parameter(router_DEH[:, list(self.trained)].clone())
        self.register_buffer("frozen_DEH", router_DEH)
        routable = {index for index, entry in enumerate(bank.manifest.experts) if entry.router == "trained"}
        absent = [index not in routable | set(self.trained) for index in range(len(bank.names))]
        self.register_buffer("absent_E", torch.tensor(absent, device=router_DEH.device))

    def counts(self, batch: Batch) -> tuple[int, ...]:
        """See ``Objective``: answer tokens of trained LoRAs, and sequences."""
        tokens_B = _tokens(batch) * self._taught(batch)
        return int(tokens_B.sum()), int(_real(batch).sum())

    def forward(self, batch: Batch, scales: Sequence[float]) -> tuple[Tensor, Sums]:
        """See ``Objective``."""
        by_expert = self.settings.router_input == "expert" and self.training
        real_B, taught_B = _real(batch), self._taught(batch) if self.training else _real(batch)
        lm_B = taught_B.new_zeros(len(taught_B), dtype=torch.float32)
        if by_expert:
            lm_B, pooled_DBH = self._language_losses(batch, pooled=True)
        else:
            pooled_DBH = self._base_states(batch)
            if self._joint or not self.training:
                # Workers must make the same passes, so one without a row that counts passes one that does not.
                kept_K = taught_B.nonzero()[:, 0] if taught_B.any() else taught_B.new_zeros(1, dtype=torch.long)
                lm_B = lm_B.index_put((kept_K,), self._language_losses(batch.rows(kept_K))[0])
        lm_B = lm_B * taught_B
        logits_DBE = router_logits(pooled_DBH, self._routers()).masked_fill(self.absent_E, float("-inf"))
        router_B = router_losses(logits_DBE, batch.experts_BL[:, 0]) * real_B
        loss = scales[0] * lm_B.sum() + scales[1] * self.settings.eta * router_B.sum()
        return loss, self._sums(batch, lm_B.detach(), taught_B, router_B.detach(), logits_DBE.argmax(-1))

    def parameter_groups(self) -> list[ParameterGroup]:
        """See ``Objective``: router rows at the loop's rate, LoRAs at their own."""
        found = [ParameterGroup([self.rows_DAH])]
        loras = [tap.group.lora for tap in self._taps if tap.group.lora is not None]
        return [*found, ParameterGroup(loras, self.settings.lora_learning_rate)] if loras else found

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """See ``Objective``: loss, its terms and how often the vote is right, by layer and by expert."""
        rows_E, tokens_E = sums["rows_E"], sums["tokens_E"]
        rows = rows_E.sum().clamp_min(1)
        found = {"router_ce": float(sums["router_E"].sum() / rows)}
        found["router_accuracy"] = float(sums["right_D"].mean() / rows)
        found |= {f"{rule}_accuracy": float(sums[f"{rule}_E"].sum() / rows) for rule in ("majority", "last")}
        found["loss"] = self.settings.eta * found["router_ce"]
        if tokens_E.any():
            found["lm_loss"] = float(sums["lm_E"].sum() / tokens_E.sum())
            found["loss"] += found["lm_loss"]
            perplexities = (sums["lm_E"] / tokens_E.clamp_min(1)).exp()[tokens_E > 0]
            found["perplexity"] = float(perplexities.mean())
        found |= {f"router_accuracy/layer/{d}": float(right / rows) for d, right in enumerate(sums["right_D"])}
        for e in rows_E.nonzero()[:, 0].tolist():
            part = f"expert/{self._names[e]}"
            found |= {f"{name}/{part}": float(sums[f"{key}_E"][e] / rows_E[e]) for name, key in _BY_EXPERT.items()}
            if tokens_E[e]:
                found[f"perplexity/{part}"] = math.exp(float(sums["lm_E"][e] / tokens_E[e]))
        return found

    def export(self, gather: Gather) -> dict[str, Tensor]:
        """See ``Objective``: ``router.<layer>`` [A, H], and trained pairs as ``GroupExperts.export`` names them."""
        rows_DAH = gather(self.rows_DAH).cpu()
        found = {f"router.{layer}": rows_AH.clone() for layer, rows_AH in zip(self._layers, rows_DAH, strict=True)}
        for tap in self._taps:
            found |= tap.group.export(self._names, gather)
        return found

    def _routers(self) -> Tensor:
        """The routers of all layers as they are now, [D, E, H], fp32."""
        return self.frozen_DEH.index_copy(1, torch.tensor(self.trained, device=self.rows_DAH.device), self.rows_DAH)

    def _taught(self, batch: Batch) -> Tensor:
        """Whether the answer of a sequence counts: where its expert's LoRA is trained, [B]."""
        experts = self.trained if self._joint else ()
        return _real(batch) & torch.isin(batch.experts_BL[:, 0], batch.experts_BL.new_tensor(experts))

    def _language_losses(self, batch: Batch, pooled: bool = False) -> tuple[Tensor, Tensor]:
        """Each sequence runs with its own expert.

        Returns:
            Sum of every answer's cross-entropies [B], and if ``pooled`` the router inputs [D, B, H] of the same pass,
            with their gradient.
        """
        choices = [named(expert) for expert in batch.experts_BL[:, 0].tolist()]
        length = batch.ids_BL.shape[1]
        with batch.ids_BL.device:
            step = plan_step(choices, [length] * len(choices), len(self._names), 1)
        spans = self._spans(batch, length) if pooled else []
        with pooled_states(self.model, spans) as taken:
            hidden_BLH = self._decode(batch.ids_BL, batch.mask_BL, step)
        labels_BL = shifted_labels(batch.token_labels)
        answers_BL = labels_BL != IGNORE
        logits_TV = self.model.get_output_embeddings()(hidden_BLH[answers_BL]).float()
        losses_T = cross_entropy(logits_TV, labels_BL[answers_BL], reduction="none")
        lm_B = losses_T.new_zeros(len(choices)).index_add(0, answers_BL.nonzero()[:, 0], losses_T)
        return lm_B, self._mean(torch.stack(taken), batch) if pooled else losses_T.new_empty(0)

    @torch.no_grad()
    def _base_states(self, batch: Batch) -> Tensor:
        """The pooled router inputs [D, B, H] of the prompts, as they are when routers vote: no expert is at work."""
        longest = int(_prompts(batch).max())
        with pooled_states(self.model, self._spans(batch, longest)) as taken:
            self._decode(batch.ids_BL[:, :longest], batch.mask_BL[:, :longest], None)
        return self._mean(torch.stack(taken), batch)

    def _decode(self, ids_BL: Tensor, mask_BL: Tensor, step: StepRouting | None) -> Tensor:
        for tap in self._taps:
            tap.step = step
        decoder = self.model.get_decoder()
        hidden_BLH: Tensor = decoder(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).last_hidden_state
        return hidden_BLH

    def _spans(self, batch: Batch, length: int) -> list[Span]:
        prompts = _prompts(batch).tolist()
        return [Span(b * length, prompt, self.settings.pooling) for b, prompt in enumerate(prompts)]

    def _mean(self, pooled_DBH: Tensor, batch: Batch) -> Tensor:
        return pooled_DBH if self.settings.pooling == "last" else pooled_DBH / _prompts(batch)[:, None]

    def _sums(self, batch: Batch, lm_B: Tensor, taught_B: Tensor, router_B: Tensor, votes_DB: Tensor) -> Sums:
        experts_B, real_B = batch.experts_BL[:, 0], _real(batch)
        ballots = votes_DB.T.tolist()
        majority_B, last_B = (
            experts_B.new_tensor([elect(ballot, rule) for ballot in ballots]) == experts_B
            for rule in ("majority", "last")
        )
        per_row = {"lm": lm_B, "tokens": _tokens(batch) * taught_B, "router": router_B, "rows": real_B}
        per_row |= {"majority": majority_B & real_B, "last": last_B & real_B}
        zeros_E = router_B.new_zeros(len(self._names))
        sums = {f"{name}_E": zeros_E.index_add(0, experts_B, of_B.float()) for name, of_B in per_row.items()}
        return sums | {"right_D": ((votes_DB == experts_B) & real_B).sum(1).float()}


_BY_EXPERT = {"router_ce": "router", "majority_accuracy": "majority", "last_accuracy": "last"}


def _real(batch: Batch) -> Tensor:
    """Whether a sequence counts, [B]: the others fill up batches."""
    return batch.counted_BL.any(1)


def _tokens(batch: Batch) -> Tensor:
    """Answer tokens of every sequence, [B]."""
    return batch.counted_BL[:, 1:].sum(1)


def _prompts(batch: Batch) -> Tensor:
    """Tokens of every prompt, [B]; 1 for a filler."""
    return batch.counted_BL.int().argmax(1).clamp_min(1)
