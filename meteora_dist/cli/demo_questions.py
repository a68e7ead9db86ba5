"""What the demo asks: held-out rows of every expert's task, and several tasks in one prompt and one conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from meteora_dist.errors import CheckpointError
from meteora_dist.evaluation.tasks import TaskRow, read_task, split

Transport = Literal["http", "http_stream", "grpc", "grpc_stream"]
TRANSPORTS: tuple[Transport, ...] = ("http", "http_stream", "grpc", "grpc_stream")

SINGLE_PROMPTS = 12
COMPOSITE_TASKS = 3
SHORT_SHARE = 1 / 3
"""Only this share of a task's held-out rows, the shortest ones, is asked, so that the demo is quick on two cores."""

_ANSWER_TOKENS = 32
_COMPOSITE_TOKENS = 60
_COMPOSITE_ORDER = "Answer these {count} questions in order, one numbered line for each answer."


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt, or one conversation.

    Attributes:
        rows: Rows it is made of.
        tasks: The task of each row.
        transport: How it is sent.
        conversation: Whether each row is a turn of its own, sent once the turn before is answered.
    """

    rows: tuple[TaskRow, ...]
    tasks: tuple[str, ...]
    transport: Transport
    conversation: bool = False

    @property
    def composite(self) -> bool:
        """Whether it is made of several tasks."""
        return len(self.rows) > 1

    @property
    def turns(self) -> tuple[str, ...]:
        """What the user says; each turn gets an answer."""
        if self.conversation or not self.composite:
            return tuple(row.prompt for row in self.rows)
        order = _COMPOSITE_ORDER.format(count=len(self.rows))
        return ("\n\n".join([order, *numbered([row.prompt for row in self.rows])]),)

    @property
    def gold(self) -> tuple[str, ...]:
        """The right answer to each row."""
        return tuple(row.target for row in self.rows)

    @property
    def max_tokens(self) -> int:
        """Most tokens an answer may have."""
        return _COMPOSITE_TOKENS if self.composite and not self.conversation else _ANSWER_TOKENS


def read_questions(data: Path, experts: Sequence[str]) -> list[Question]:
    """The demo's prompts: one or more for each expert, over all transports in turn, and the two composite ones last.

    Args:
        data: Folder with ``<expert>.jsonl.gz`` for each expert.
        experts: The bank's experts, named after their tasks. The composite ones are of the first three.

    Raises:
        CheckpointError: The folder, or the file of an expert, is missing or holds too few rows.
    """
    if not data.is_dir():
        raise CheckpointError(data, "there is no such folder; run the demo in a checkout of the repository")
    count = max(SINGLE_PROMPTS, len(experts))
    rounds = -(-count // len(experts))
    rows = {task: short_rows(data / f"{task}.jsonl.gz", rounds + 1) for task in experts}
    questions = []
    for index in range(count):
        turn, place = divmod(index, len(experts))
        task = experts[place]
        # shifted every round, so that a task meets another transport in the next one
        questions.append(Question((rows[task][turn],), (task,), TRANSPORTS[(index + turn) % len(TRANSPORTS)]))
    joined = tuple(experts[:COMPOSITE_TASKS])
    last = tuple(rows[task][rounds] for task in joined)
    return [*questions, Question(last, joined, "grpc_stream"), Question(last, joined, "http_stream", conversation=True)]


def short_rows(path: Path, count: int) -> list[TaskRow]:
    """The first ``count`` rows, in file order, among the shortest held-out ones of a task.

    Raises:
        CheckpointError: The file is missing, or holds too few rows.
    """
    if not path.is_file():
        raise CheckpointError(path, "there is no such file; the demo needs the rows of every expert's task")
    _, held_out = split(read_task(path))
    lengths = sorted(len(row.prompt) for row in held_out)
    longest = lengths[int(len(lengths) * SHORT_SHARE)] if lengths else 0
    short = [row for row in held_out if len(row.prompt) <= longest][:count]
    if len(short) < count:
        raise CheckpointError(path, f"has {len(short)} short held-out rows; the demo needs {count}")
    return short


def numbered(texts: Sequence[str]) -> list[str]:
    """The texts with their numbers; a single one stays as it is."""
    return [f"{number}. {text}" for number, text in enumerate(texts, 1)] if len(texts) > 1 else list(texts)
