"""Layer routers: every decoder layer votes for the expert that is to serve a whole sequence (MoA, arXiv 2403.03432).

A router sees the hidden states that enter its layer, x = h / rms(h), pooled over the prompt, and its logits are
``x_H R_EH^T``. The norm has no weights; it keeps the few huge features of some tokens from deciding alone.

Shapes: L decoder layers, T tokens of a pass, S spans of them, E experts, H hidden size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from meteora_dist.bank import Bank
from meteora_dist.bank.manifest import Pooling, VoteRule
from meteora_dist.errors import BankError

_EPSILON = 1e-6


def router_inputs(hidden_TH: Tensor) -> Tensor:
    """What routers see of hidden states: each divided by its root mean square, [..., H], fp32."""
    hidden_TH = hidden_TH.float()
    return hidden_TH * torch.rsqrt(hidden_TH.square().mean(-1, keepdim=True) + _EPSILON)


def router_logits(pooled_LSH: Tensor, weights_LEH: Tensor) -> Tensor:
    """fp32 logits_LSE of every layer's router for every pooled sequence."""
    return torch.einsum("lsh,leh->lse", pooled_LSH.float(), weights_LEH)


def elect(votes: Sequence[int], rule: VoteRule) -> int:
    """The expert that the votes of the layers, from the first to the last, decide for.

    Under ``majority`` the one with the most votes; of several, the one that the deepest layer voted for, because deep
    routers err less. Under ``last`` the choice of the last layer.
    """
    if rule == "last":
        return votes[-1]
    counts = Counter(votes)
    most = max(counts.values())
    return next(expert for expert in reversed(votes) if counts[expert] == most)


@dataclass(frozen=True, slots=True)
class LayerRouters:
    """The routers of one bank generation.

    Attributes:
        weights_LEH: fp32.
        choosable_E: False for experts without rows.
        pooling: What of a prompt they read.
    """

    weights_LEH: Tensor
    choosable_E: Tensor
    pooling: Pooling

    def votes(self, pooled_LH: Tensor) -> tuple[int, ...]:
        """The expert each layer votes for, of a pooled prompt; ties go to the smaller id."""
        logits_LE = router_logits(pooled_LH[:, None], self.weights_LEH)[:, 0]
        return tuple(logits_LE.masked_fill(~self.choosable_E, float("-inf")).argmax(-1).tolist())


def read_routers(bank: Bank, model: PreTrainedModel) -> LayerRouters | None:
    """The routers of a bank on the model's device; None when it has none.

    Raises:
        BankError: They are for other layers, or of another width, than the model has.
    """
    if bank.manifest.routers is None:
        return None
    layers, width = tuple(decoder_layers(model)), model.config.get_text_config().hidden_size
    weights_LEH = bank.routers()
    if bank.router_layers != layers or weights_LEH.shape[-1] != width:
        raise BankError(
            bank.path,
            f"has routers for {bank.router_layers[0]} to {bank.router_layers[-1]} of width {weights_LEH.shape[-1]}; "
            f"the base model has {layers[0]} to {layers[-1]} of width {width}",
        )
    choosable_E = torch.tensor([entry.router == "trained" for entry in bank.manifest.experts])
    return LayerRouters(weights_LEH.to(model.device), choosable_E.to(model.device), bank.manifest.routers.pooling)


def decoder_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The decoder layers of a causal language model by path, in order."""
    layers = list(model.get_decoder().layers)
    paths = {id(module): path for path, module in model.named_modules()}
    return {paths[id(layer)]: layer for layer in layers}


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring tokens of a pass that are pooled together.

    Attributes:
        first: Place of the first token in the pass, all its rows one after another.
        tokens: How many they are.
        pooling: ``last`` takes the last one; ``mean`` adds them up, so that parts of a prompt can be joined.
    """

    first: int
    tokens: int
    pooling: Pooling


@contextmanager
def pooled_states(model: PreTrainedModel, spans: Sequence[Span]) -> Iterator[list[Tensor]]:
    """Pools what enters the decoder layers in the pass run inside; a tensor [S, H], fp32, for every layer after it.

    Args:
        model: A causal language model.
        spans: What to pool; without any, nothing is looked at, and the list stays empty.
    """
    taken: list[Tensor] = []

    def look(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden: Tensor = arguments[0] if arguments else named["hidden_states"]
        taken.append(pool(hidden.flatten(0, -2), spans))

    # Only now: the engine puts faster layers in the place of those that were loaded.
    layers = model.get_decoder().layers if spans else ()
    hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    try:
        yield taken
    finally:
        for hook in hooks:
            hook.remove()


def pool(hidden_TH: Tensor, spans: Sequence[Span]) -> Tensor:
    """The pooled router inputs of every span, [S, H], fp32; of ``mean`` the sums."""
    rows = []
    for span in spans:
        end = span.first + span.tokens
        first = end - 1 if span.pooling == "last" else span.first
        rows.append(router_inputs(hidden_TH[first:end]).sum(0))
    return torch.stack(rows)
