"""What the scripts of this folder share: the eight tasks in bank order, their files, and the chat encoding."""

from __future__ import annotations

from pathlib import Path

from meteora_dist.evaluation.tasks import TaskRow, read_task, split
from meteora_dist.training.data import encode

__all__ = ["BASE_ID", "DATA", "TASKS", "encode", "task_rows"]

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
