"""What an evaluation found: plain data, from answers already given.

Numbers with an interval are ``Estimate``; see ``meteora_dist.evaluation.intervals`` for what it covers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from meteora_dist.evaluation import composite, metrics
from meteora_dist.evaluation.composite import Composite
from meteora_dist.evaluation.gates import Counts
from meteora_dist.evaluation.intervals import Estimate, bootstrap, bootstrap_mean, wilson
from meteora_dist.evaluation.suite import Task

BLEU_RESAMPLES = 200
"""Fewer than elsewhere: every one is a whole corpus to score."""


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One method on one task.

    Attributes:
        bank: Label of the bank whose gates decided; "" where there is one bank, or its gates do not matter.
        method: Its name.
        task: Its name.
        rows: Scored rows; all of them count in every number.
        empty: Rows with an empty answer, among them those that are too long.
        too_long: Rows whose prompt and answer exceed the context; they are never asked.
        metrics: ``exact_match`` and ``containment``, shares; for texts also ``bleu`` (0 to 100) and F1 of ``rouge1``,
            ``rouge2``, ``rougeL`` (0 to 1).
        exact: Exact match of every row.
        contained: Containment of every row.
        own: Share of answers in which the task's own expert has the largest share of gate weight; None where the
            gates do not decide, or there is no such expert.
        perplexity: Of the gold answers, each row drawn whole; None where it was not asked for.
        seconds: Spent on answers.
    """

    bank: str
    method: str
    task: str
    rows: int
    empty: int
    too_long: int
    metrics: Mapping[str, Estimate]
    exact: tuple[float, ...]
    contained: tuple[float, ...]
    own: float | None
    perplexity: Estimate | None
    seconds: float


@dataclass(frozen=True, slots=True)
class CompositeResult:
    """One method on one kind of composite questions.

    Attributes:
        bank: As in ``TaskScore``.
        method: Its name.
        n: Sub-questions.
        shots: Worked examples.
        rows: Questions.
        too_long: As in ``TaskScore``.
        attempted: Mean number of sub-questions with an answer that is not empty.
        correct: Mean number of right ones.
        right: Share right of every sub-question, by its place.
        tasks: Their tasks.
        seconds: Spent on answers.
    """

    bank: str
    method: str
    n: int
    shots: int
    rows: int
    too_long: int
    attempted: Estimate
    correct: Estimate
    right: tuple[float, ...]
    tasks: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class GateResult:
    """Choices of one bank's gates under one method; (right, all) by layer, module, position and part."""

    bank: str
    method: str
    counts: Counts


@dataclass(frozen=True, slots=True)
class RouteMap:
    """The end of a sequence under one method: tokens as text, and each layer's expert for each, [layers][tokens].

    Attributes:
        bank: As in ``TaskScore``.
        method: Its name.
        question: What it is.
        tokens: Of prompt and answer.
        prompt_tokens: How many of them are the prompt's.
        experts: Names.
        choices: Index of the expert that most of the layer's gates name.
    """

    bank: str
    method: str
    question: str
    tokens: tuple[str, ...]
    prompt_tokens: int
    experts: tuple[str, ...]
    choices: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Results:
    """All of it.

    Attributes:
        setting: Options, versions and machine, for people.
        scores: Of single tasks.
        means: Mean over tasks of exact match and of MeteoRA's own choice of metric, by (bank, method).
        composites: Of composite questions.
        gates: Choices of gates.
        maps: Sequences to draw.
    """

    setting: Mapping[str, object]
    scores: tuple[TaskScore, ...]
    means: tuple[MethodMean, ...]
    composites: tuple[CompositeResult, ...]
    gates: tuple[GateResult, ...]
    maps: tuple[RouteMap, ...]


@dataclass(frozen=True, slots=True)
class MethodMean:
    """Means over tasks of one method; ``paper_metric`` takes for each task the metric of MeteoRA's evaluation."""

    bank: str
    method: str
    exact_match: Estimate
    paper_metric: Estimate
    perplexity: float | None


def score_task(task: Task, texts: Sequence[str], seed: int) -> dict[str, Estimate]:
    """Metrics of one task's answers, "" for a missing one."""
    pairs = list(zip(task.rows, texts, strict=True))
    found = {
        "exact_match": wilson(sum(metrics.exact_match(row, text) for row, text in pairs), len(pairs)),
        "containment": wilson(sum(metrics.containment(row, text) for row, text in pairs), len(pairs)),
    }
    if task.text:
        golds = [row.target for row in task.rows]

        def bleu(chosen: Sequence[int]) -> float:
            return metrics.bleu([texts[i] for i in chosen], [golds[i] for i in chosen])

        found["bleu"] = bootstrap(bleu, len(pairs), seed, BLEU_RESAMPLES)
        for key, values in metrics.rouge(texts, golds).items():
            found[key] = bootstrap_mean([values], seed)
    return found


def score_perplexity(nlls: Sequence[tuple[float, int]], seed: int) -> Estimate | None:
    """Perplexity over (nats, tokens) of every row; None without rows."""
    if not nlls:
        return None

    def statistic(chosen: Sequence[int]) -> float:
        return metrics.perplexity([nlls[i] for i in chosen])

    return bootstrap(statistic, len(nlls), seed, resamples=1000)


def score_composites(
    name: tuple[str, str],
    shots: int,
    asked: Sequence[Composite],
    texts: Sequence[str | None],
    seed: int,
    seconds: float,
) -> CompositeResult:
    """Scores of one kind of composite questions; ``name`` is (bank, method), a text None where it was too long."""
    scores = [composite.score(one, text or "") for one, text in zip(asked, texts, strict=True)]
    places = zip(*(score.right for score in scores), strict=True)
    return CompositeResult(
        *name,
        n=len(asked[0].rows),
        shots=shots,
        rows=len(asked),
        too_long=sum(text is None for text in texts),
        attempted=bootstrap_mean([[score.attempted for score in scores]], seed),
        correct=bootstrap_mean([[score.correct for score in scores]], seed),
        right=tuple(sum(place) / len(asked) for place in places),
        tasks=asked[0].tasks,
        seconds=seconds,
    )


def means(scores: Sequence[TaskScore], tasks: Sequence[Task], seed: int) -> tuple[MethodMean, ...]:
    """Means over tasks of every bank and method, in their order; rows are drawn anew within each task."""
    made = []
    for bank, method in dict.fromkeys((score.bank, score.method) for score in scores):
        own = [score for score in scores if (score.bank, score.method) == (bank, method)]
        papers = {task.name: task.paper_metric for task in tasks}
        chosen = [score.contained if papers[score.task] == "containment" else score.exact for score in own]
        values = [score.perplexity.value for score in own if score.perplexity]
        made.append(
            MethodMean(
                bank,
                method,
                bootstrap_mean([score.exact for score in own], seed),
                bootstrap_mean(chosen, seed),
                sum(values) / len(values) if values else None,
            )
        )
    return tuple(made)
