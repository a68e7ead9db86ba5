"""MeteoRA's training forward as its authors wrote it: a loop over the experts of every linear, each linear by itself.

The readable twin of ``GateObjective``: the same losses and gradients, from plain modules (arXiv 2405.13053).

Shapes: B sequences, L positions, T = B * L, H input and O output width of a linear, E experts, K experts of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, one_hot
from transformers import PreTrainedModel

from meteora_dist.adapters import LoraPair
from meteora_dist.bank import Bank
from meteora_dist.training.data import Batch
from meteora_dist.training.gate_loss import IGNORE, gate_loss, shifted_labels


class LoopLinear(nn.Module):
    """A base linear, a gate, and experts that are looped over, each on the tokens that chose it.

    Attributes:
        gate_EH: Trained.
        logits_BLE: Of the last pass, fp32.
    """

    def __init__(self, base_layer: nn.Linear, gate_EH: Tensor, pairs: list[LoraPair | None], top_k: int) -> None:
        """Wraps ``base_layer``; an expert that lacks this linear has None for a pair."""
        super().__init__()
        self.base_layer = base_layer
        self.gate_EH = nn.Parameter(gate_EH.clone())
        self.logits_BLE = torch.empty(0)
        self._pairs = pairs
        self._top_k = top_k

    def forward(self, x_BLH: Tensor) -> Tensor:
        """Y [B, L, O]."""
        self.logits_BLE = linear(x_BLH.float(), self.gate_EH)
        x_TH, logits_TE = x_BLH.flatten(0, 1), self.logits_BLE.flatten(0, 1)
        weights_TK, ids_TK = torch.topk(logits_TE.softmax(-1), self._top_k)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        mask_EKT = one_hot(ids_TK, logits_TE.shape[-1]).permute(2, 1, 0)
        y_TO = self.base_layer(x_TH)
        delta_TO = torch.zeros_like(y_TO)
        for pair, mask_KT in zip(self._pairs, mask_EKT, strict=True):
            slots, tokens = mask_KT.nonzero().unbind(1)
            if pair is not None and len(tokens):
                scaled_S1 = (weights_TK[tokens, slots] * pair.scale)[:, None].to(x_TH.dtype)
                delta_TO.index_add_(0, tokens, linear(linear(x_TH[tokens], pair.a_RH), pair.b_OR) * scaled_S1)
        y_BLO: Tensor = (y_TO + delta_TO).unflatten(0, x_BLH.shape[:2])
        return y_BLO


class LoopModel(nn.Module):
    """A model whose linears a bank targets are ``LoopLinear``.

    Attributes:
        model: The transformers model.
        linears: By module path.
    """

    def __init__(self, model: PreTrainedModel, bank: Bank, top_k: int, dtype: torch.dtype) -> None:
        """Changes ``model`` in place; its experts compute in ``dtype``."""
        super().__init__()
        self.model = model
        self.linears = {}
        for name in bank.linears:
            pairs = [bank.pair(name, expert, dtype) for expert in range(len(bank.names))]
            parent, _, leaf = name.rpartition(".")
            base_layer = model.get_submodule(name)
            assert isinstance(base_layer, nn.Linear), f"{name} is no linear"
            self.linears[name] = LoopLinear(base_layer, bank.gate(name), pairs, top_k)
            setattr(model.get_submodule(parent), leaf, self.linears[name])

    def forward(self, batch: Batch, beta: float, lm: bool = True) -> Tensor:
        """``L_LM + beta * L_gate`` of one batch."""
        inputs = {"input_ids": batch.ids_BL, "attention_mask": batch.mask_BL, "use_cache": False}
        logits_BLV = self.model(**inputs).logits
        logits_BLE = [each.logits_BLE for each in self.linears.values()]
        loss = beta * gate_loss(logits_BLE, batch.expert_labels)
        labels_BL = shifted_labels(batch.token_labels)
        token_loss = cross_entropy(logits_BLV.flatten(0, 1).float(), labels_BL.flatten(), ignore_index=IGNORE)
        return loss + token_loss if lm else loss
