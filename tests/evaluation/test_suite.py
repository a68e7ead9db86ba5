"""Task files of every kind, and what is said of bad ones: the file, and the line or the example."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meteora_dist.errors import DatasetError, EvaluationError
from meteora_dist.evaluation.bigbench import read_bigbench
from meteora_dist.evaluation.suite import load_suite
from meteora_dist.evaluation.tasks import TaskRow


def write_rows(path: Path, count: int) -> Path:
    rows = [{"input": f"question {i}", "target": f"answer {i}", "choices": None} for i in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def write_bigbench(path: Path, examples: object, **more: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"name": "t", "examples": examples, **more}))
    return path


def test_bigbench_takes_the_best_choice_or_the_first_target(tmp_path: Path) -> None:
    examples = [
        {"input": "Which?", "target_scores": {"a": 0, "b": 1, "c": 1}},
        {"input": "Who?", "target": ["Ada", "Ada Lovelace"]},
        {"input": "Where?", "target": "here"},
    ]
    rows = read_bigbench(write_bigbench(tmp_path / "task.json", examples, task_prefix="Say: "))
    assert rows == [
        TaskRow("Say: Which?", "b", ("a", "b", "c"), ("c",)),
        TaskRow("Say: Who?", "Ada", (), ("Ada Lovelace",)),
        TaskRow("Say: Where?", "here"),
    ]
    assert [row.score(answer) for row in rows for answer in ("c", "ada lovelace", "a")] == [1, 0, 0, 0, 1, 0, 0, 0, 0]


def test_a_folder_holds_files_tasks_and_subtasks(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", 10)
    example = [{"input": "q", "target": "t"}] * 5
    write_bigbench(tmp_path / "one" / "task.json", example)
    write_bigbench(tmp_path / "many" / "first" / "task.json", example)
    write_bigbench(tmp_path / "many" / "second" / "task.json", example)
    tasks = load_suite([tmp_path])
    assert [(task.name, len(task.training), len(task.rows)) for task in tasks] == [
        ("many", 8, 2),
        ("one", 4, 1),
        ("rows", 8, 2),
    ]
    assert [task.name for task in load_suite([tmp_path / "one"])] == ["one"]
    assert [task.name for task in load_suite([tmp_path / "one" / "task.json"])] == ["one"]


def test_rows_are_the_first_held_out_ones_or_the_first_of_all(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", 20)
    (task,) = load_suite([file], rows=2)
    assert [row.input for row in task.rows] == ["question 16", "question 17"]
    (task,) = load_suite([file], rows=2, held_out=False)
    assert [row.input for row in task.rows] == ["question 0", "question 1"]
    assert task.training == ()


def test_metrics_go_by_the_papers_lists_and_by_what_is_asked_for(tmp_path: Path) -> None:
    for name in ("strategyqa", "winowhy", "object_counting"):
        write_rows(tmp_path / f"{name}.jsonl", 5)
    tasks = load_suite([tmp_path], names=("object_counting", "strategyqa", "winowhy"), text=("winowhy",))
    assert [(task.name, task.paper_metric, task.text) for task in tasks] == [
        ("object_counting", "containment", False),
        ("strategyqa", "exact_match", True),
        ("winowhy", "exact_match", True),
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"input": "q", "target": "t"', "line 2 is not valid JSON"),
        ('["q", "t"]', "line 2 is a JSON list"),
        ('{"input": "q"}', "line 2 must have input and target"),
        ('{"input": "", "target": "t"}', "line 2 must have input and target"),
        ('{"input": "q", "target": "t", "choices": [1]}', "line 2 has choices [1]"),
    ],
    ids=["json", "list", "no-target", "empty", "choices"],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"input": "q", "target": "t"}\n' + line + "\n")
    with pytest.raises(DatasetError) as error:
        load_suite([file])
    assert str(error.value).startswith(f"{file}: {said}")


@pytest.mark.parametrize(
    ("examples", "said"),
    [
        ([], 'has no "examples"'),
        ([{"input": "q", "target": "t"}, {"target": "t"}], "example 2 must be an object whose input"),
        ([{"input": "q", "target": []}], "example 1 has the target []"),
        ([{"input": "q", "target_scores": {"a": "1"}}], "example 1 has target_scores"),
    ],
    ids=["none", "input", "target", "scores"],
)
def test_a_bad_example_is_named(tmp_path: Path, examples: object, said: str) -> None:
    file = write_bigbench(tmp_path / "task.json", examples)
    with pytest.raises(DatasetError) as error:
        read_bigbench(file)
    assert str(error.value).startswith(f"{file}: {said}")


def test_missing_files_unknown_names_and_doubles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"gone\.jsonl: there is no such file"):
        load_suite([tmp_path / "gone.jsonl"])
    with pytest.raises(EvaluationError, match=r"no \.jsonl"):
        load_suite([tmp_path])
    file = write_rows(tmp_path / "rows.jsonl", 5)
    with pytest.raises(EvaluationError, match=r"there is no task 'other' in .*; there are rows"):
        load_suite([file], names=("other",))
    with pytest.raises(EvaluationError, match="two tasks are called rows"):
        load_suite([file, tmp_path])
    with pytest.raises(DatasetError, match="has 2 rows, too few to hold out a fifth"):
        load_suite([write_rows(tmp_path / "few.jsonl", 2)])
