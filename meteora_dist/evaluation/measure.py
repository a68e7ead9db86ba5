"""Measures methods on one bank, cell by cell: answers, perplexities, choices of gates, weights of LoraHub."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from meteora_dist.evaluation.cells import Cells, digest
from meteora_dist.evaluation.composite import Composite
from meteora_dist.evaluation.forced import Passage, answer_nll
from meteora_dist.evaluation.gates import Counts, count_gates, layer_choices
from meteora_dist.evaluation.lorahub import search_weights
from meteora_dist.evaluation.methods import Method
from meteora_dist.evaluation.plan import EvalPlan
from meteora_dist.evaluation.prompts import encode, prompt_ids, text_of
from meteora_dist.evaluation.subject import Subject
from meteora_dist.evaluation.suite import Task
from meteora_dist.moe.routing import RoutingChoice, named


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers to several questions.

    Attributes:
        texts: None where a question was too long.
        ids: Their tokens; empty where there is none.
        shares: Each expert's share of gate weight over them; empty where there is none.
        seconds: Spent.
    """

    texts: tuple[str | None, ...]
    ids: tuple[tuple[int, ...], ...]
    shares: tuple[tuple[float, ...], ...]
    seconds: float


class Measure:
    """All measurements of methods that share one bank."""

    def __init__(
        self,
        plan: EvalPlan,
        subject: Subject,
        tokenizer: PreTrainedTokenizerBase,
        cells: Cells,
        say: Callable[[str], None],
    ) -> None:
        """Measures nothing yet.

        Args:
            plan: Of the evaluation.
            subject: The bank the methods run on.
            tokenizer: Of the model.
            cells: What is known already.
            say: Told of every cell that had to be measured.
        """
        self._plan = plan
        self._subject = subject
        self._tokenizer = tokenizer
        self._cells = cells
        self._say = say

    def prepare(self, method: Method, task: Task) -> None:
        """Measures what has to be known before the method can answer; it takes plain passes."""
        self._choice(method, task)

    def answers(self, method: Method, task: Task) -> Answers:
        """Answers to a task's rows."""
        prompts = [encode(self._tokenizer, row)[0] for row in task.rows]
        return self._answers(method, task.name, prompts, self._plan.max_tokens, self._choice(method, task))

    def composites(self, method: Method, name: str, asked: Sequence[Composite]) -> Answers:
        """Answers to composite questions of one kind; for methods that are not told the task."""
        prompts = [prompt_ids(self._tokenizer, one.turns) for one in asked]
        most = self._plan.max_tokens * len(asked[0].rows)
        return self._answers(method, name, prompts, most, method.choice("", self._subject.bank.names))

    def nlls(self, method: Method, task: Task, answers: Answers) -> list[tuple[float, int]]:
        """(nats, tokens) of the gold answer of every row that was not too long."""
        rows = [i for i, text in enumerate(answers.texts) if text is not None]
        passages = [Passage(*encode(self._tokenizer, task.rows[i])) for i in rows]
        if method.kind == "vote":
            choices = [named(answers.shares[i].index(max(answers.shares[i]))) for i in rows]
        else:
            choices = [self._choice(method, task)] * len(rows)

        def make() -> list[tuple[float, int]]:
            routed = self._subject.routed
            pairs = zip(passages, choices, strict=True)
            return [(answer_nll(routed, one, choice), len(one.answer)) for one, choice in pairs]

        identity = self._identity(method, choices) | {"passages": digest([one.ids for one in passages])}
        return [(nll, count) for nll, count in self._cell(f"{method.name}-{task.name}-nll", identity, make)]

    def gates(self, method: Method, task: Task) -> Counts:
        """How often the gates name the task's expert over its rows with their gold answers."""
        expert = self._subject.bank.names.index(task.name)
        passages = [Passage(*encode(self._tokenizer, row)) for row in task.rows]
        choice = self._choice(method, task)
        identity = self._identity(method, [choice]) | {"passages": digest([one.ids for one in passages])}
        found: Counts = self._cell(
            f"{method.name}-{task.name}-gates",
            identity | {"expert": expert},
            lambda: count_gates(self._subject.routed, passages, expert, choice),
        )
        return found

    def route_map(self, method: Method, ids: tuple[int, ...]) -> list[list[int]]:
        """Every layer's expert for each token, as the gates choose."""
        choice = method.choice("", self._subject.bank.names)
        identity = self._identity(method, [choice]) | {"ids": digest(ids)}
        found: list[list[int]] = self._cell(
            f"{method.name}-map", identity, lambda: layer_choices(self._subject.routed, ids, choice)
        )
        return found

    def _answers(
        self, method: Method, name: str, prompts: Sequence[tuple[int, ...]], most: int, choice: RoutingChoice
    ) -> Answers:
        def make() -> dict[str, Any]:
            self._subject.start()
            started = time.perf_counter()
            answers = self._subject.answers(prompts, choice, most, method.kind == "vote")
            seconds = time.perf_counter() - started
            return {"answers": [one and asdict(one) for one in answers], "seconds": round(seconds, 2)}

        limits = {"prompts": digest(prompts), "max_tokens": most, "max_len": self._plan.machine.max_len}
        cell = self._cell(f"{method.name}-{name}-answers", self._identity(method, [choice]) | limits, make)
        found = [one or {"ids": [], "shares": []} for one in cell["answers"]]
        texts = [None if one is None else text_of(self._tokenizer, one["ids"]) for one in cell["answers"]]
        return Answers(
            tuple(texts),
            tuple(tuple(one["ids"]) for one in found),
            tuple(tuple(one["shares"]) for one in found),
            cell["seconds"],
        )

    def _choice(self, method: Method, task: Task) -> RoutingChoice:
        weights = self._weights(task) if method.kind == "lorahub" else ()
        return method.choice(task.name, self._subject.bank.names, weights)

    def _weights(self, task: Task) -> tuple[float, ...]:
        """LoraHub's, from the task's first training rows."""
        search = self._plan.hub
        passages = [Passage(*encode(self._tokenizer, row)) for row in task.training[: search.examples]]
        identity = self._common() | {
            "experts": self._subject.bank.digests,
            "search": asdict(search),
            "passages": digest([one.ids for one in passages]),
        }
        return tuple(
            self._cell(
                f"lorahub-{task.name}-weights",
                identity,
                lambda: search_weights(self._subject.routed, passages, search),
            )
        )

    def _identity(self, method: Method, choices: Sequence[RoutingChoice]) -> dict[str, Any]:
        """What the outcome of a routing depends on."""
        bank = self._subject.bank
        identity = self._common() | {"choices": digest([asdict(choice) for choice in choices])}
        manifest = bank.manifest
        if method.kind == "vote" and manifest.routers is not None:
            return identity | {"routers": manifest.routers.digest, "rule": manifest.routing.vote}
        if method.gated:
            return identity | {"vote": method.kind == "vote", "gates": manifest.gate_digest}
        used = {expert for choice in choices for expert, _ in choice.experts}
        return identity | {"experts": {str(expert): bank.digests[expert] for expert in sorted(used)}}

    def _common(self) -> dict[str, Any]:
        return {"base": self._subject.bank.manifest.base_fingerprint, "dtype": self._plan.machine.dtype}

    def _cell(self, name: str, identity: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        def measured() -> Any:
            started = time.perf_counter()
            value = make()
            self._say(f"{name}: {time.perf_counter() - started:.0f} s")
            return value

        return self._cells.get(name, identity, measured)
