"""Composite questions: several sub-questions, numbered, in one prompt, to be answered in one go.

As in MeteoRA's composite-n tasks (arXiv 2405.13053): n sub-questions of different tasks, none or a few worked examples
before them. Other than there, any n and any number of examples can be asked for, an answer may run over several lines,
and ``1.`` is not found inside ``11.``.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from meteora_dist.errors import EvaluationError
from meteora_dist.evaluation.suite import Task
from meteora_dist.evaluation.tasks import TaskRow

_MARK = re.compile(r"^[ \t]*([0-9]{1,4})[.)](?:[ \t]+|$)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Composite:
    """One composite question.

    Attributes:
        turns: The conversation up to the answer: worked examples as pairs of turns, then the question.
        tasks: The task of every sub-question.
        rows: Its row.
    """

    turns: tuple[str, ...]
    tasks: tuple[str, ...]
    rows: tuple[TaskRow, ...]

    @property
    def gold(self) -> str:
        """The whole gold answer."""
        return numbered([row.target for row in self.rows])


@dataclass(frozen=True, slots=True)
class CompositeScore:
    """Of one answer: how many sub-questions have an answer that is not empty, how many are right, and which."""

    attempted: int
    correct: int
    right: tuple[float, ...]


def compose(tasks: Sequence[Task], n: int, count: int, shots: int, seed: int) -> list[Composite]:
    """``count`` composite questions of ``n`` sub-questions each.

    Args:
        tasks: Sub-question i is of task i; with fewer tasks than n they start over.
        n: Sub-questions, at least 2.
        count: Questions.
        shots: Worked examples before each, the same for all, from training rows.
        seed: Of the rows' order; a row is used again only after all of its task.

    Raises:
        EvaluationError: n is too small, or a task has too few training rows for the examples.
    """
    if n < 2 or count < 1 or shots < 0:
        raise EvaluationError(
            f"{count} composite questions of {n} sub-questions with {shots} shots; there must be at least 1, 2 and 0"
        )
    order = [tasks[i % len(tasks)] for i in range(n)]
    for task in order:
        if len(task.training) < shots * order.count(task):
            raise EvaluationError(f"task {task.name} has {len(task.training)} training rows, too few for {shots} shots")
    streams = {task.name: _endless(task.rows, f"{seed} {task.name}") for task in order}
    examples = {task.name: _endless(task.training, f"{seed} {task.name} shots") for task in order if shots}
    prefix: list[str] = []
    for _ in range(shots):
        rows = [next(examples[task.name]) for task in order]
        prefix += [question(rows), numbered([row.target for row in rows])]
    made = []
    for _ in range(count):
        rows = [next(streams[task.name]) for task in order]
        made.append(Composite((*prefix, question(rows)), tuple(task.name for task in order), tuple(rows)))
    return made


def question(rows: Sequence[TaskRow]) -> str:
    """The user turn of several sub-questions."""
    head = f"Answer these {len(rows)} questions. Give each answer its question's number, on a line of its own."
    return "\n\n".join([head, *items([row.prompt for row in rows])])


def numbered(answers: Sequence[str]) -> str:
    """Answers as a model should give them."""
    return "\n".join(items(answers))


def items(texts: Sequence[str]) -> list[str]:
    """The texts with their numbers, as they stand in a question and in its answer."""
    return [f"{number}. {text}" for number, text in enumerate(texts, 1)]


def parse_numbered(text: str, n: int) -> list[str]:
    """The answers 1 to ``n`` of a text; "" where one is missing.

    An answer starts at a line that begins with its number and ``.`` or ``)``, and runs over all lines up to the next
    such line of a higher number. What stands before the first is no answer. Numbers that do not rise, as in a list
    inside an answer, belong to that answer.
    """
    answers, current, start = [""] * n, 0, 0
    for mark in _MARK.finditer(text):
        number = int(mark[1])
        if current < number <= n:
            if current:
                answers[current - 1] = text[start : mark.start()].strip()
            current, start = number, mark.end()
    if current:
        answers[current - 1] = text[start:].strip()
    return answers


def score(composite: Composite, answer: str) -> CompositeScore:
    """Scores an answer by ``TaskRow.score`` of every sub-question."""
    answers = parse_numbered(answer, len(composite.rows))
    right = tuple(row.score(text) for row, text in zip(composite.rows, answers, strict=True))
    return CompositeScore(sum(bool(text) for text in answers), round(sum(right)), right)


def _endless(rows: Sequence[TaskRow], seed: str) -> Iterator[TaskRow]:
    rng = random.Random(seed)
    while True:
        yield from rng.sample(list(rows), len(rows))
