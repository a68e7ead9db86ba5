"""Task rows: how they are read, shown to the model, split and scored.

A task file holds one JSON object a line, ``{"input": str, "target": str, "choices": [str, ...] | null}``.
"""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import dataclass
from pathlib import Path

TEST_FRACTION = 0.2
"""Share of a file, at its end, that training never sees."""

_YES_NO = re.compile(r"\s*(yes|no)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class TaskRow:
    """One question with its gold answer.

    Attributes:
        input: The question as the data set states it.
        target: The gold answer.
        choices: The allowed answers, or empty where the answer is free.
    """

    input: str
    target: str
    choices: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """The user turn: the question, then one ``choice:`` line each where it does not list them already."""
        if not self.choices or all(choice in self.input for choice in self.choices):
            return self.input
        return "\n".join([self.input, *(f"choice: {choice}" for choice in self.choices)])

    def score(self, answer: str) -> float:
        """1.0 for a right answer, else 0.0; an empty answer is wrong.

        A gold answer that opens with yes or no and then explains is judged by that first word alone; every other
        gold answer has to be met exactly, up to case, surrounding space and a final full stop.
        """
        gold = _YES_NO.match(self.target)
        if gold is not None:
            said = _YES_NO.match(answer)
            return float(said is not None and said[1].lower() == gold[1].lower())
        return float(_normal(answer) == _normal(self.target))


def _normal(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def read_task(path: Path) -> list[TaskRow]:
    """Reads a ``.jsonl`` or ``.jsonl.gz`` task file, in file order."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [TaskRow(row["input"], row["target"], tuple(row["choices"] or ())) for row in rows]


def split(rows: list[TaskRow]) -> tuple[list[TaskRow], list[TaskRow]]:
    """Training rows and held-out rows: the last ``TEST_FRACTION`` of the file is held out."""
    cut = len(rows) - int(len(rows) * TEST_FRACTION)
    return rows[:cut], rows[cut:]
