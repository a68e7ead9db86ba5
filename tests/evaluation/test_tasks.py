"""Task rows: prompt, split and score."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from meteora_dist.evaluation.tasks import TaskRow, read_task, split


def test_choices_are_listed_unless_the_question_lists_them() -> None:
    assert TaskRow("Which?", "a", ("a", "b")).prompt == "Which?\nchoice: a\nchoice: b"
    assert TaskRow("Is it apple or pear?", "pear", ("apple", "pear")).prompt == "Is it apple or pear?"
    assert TaskRow("How many?", "two").prompt == "How many?"


@pytest.mark.parametrize(
    ("target", "answer", "score"),
    [
        ("Valid", " valid ", 1.0),
        ("Karl.", "Karl", 1.0),
        ("Valid", "Invalid", 0.0),
        ("two", "", 0.0),
        ("Yes. Frogs do.", "Yes. Because they can.", 1.0),
        ("Yes. Frogs do.", "No.", 0.0),
        ("Yes. Frogs do.", "Maybe yes.", 0.0),
        ("Yesterday", "Yes", 0.0),
    ],
)
def test_score(target: str, answer: str, score: float) -> None:
    assert TaskRow("?", target).score(answer) == score


def test_a_file_is_read_in_order_and_its_end_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl.gz"
    rows = [{"input": f"q{i}", "target": "t", "choices": None if i else ["t", "u"]} for i in range(12)]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    train, test = split(read_task(path))
    assert train[0] == TaskRow("q0", "t", ("t", "u"))
    assert [row.input for row in test] == ["q10", "q11"]
    assert len(train) == 10
