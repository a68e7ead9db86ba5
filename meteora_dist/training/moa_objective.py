"""The objective of Mixture-of-LoRAs (Feng et al., arXiv 2403.03432): routers and LoRAs, trained together.

    L = L_LM + eta * mean over layers of CE(router logits, domain)

Every sequence runs with its own domain's expert, several domains in one pass. Only trained experts have parameters: the
LoRAs and router rows of the others are buffers, and the sequences of their domains teach the trained rows what not to
choose.

Shapes: B sequences, L positions, D decoder layers, E experts, A of them trained, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from meteora_dist.bank import Bank
from meteora_dist.bank.manifest import Pooling
from meteora_dist.config import StrictModel
from meteora_dist.moe.routed_model import RoutedModel
from meteora_dist.moe.routers import Span, decoder_layers, pooled_states, router_logits
from meteora_dist.moe.routing import named, plan_step
from meteora_dist.training.gate_loss import IGNORE, shifted_labels
from meteora_dist.training.moa_data import DomainBatch


class MoaSettings(StrictModel):
    """What is learned, and from what.

    Attributes:
        eta: Weight of the routers' loss.
        pooling: What of a prompt routers read; the bank will say so.
        router_input: Whose hidden states routers learn from: the ``base`` model's, which is what they see when they
            vote; or, in the one pass of the paper, those with the labelled ``expert`` at work, so that the routers'
            loss reaches the LoRAs of the layers below as well.
        train_loras: Whether the experts' matrices are trained; otherwise their routers alone.
    """

    eta: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    pooling: Pooling = "last"
    router_input: Literal["base", "expert"] = "base"
    train_loras: bool = True


@dataclass(frozen=True, slots=True)
class MoaSums:
    """What a batch comes to, sequence by sequence.

    Attributes:
        lm_B: Sum of the answer's cross-entropies in nats; 0 where no LoRA is trained.
        tokens_B: Answer tokens in it.
        router_B: The routers' cross-entropy, mean over layers, in nats.
        right_DB: Whether each layer's router names the expert.
        experts: The expert of each sequence.
    """

    lm_B: Tensor
    tokens_B: Tensor
    router_B: Tensor
    right_DB: Tensor
    experts: tuple[int, ...]


def router_losses(logits_DBE: Tensor, experts_B: Tensor) -> Tensor:
    """Cross-entropy of router logits against each sequence's expert, mean over the D layers: [B], fp32, in nats."""
    labels_DB = experts_B.expand(logits_DBE.shape[:2])
    losses_DB = cross_entropy(logits_DBE.float().movedim(2, 1), labels_DB, reduction="none")
    return losses_DB.mean(0)


