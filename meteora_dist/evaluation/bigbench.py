"""BIG-bench task files: JSON with ``examples``, each with a ``target`` or with ``target_scores`` of its choices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from meteora_dist.adapters.files import read_json_object
from meteora_dist.errors import DatasetError
from meteora_dist.evaluation.tasks import TaskRow


def read_bigbench(path: Path) -> list[TaskRow]:
    """The examples of a BIG-bench ``task.json``, in file order.

    The choice with the highest score is the gold answer, others with the same score are right as well; of a list of
    targets the first is the gold answer. ``task_prefix`` goes before every input.

    Raises:
        DatasetError: The file is missing or no JSON object, has no examples, or one is none; names the example.
    """
    fields = read_json_object(path, DatasetError)
    examples, prefix = fields.get("examples"), fields.get("task_prefix", "")
    if not isinstance(examples, list) or not examples:
        raise DatasetError(path, 'has no "examples"; a BIG-bench task has a list of them')
    if not isinstance(prefix, str):
        raise DatasetError(path, f"task_prefix is {prefix!r}; it must be a text")
    return [_row(path, number, example, prefix) for number, example in enumerate(examples, 1)]


def _row(path: Path, number: int, example: Any, prefix: str) -> TaskRow:
    where = f"example {number}"
    if not isinstance(example, dict) or not isinstance(example.get("input"), str) or not example["input"]:
        raise DatasetError(path, f"{where} must be an object whose input is a text that is not empty")
    scores = example.get("target_scores")
    if scores is None:
        golds, choices = _targets(path, where, example.get("target")), ()
    else:
        golds, choices = _best(path, where, scores), tuple(scores)
    return TaskRow(prefix + example["input"], golds[0], choices, golds[1:])


def _targets(path: Path, where: str, target: Any) -> tuple[str, ...]:
    targets = target if isinstance(target, list) else [target]
    if not targets or not all(isinstance(text, str) and text for text in targets):
        raise DatasetError(path, f"{where} has the target {target!r}; it must be a text, or a list of texts")
    return tuple(targets)


def _best(path: Path, where: str, scores: Any) -> tuple[str, ...]:
    numbers = scores.values() if isinstance(scores, dict) else ()
    if not numbers or not all(isinstance(score, int | float) and not isinstance(score, bool) for score in numbers):
        raise DatasetError(path, f"{where} has target_scores {scores!r}; they must give each choice a number")
    best = max(numbers)
    return tuple(choice for choice, score in scores.items() if score == best)
