"""What the scripts of this folder share: the eight tasks in bank order, their files and mixtures, the encoding."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from meteora_dist.evaluation.prompts import encode
from meteora_dist.evaluation.tasks import TaskRow, read_task, split

__all__ = ["BASE_ID", "DATA", "TASKS", "encode", "mixture", "task_rows"]

BASE_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

TASKS = (
    "logical_deduction",
    "question_selection",
    "strategyqa",
    "goal_step_wikihow",
    "contextual_parametric_knowledge_conflicts",
    "object_counting",
    "unit_conversion",
    "cs_algorithms",
)

DATA = Path(__file__).parent / "data"


def task_rows(name: str) -> tuple[list[TaskRow], list[TaskRow]]:
    """Training rows and held-out rows of a task."""
    return split(read_task(DATA / f"{name}.jsonl.gz"))


def mixture(tasks: Sequence[Sequence[TaskRow]], balanced: bool, seed: int, most: int = 1000) -> list[TaskRow]:
    """Training rows of all tasks together: all of them, or equally many of each.

    Args:
        tasks: The training rows of every task.
        balanced: Whether each gives as many as the smallest one has, and no more than ``most``.
        seed: Of which rows these are.
        most: 1,000 in MeteoRA's LoRA-B.
    """
    if not balanced:
        return [row for rows in tasks for row in rows]
    rng, count = random.Random(seed), min(most, *(len(rows) for rows in tasks))
    return [row for rows in tasks for row in rng.sample(list(rows), count)]
