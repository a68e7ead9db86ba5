"""Task rows: how they are read, shown to the model, split and scored.

A task file holds one JSON object a line, ``{"input": str, "target": str, "choices": [str, ...] | null}``.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from meteora_dist.adapters.files import parse_json_object
from meteora_dist.errors import DatasetError

TEST_FRACTION = 0.2
"""Share of a file, at its end, that training never sees."""

Row = TypeVar("Row")

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
    """Reads a ``.jsonl`` or ``.jsonl.gz`` task file, in file order; empty lines are passed over.

    Raises:
        DatasetError: It is missing, has no row, or a line is no row; names the line.
    """
    rows = [_row(path, number, fields) for number, fields in json_lines(path)]
    if not rows:
        raise DatasetError(path, 'has no row; a row is one line, {"input": "...", "target": "..."}')
    return rows


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a ``.jsonl`` or ``.jsonl.gz`` file with their line numbers, from 1; empty lines are passed over.

    Raises:
        DatasetError: It is missing or cannot be read, or a line is no JSON object.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, parse_json_object(line, path, f"line {number}", DatasetError)
    except FileNotFoundError:
        raise DatasetError(path, "there is no such file") from None
    except (OSError, EOFError) as cause:
        raise DatasetError(path, f"cannot be read ({cause})") from cause


def _row(path: Path, number: int, fields: dict[str, Any]) -> TaskRow:
    choices = fields.get("choices") or []
    texts = [fields.get("input"), fields.get("target")]
    if not all(isinstance(text, str) and text for text in texts):
        raise DatasetError(path, f"line {number} must have input and target, each a text that is not empty")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise DatasetError(path, f"line {number} has choices {choices!r}; they must be a list of texts, or null")
    return TaskRow(fields["input"], fields["target"], tuple(choices))


def split(rows: list[Row], fraction: float = TEST_FRACTION) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows: the last ``fraction`` of the file is held out."""
    cut = len(rows) - int(len(rows) * fraction)
    return rows[:cut], rows[cut:]
