"""How often gates name the expert of the task: by layer, kind of linear, position, and part of the passage.

Shapes: T tokens of a passage.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from meteora_dist.evaluation.forced import Passage, answer_nll, watched_gates
from meteora_dist.moe.routed_model import RoutedModel
from meteora_dist.moe.routing import RoutingChoice

_LAYER = re.compile(r"\.(\d+)\.")

Counts = dict[str, dict[str, tuple[int, int]]]
"""(right, all) by key, for each of the ways of counting: ``layer``, ``module``, ``position``, ``part``."""


class GateCount:
    """Counts first choices of gates against the expert they should have named."""

    def __init__(self) -> None:
        """Nothing is counted yet."""
        self._right: dict[str, Counter[str]] = {}
        self._total: dict[str, Counter[str]] = {}

    def add(self, picks: Mapping[str, Tensor], expert: int, prompt_tokens: int) -> None:
        """Counts one passage.

        Args:
            picks: The choice [T] of every linear by its name. As in the gate loss, the choice at a token is held
                against the expert of the next one, so the last token does not count.
            expert: The right one.
            prompt_tokens: Tokens of the prompt; a choice belongs to the part that its next token is in.
        """
        for linear, picks_T in picks.items():
            right_T = (picks_T[:-1] == expert).cpu()
            layer = _LAYER.search(f".{linear}.")
            self._count("layer", layer[1] if layer else "none", right_T)
            self._count("module", linear.rpartition(".")[2], right_T)
            self._count("part", "prompt", right_T[: prompt_tokens - 1])
            self._count("part", "answer", right_T[prompt_tokens - 1 :])
            for start, end in _spans(len(right_T)):
                self._count("position", span_name(start), right_T[start:end])

    def counts(self) -> Counts:
        """What was counted."""
        return {
            way: {key: (self._right[way][key], total) for key, total in totals.items()}
            for way, totals in self._total.items()
        }

    def _count(self, way: str, key: str, right_T: Tensor) -> None:
        self._right.setdefault(way, Counter())[key] += int(right_T.sum())
        self._total.setdefault(way, Counter())[key] += len(right_T)


@dataclass(frozen=True, slots=True)
class Watched:
    """What passes over passages of one task have shown.

    Attributes:
        counts: Choices of gates, of all passages together.
        nlls: Of every passage the answer's negative log-likelihood, nats.
    """

    counts: Counts
    nlls: list[float]


def watch_gates(routed: RoutedModel, passages: Iterable[Passage], expert: int, choice: RoutingChoice) -> Watched:
    """Passes over passages of one expert's task, routed as ``choice`` says."""
    count, nlls = GateCount(), []
    with watched_gates(routed) as picks:
        for passage in passages:
            nlls.append(answer_nll(routed, passage, choice))
            count.add(picks, expert, len(passage.prompt))
    return Watched(count.counts(), nlls)


def layer_choices(routed: RoutedModel, ids: tuple[int, ...], choice: RoutingChoice) -> list[list[int]]:
    """For every layer and token, the expert that most of the layer's gates name; ties go to the smaller number."""
    with watched_gates(routed) as picks:
        answer_nll(routed, Passage(ids[:-1], ids[-1:]), choice)
    layers: dict[int, list[Tensor]] = {}
    for linear, picks_T in picks.items():
        layers.setdefault(layer_of(linear), []).append(picks_T)
    votes = (torch.stack(found).T for _, found in sorted(layers.items()))
    return [[int(torch.bincount(picks_N).argmax()) for picks_N in votes_TN] for votes_TN in votes]


def layer_of(linear: str) -> int:
    """Number of the decoder layer a linear is in; 0 where its path names none."""
    layer = _LAYER.search(f".{linear}.")
    return int(layer[1]) if layer else 0


def add_counts(many: Iterable[Counts]) -> Counts:
    """The sum of counts, which may come from JSON."""
    total: Counts = {}
    for counts in many:
        for way, found in counts.items():
            sums = total.setdefault(way, {})
            for key, (right, seen) in found.items():
                before = sums.get(key, (0, 0))
                sums[key] = (before[0] + right, before[1] + seen)
    return total


def span_name(start: int) -> str:
    """The positions from ``start``, a power of two or 0, to the next one, as text."""
    end = 2 * start - 1
    return str(start) if end <= start else f"{start}-{end}"


def _spans(tokens: int) -> list[tuple[int, int]]:
    """Positions 0, 1, 2-3, 4-7 and so on."""
    starts = [0]
    while (start := max(1, 2 * starts[-1])) < tokens:
        starts.append(start)
    return [(start, max(1, 2 * start)) for start in starts if start < tokens]
