"""Plain passes over a prompt and a given answer: how likely the answer is, and what the gates pick on the way.

Shapes: T tokens of the passage, A tokens of the answer, V vocabulary, H features, N linears of a group, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from meteora_dist.moe.gate import gate_logits
from meteora_dist.moe.layer import RoutedGroup
from meteora_dist.moe.routed_model import RoutedModel
from meteora_dist.moe.routing import RoutingChoice, plan_pass, slots_of


@dataclass(frozen=True, slots=True)
class Passage:
    """A prompt and the answer that follows it, as token ids."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        """Both."""
        return self.prompt + self.answer


@torch.inference_mode()
def answer_nll(routed: RoutedModel, passage: Passage, choice: RoutingChoice) -> float:
    """Sum of the negative log-likelihoods, in nats, of the answer's tokens, each after all given tokens before it."""
    ids_T = torch.tensor(passage.ids, device=routed.model.device)
    slots = slots_of([choice], routed.num_experts)
    step = None
    if slots:
        with torch.device(routed.model.device):
            newest = routed.holdings.residency.roster.newest
            step = plan_pass([choice], [len(ids_T)], [newest], routed.live, slots)
    with routed.context.routed(step):
        states_TH = routed.model.get_decoder()(input_ids=ids_T[None], use_cache=False).last_hidden_state[0]
    start = len(passage.prompt)
    logits_AV = routed.model.get_output_embeddings()(states_TH[start - 1 : -1]).float()
    return float(cross_entropy(logits_AV, ids_T[start:], reduction="sum"))


def watched_gates(routed: RoutedModel) -> AbstractContextManager[dict[str, Tensor]]:
    """Inside, every pass leaves the gates' first choice [T] of every linear, by its name, whoever it was routed by."""
    return _watched(routed, lambda logits_TNE: logits_TNE.argmax(-1))


def watched_logits(routed: RoutedModel) -> AbstractContextManager[dict[str, Tensor]]:
    """Inside, every pass leaves the gates' logits [T, E] of every linear, as ``watched_gates`` leaves choices."""
    return _watched(routed, lambda logits_TNE: logits_TNE)


@contextmanager
def _watched(routed: RoutedModel, of: Callable[[Tensor], Tensor]) -> Iterator[dict[str, Tensor]]:
    found: dict[str, Tensor] = {}
    prototype_E = routed.newest.prototype_E

    def keep(group: RoutedGroup, _: nn.Module, arguments: tuple[Tensor]) -> None:
        gate_PH = group.state.gates[routed.newest.index]
        logits_TNE = gate_logits(arguments[0], gate_PH, len(group.names))
        if prototype_E is not None:
            logits_TNE = torch.where(prototype_E.to(logits_TNE.device), logits_TNE.abs(), logits_TNE)
        found.update(zip(group.names, of(logits_TNE).unbind(1), strict=True))

    hooks = [group.register_forward_pre_hook(partial(keep, group)) for group in routed.groups]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