class MoaObjective(nn.Module):
    """A frozen base model with the experts of a bank; routers, and LoRAs if wanted, of the trained ones are parameters.

    Attributes:
        settings: What is learned.
        trained: Indices of the trained experts, rising.
        rows_DAH: The trained experts' router rows.
    """

    frozen_DEH: Tensor
    absent_E: Tensor

    def __init__(self, routed: RoutedModel, bank: Bank, trained: Sequence[int], settings: MoaSettings) -> None:
        """Starts from the bank as it is; an expert without router rows starts from zeros.

        Args:
            routed: The bank's only generation, injected into a frozen base model in this process.
            bank: The bank.
            trained: Indices of the trained experts.
            settings: What is learned.
        """
        super().__init__()
        self.settings = settings
        self.trained = tuple(sorted(trained))
        self._routed = routed
        router_DEH = _routers(routed, bank)
        self.rows_DAH = nn.Parameter(router_DEH[:, list(self.trained)].clone())
        self.register_buffer("frozen_DEH", router_DEH)
        routable = {index for index, entry in enumerate(bank.manifest.experts) if entry.router == "trained"}
        absent = [index not in routable | set(self.trained) for index in range(len(bank.names))]
        self.register_buffer("absent_E", torch.tensor(absent, device=router_DEH.device))
        self._pairs = nn.ParameterDict()
        if settings.train_loras:
            for key, matrix in self._trained_matrices():
                self._pairs[key] = nn.Parameter(matrix.float().clone())
        self._stacks = tuple(group.state.stack for group in routed.groups)

    @property
    def routers(self) -> Tensor:
        """The routers of all layers as they are now, [D, E, H], fp32."""
        return self.frozen_DEH.index_copy(1, torch.tensor(self.trained, device=self.rows_DAH.device), self.rows_DAH)

    def router_parameters(self) -> list[nn.Parameter]:
        """Trained router rows."""
        return [self.rows_DAH]

    def lora_parameters(self) -> list[nn.Parameter]:
        """Trained matrices; empty when LoRAs are not trained."""
        return list(self._pairs.values())

    def pair(self, linear: str, expert: int) -> tuple[Tensor, Tensor] | None:
        """a_RH and b_OR, fp32, of a trained expert at a linear; None where they are not trained."""
        for g, group in enumerate(self._routed.groups):
            if linear in group.names:
                names = [_key(g, expert, group.names.index(linear), which) for which in "ab"]
                if names[0] in self._pairs:
                    a_RH, b_RO = (self._pairs[name].detach() for name in names)
                    return a_RH, b_RO.T
        return None

    def forward(self, batch: DomainBatch) -> MoaSums:
        """What the batch comes to; gradients reach the parameters through ``lm_B`` and ``router_B``."""
        by_expert = self.settings.router_input == "expert"
        kept = [b for b, expert in enumerate(batch.experts) if by_expert or expert in self.trained]
        lm_B, pooled_DBH = batch.ids_BL.new_zeros(len(batch.experts), dtype=torch.float32), None
        if kept and (self.settings.train_loras or by_expert):
            self.install()
            own = batch.rows(kept)
            lm_K, pooled_DBH = self.language_losses(own, pooled=by_expert)
            lm_B = lm_B.index_put((torch.tensor(kept, device=lm_K.device),), lm_K)
        if pooled_DBH is None:
            pooled_DBH = self.base_states(batch)
        logits_DBE = self.logits(pooled_DBH)
        experts_B = torch.tensor(batch.experts, device=logits_DBE.device)
        # Only sequences whose expert's LoRA is trained have a language-model loss.
        taught_B = experts_B.new_tensor([self.settings.train_loras and e in self.trained for e in batch.experts])
        tokens_B = taught_B * (batch.labels_BL[:, 1:] != IGNORE).sum(1)
        right_DB = logits_DBE.detach().argmax(-1) == experts_B
        return MoaSums(lm_B * taught_B, tokens_B, router_losses(logits_DBE, experts_B), right_DB, batch.experts)

    def logits(self, pooled_DBH: Tensor) -> Tensor:
        """logits_DBE, fp32; -inf for experts that have no rows and get none."""
        return router_logits(pooled_DBH, self.routers).masked_fill(self.absent_E, float("-inf"))

    def language_losses(self, batch: DomainBatch, pooled: bool = False) -> tuple[Tensor, Tensor | None]:
        """Each sequence runs with its own expert.

        Returns:
            Sum of every answer's cross-entropies [B], and the pooled router inputs [D, B, H] of the same pass, with
            their gradient, if ``pooled``.
        """
        choices = [named(expert) for expert in batch.experts]
        length = batch.ids_BL.shape[1]
        with torch.device(batch.ids_BL.device):
            step = plan_step(choices, [length] * len(choices), self._routed.num_experts, 1)
        spans = self._spans(batch, length) if pooled else []
        with self._routed.context.routed(step), pooled_states(self._routed.model, spans) as taken:
            hidden_BLH = self._decode(batch.ids_BL, batch.mask_BL)
        labels_BL = shifted_labels(batch.labels_BL)
        answers_BL = labels_BL != IGNORE
        logits_TV = self._routed.model.get_output_embeddings()(hidden_BLH[answers_BL]).float()
        losses_T = cross_entropy(logits_TV, labels_BL[answers_BL], reduction="none")
        owners_T = answers_BL.nonzero()[:, 0]
        lm_B = losses_T.new_zeros(len(choices)).index_add(0, owners_T, losses_T)
        return lm_B, self._mean(torch.stack(taken), batch) if pooled else None

    @torch.no_grad()
    def base_states(self, batch: DomainBatch) -> Tensor:
        """The pooled router inputs [D, B, H] of the prompts, as they are when routers vote: no expert is at work."""
        longest = max(batch.prompts)
        with pooled_states(self._routed.model, self._spans(batch, longest)) as taken:
            self._decode(batch.ids_BL[:, :longest], batch.mask_BL[:, :longest])
        return self._mean(torch.stack(taken), batch)

    def install(self) -> None:
        """Puts the trained matrices as they are now in force, in the dtype the experts were loaded in."""
        if not self.settings.train_loras:
            return
        for g, (group, stack) in enumerate(zip(self._routed.groups, self._stacks, strict=True)):
            experts = tuple(
                tuple(
                    part
                    and replace(
                        part,
                        a_RH=self._now(_key(g, e, n, "a"), part.a_RH),
                        b_RO=self._now(_key(g, e, n, "b"), part.b_RO),
                    )
                    for n, part in enumerate(expert)
                )
                for e, expert in enumerate(stack.experts)
            )
            group.state = replace(group.state, stack=replace(stack, experts=experts, packed=None, tables=None))

    def _now(self, key: str, frozen: Tensor) -> Tensor:
        """The trained matrix of this key; ``frozen`` where it is not trained."""
        return self._pairs[key].to(frozen.dtype) if key in self._pairs else frozen

    def _trained_matrices(self) -> Iterator[tuple[str, Tensor]]:
        """The matrices of the trained experts with their keys."""
        for g, group in enumerate(self._routed.groups):
            for e in self.trained:
                for n, part in enumerate(group.state.stack.experts[e]):
                    if part is not None:
                        yield _key(g, e, n, "a"), part.a_RH
                        yield _key(g, e, n, "b"), part.b_RO

    def _decode(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        decoder = self._routed.model.get_decoder()
        embedded_BLH = self._routed.model.get_input_embeddings()(ids_BL)
        # The first layer's experts are trained as well: routed linears take an input without gradient for inference.
        embedded_BLH.requires_grad_(torch.is_grad_enabled() and bool(self._pairs))
        hidden_BLH: Tensor = decoder(
            inputs_embeds=embedded_BLH, attention_mask=mask_BL, use_cache=False
        ).last_hidden_state
        return hidden_BLH

    def _spans(self, batch: DomainBatch, length: int) -> list[Span]:
        return [Span(b * length, prompt, self.settings.pooling) for b, prompt in enumerate(batch.prompts)]

    def _mean(self, pooled_DBH: Tensor, batch: DomainBatch) -> Tensor:
        if self.settings.pooling == "last":
            return pooled_DBH
        return pooled_DBH / torch.tensor(batch.prompts, device=pooled_DBH.device)[:, None]


def _routers(routed: RoutedModel, bank: Bank) -> Tensor:
    """The bank's routers, or zeros, on the model's device: [D, E, H]."""
    for own in routed.routers.values():
        return own.weights_LEH.clone()
    width = routed.model.config.get_text_config().hidden_size
    layers = len(decoder_layers(routed.model))
    return torch.zeros(layers, len(bank.names), width, device=routed.model.device)


def _key(group: int, expert: int, linear: int, which: str) -> str:
    return f"{group}-{expert}-{linear}-{which}"
