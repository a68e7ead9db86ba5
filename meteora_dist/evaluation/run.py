"""One evaluation from its plan to its results."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from contextlib import closing

import torch
from transformers import PreTrainedTokenizerBase

from meteora_dist import __version__
from meteora_dist.bank import Bank
from meteora_dist.errors import EvaluationError
from meteora_dist.evaluation import results
from meteora_dist.evaluation.cells import Cells
from meteora_dist.evaluation.composite import Composite, compose
from meteora_dist.evaluation.gates import add_counts
from meteora_dist.evaluation.homes import home_of
from meteora_dist.evaluation.measure import Answers, Measure
from meteora_dist.evaluation.methods import Home, Method
from meteora_dist.evaluation.metrics import containment
from meteora_dist.evaluation.plan import CompositeKind, EvalPlan
from meteora_dist.evaluation.prompts import open_tokenizer, prompt_ids, text_of
from meteora_dist.evaluation.results import CompositeResult, GateResult, Results, RouteMap, TaskScore
from meteora_dist.evaluation.subject import Subject
from meteora_dist.evaluation.suite import Task

MAP_TOKENS = 160
"""Most tokens of a drawn sequence, from its end, where the answer is."""
HOMES: tuple[Home, ...] = ("own", "prototypes", "merged")


def evaluate(plan: EvalPlan, say: Callable[[str], None]) -> Results:
    """Measures what is not known yet, and scores all of it.

    Args:
        plan: What to do. Cells in its output folder are used, and added to.
        say: Told of progress, a line at a time.

    Raises:
        MeteoraError: A bank, an adapter or an option cannot be used; before anything is measured, where that shows.
    """
    torch.set_num_threads(plan.machine.threads)
    evaluation = _Evaluation(plan, plan.check(), say)
    # Now, before hours of answers that could not be kept.
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise EvaluationError(f"{plan.out}: no such folder can be made: {cause.strerror}") from cause
    return evaluation.run()


class _Evaluation:
    """The results as they come in."""

    def __init__(self, plan: EvalPlan, banks: dict[str, Bank], say: Callable[[str], None]) -> None:
        self._plan = plan
        self._banks = banks
        self._say = say
        self._tokenizer: PreTrainedTokenizerBase = open_tokenizer(plan.model)
        self._cells = Cells(plan.out / "cells")
        self._asked = {
            kind: compose(plan.tasks, kind.n, plan.composite_rows, kind.shots, plan.seed) for kind in plan.composites
        }
        self._scores: list[TaskScore] = []
        self._composites: list[CompositeResult] = []
        self._gates: list[GateResult] = []
        self._maps: list[RouteMap] = []

    def run(self) -> Results:
        """All banks and methods, and the results in the order of the plan's methods."""
        for number, (label, bank) in enumerate(self._banks.items()):
            # Banks differ in their gates alone: everything else is measured once.
            asked = [method for method in self._plan.methods if number == 0 or _own_gates(method)]
            for home in HOMES:
                methods = [method for method in asked if method.home == home]
                if methods:
                    path = home_of(self._plan, bank, home, methods, self._say)
                    with closing(Subject(self._plan.config(path))) as subject:
                        self._measure(label, methods, subject)
        order = [method.name for method in self._plan.methods]
        scores = tuple(sorted(self._scores, key=lambda score: order.index(score.method)))
        return Results(
            setting=setting(self._plan),
            scores=scores,
            means=results.means(scores, self._plan.tasks, self._plan.seed),
            composites=tuple(sorted(self._composites, key=lambda one: (one.n, -one.shots, order.index(one.method)))),
            gates=tuple(self._gates),
            maps=tuple(self._maps),
        )

    def _measure(self, label: str, methods: Sequence[Method], subject: Subject) -> None:
        measure = Measure(self._plan, subject, self._tokenizer, self._cells, self._say)
        pairs = [(method, task) for method in methods for task in self._plan.tasks]
        for method, task in pairs:
            measure.prepare(method, task)
        # The engine answers everything before the model for plain passes takes its place in memory.
        given = {(method, task.name): measure.answers(method, task) for method, task in pairs}
        composites = {
            (method, kind): measure.composites(method, kind.name, asked)
            for method in methods
            for kind, asked in self._asked.items()
            if self._plan.asks_composites(method)
        }
        for method, task in pairs:
            answers = given[method, task.name]
            nlls = measure.nlls(method, task, answers) if self._plan.perplexity else []
            self._scores.append(self._score(label, method, task, answers, nlls, subject.bank))
        for (method, kind), answers in composites.items():
            self._composites.append(
                results.score_composites(
                    (self._label(label, method), method.name),
                    kind.shots,
                    self._asked[kind],
                    answers.texts,
                    self._plan.seed,
                    answers.seconds,
                )
            )
        if self._plan.gates:
            self._watch(label, [method for method in methods if method.kind == "gates"], measure, subject, composites)

    def _score(
        self,
        label: str,
        method: Method,
        task: Task,
        answers: Answers,
        nlls: list[tuple[float, int]],
        bank: Bank,
    ) -> TaskScore:
        texts = [text or "" for text in answers.texts]
        found = results.score_task(task, texts, self._plan.seed)
        own = None
        if method.gated and task.name in bank.names:
            expert = bank.names.index(task.name)
            own = sum(bool(s) and s.index(max(s)) == expert for s in answers.shares) / len(texts)
        return TaskScore(
            bank=self._label(label, method),
            method=method.name,
            task=task.name,
            rows=len(texts),
            empty=sum(not text.strip() for text in texts),
            too_long=sum(text is None for text in answers.texts),
            metrics=found,
            exact=tuple(row.score(text) for row, text in zip(task.rows, texts, strict=True)),
            contained=tuple(containment(row, text) for row, text in zip(task.rows, texts, strict=True)),
            own=own,
            perplexity=results.score_perplexity(nlls, self._plan.seed),
            seconds=answers.seconds,
        )

    def _watch(
        self,
        label: str,
        methods: Sequence[Method],
        measure: Measure,
        subject: Subject,
        composites: dict[tuple[Method, CompositeKind], Answers],
    ) -> None:
        tasks = [task for task in self._plan.tasks if task.name in subject.bank.names]
        for method in methods:
            counts = add_counts(measure.gates(method, task) for task in tasks)
            self._gates.append(GateResult(self._label(label, method), method.name, counts))
            for kind, asked in self._asked.items():
                answers = composites.get((method, kind))
                if answers and (ids := answers.ids[0]):
                    self._maps.append(self._map(label, method, kind, asked[0], ids, measure, subject))

    def _map(
        self,
        label: str,
        method: Method,
        kind: CompositeKind,
        asked: Composite,
        ids: tuple[int, ...],
        measure: Measure,
        subject: Subject,
    ) -> RouteMap:
        """The first question of a kind with the method's own answer."""
        prompt = prompt_ids(self._tokenizer, asked.turns)
        choices = measure.route_map(method, prompt + ids)
        cut = max(0, len(choices[0]) - MAP_TOKENS)
        return RouteMap(
            bank=self._label(label, method),
            method=method.name,
            question=f"{kind.name}: {', '.join(asked.tasks)}",
            tokens=tuple(text_of(self._tokenizer, [token], special=True) for token in (prompt + ids)[cut:]),
            prompt_tokens=max(0, len(prompt) - cut),
            experts=subject.bank.names,
            choices=tuple(tuple(row[cut:]) for row in choices),
        )

    def _label(self, label: str, method: Method) -> str:
        return label if len(self._banks) > 1 and _own_gates(method) else ""


def setting(plan: EvalPlan) -> dict[str, object]:
    """What the results were made with, as JSON."""
    return {
        "version": __version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores"
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
        "model": plan.model.name,
        "banks": list(plan.banks),
        "methods": [method.name for method in plan.methods],
        "rows": {task.name: len(task.rows) for task in plan.tasks},
        "composites": [kind.name for kind in plan.composites],
        "composite_rows": plan.composite_rows,
        "composite_methods": list(plan.composite_methods),
        "max_tokens": plan.max_tokens,
        "max_len": plan.machine.max_len,
        "dtype": plan.machine.dtype,
        "seed": plan.seed,
        "density": plan.density,
        "merge_rank": plan.merge_rank,
        "lorahub": {"examples": plan.hub.examples, "evaluations": plan.hub.evaluations},
    }


def _own_gates(method: Method) -> bool:
    """Whether the evaluated bank's own gates matter to it."""
    return method.gated and method.home == "own"
