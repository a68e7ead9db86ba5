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
from meteora_dist.evaluation.gates import Counts, Watched, layer_choices, watch_gates
from meteora_dist.evaluation.lorahub import search_weights
from meteora_dist.evaluation.methods import Method
from meteora_dist.evaluation.plan import EvalPlan
from meteora_dist.evaluation.prompts import encode, prompt_ids, text_of
from meteora_dist.evaluation.subject import Answer, Subject
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
        if self._plan.gates and method.kind == "gates" and task.name in self._subject.bank.names:
            nlls = self._watched(method, task).nlls
            return [(nlls[i], len(one.answer)) for i, one in zip(rows, passages, strict=True)]
        if method.kind == "vote":
            choices = [named(answers.shares[i].index(max(answers.shares[i]))) for i in rows]
        else:
            choices = [self._choice(method, task)] * len(rows)

        def make(places: list[int]) -> list[float]:
            started = time.perf_counter()
            found = [answer_nll(self._subject.routed, passages[i], choices[i]) for i in places]
            self._say(f"{method.name}-{task.name}-nll: {len(found)}, {time.perf_counter() - started:.0f} s")
            return found

        keys = [digest((one.prompt, one.answer))[:16] for one in passages]
        nlls = self._cells.rows(f"{method.name}-{task.name}-nll", self._identity(method, choices), keys, make)
        return [(nll, len(one.answer)) for nll, one in zip(nlls, passages, strict=True)]

    def gates(self, method: Method, task: Task) -> Counts:
        """How often the gates name the task's expert over its rows with their gold answers."""
        return self._watched(method, task).counts

    def _watched(self, method: Method, task: Task) -> Watched:
        """Passes over all rows with their gold answers, which give what gates chose and perplexity at once."""
        expert = self._subject.bank.names.index(task.name)
        passages = [Passage(*encode(self._tokenizer, row)) for row in task.rows]
        choice = self._choice(method, task)
        identity = self._identity(method, [choice]) | {"passages": digest([one.ids for one in passages])}
        found = self._cell(
            f"{method.name}-{task.name}-gates",
            identity | {"expert": expert},
            lambda: asdict(watch_gates(self._subject.routed, passages, expert, choice)),
        )
        return Watched(**found)

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
        def make(places: list[int]) -> list[dict[str, Any]]:
            self._subject.start()
            started = time.perf_counter()
            asked = [prompts[place] for place in places]
            answers = self._subject.answers(asked, choice, most, method.kind == "vote")
            seconds = time.perf_counter() - started
            self._say(f"{method.name}-{name}-answers: {len(asked)} of {len(prompts)}, {seconds:.0f} s")
            # What a row took cannot be told apart from what its batch took.
            each = round(seconds / len(asked), 3)
            return [{"answer": one and _short(one), "seconds": each} for one in answers]

        identity = self._identity(method, [choice]) | {"max_tokens": most, "max_len": self._plan.machine.max_len}
        keys = [digest(prompt)[:16] for prompt in prompts]
        cell = self._cells.rows(f"{method.name}-{name}-answers", identity, keys, make)
        answers = [one["answer"] for one in cell]
        found = [one or {"ids": [], "shares": []} for one in answers]
        return Answers(
            tuple(None if one is None else text_of(self._tokenizer, one["ids"]) for one in answers),
            tuple(tuple(one["ids"]) for one in found),
            tuple(tuple(one["shares"]) for one in found),
            round(sum(one["seconds"] for one in cell), 2),
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


def _short(answer: Answer) -> dict[str, Any]:
    """An answer as JSON; its shares without digits that nothing depends on."""
    return {"ids": answer.ids, "shares": [round(share, 4) for share in answer.shares]}
