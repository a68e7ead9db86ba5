"""Composite questions are made as asked for, and answers to them are taken apart as they were put together."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meteora_dist.errors import EvaluationError
from meteora_dist.evaluation.composite import Composite, compose, numbered, parse_numbered, score
from meteora_dist.evaluation.suite import Task
from meteora_dist.evaluation.tasks import TaskRow


def task(name: str, count: int) -> Task:
    rows = [TaskRow(f"{name} {i}?", f"{name} answer {i}") for i in range(count)]
    return Task(name, tuple(rows[count // 2 :]), tuple(rows[: count // 2]))


TASKS = (task("a", 12), task("b", 12), task("c", 12))


def test_sub_questions_are_numbered_and_examples_come_first() -> None:
    (made,) = compose(TASKS[:2], n=2, count=1, shots=1, seed=0)
    example, answer, asked = made.turns
    assert re.fullmatch(r"1\. a answer [0-5]\n2\. b answer [0-5]", answer)
    assert re.search(r"\n\n1\. a [0-5]\?\n\n2\. b [0-5]\?$", example)
    assert asked.endswith(f"1. {made.rows[0].input}\n\n2. {made.rows[1].input}")
    assert all(row in one.rows for row, one in zip(made.rows, TASKS, strict=False))


def test_any_n_and_no_row_twice_before_all_were_used() -> None:
    made = compose(TASKS, n=7, count=4, shots=2, seed=5)
    assert made[0].tasks == ("a", "b", "c", "a", "b", "c", "a")
    assert len(made[0].turns) == 5
    assert len({one.turns[:4] for one in made}) == 1
    used = [row for one in made for row, name in zip(one.rows, one.tasks, strict=True) if name == "b"]
    assert len(used) == 8
    assert len(set(used[:6])) == 6


def test_the_seed_decides() -> None:
    assert compose(TASKS, 3, 4, 2, seed=1) == compose(TASKS, 3, 4, 2, seed=1)
    assert compose(TASKS, 3, 4, 2, seed=1) != compose(TASKS, 3, 4, 2, seed=2)


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(EvaluationError, match="at least 1, 2 and 0"):
        compose(TASKS, n=1, count=1, shots=0, seed=0)
    with pytest.raises(EvaluationError, match="task a has 6 training rows, too few for 3 shots"):
        compose(TASKS[:1], n=3, count=1, shots=3, seed=0)


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        ("1. one\n2. two\n3. three", ["one", "two", "three"]),
        ("1. one\n goes on\n\nand on\n3) three", ["one\n goes on\n\nand on", "", "three"]),
        ("Sure!\n1. one\n2.\n3. three", ["one", "", "three"]),
        ("11. eleven\n1. one", ["one", "", ""]),
        ("1. one 2. two", ["one 2. two", "", ""]),
        ("1.5 is no number\n2. two", ["", "two", ""]),
        ("2. two\n1. a list\n2. in an answer\n3. three", ["", "two\n1. a list\n2. in an answer", "three"]),
        ("no number at all", ["", "", ""]),
        ("", ["", "", ""]),
    ],
)
def test_parser(text: str, answers: list[str]) -> None:
    assert parse_numbered(text, 3) == answers


def test_the_eleventh_answer_is_not_the_first() -> None:
    answers = [f"answer {i}" for i in range(1, 13)]
    assert parse_numbered(numbered(answers), 12) == answers


line = st.text(st.characters(exclude_categories=("C", "Zl", "Zp")), max_size=12).filter(
    lambda text: not re.match(r"\s*[0-9]", text)
)
answer = st.lists(line, max_size=3).map("\n".join).map(str.strip)


@given(st.lists(answer, min_size=1, max_size=15))
def test_what_is_numbered_is_parsed_back(answers: list[str]) -> None:
    assert parse_numbered(numbered(answers), len(answers)) == answers


def test_attempted_and_correct() -> None:
    rows = (TaskRow("?", "Paris"), TaskRow("?", "Yes. It is."), TaskRow("?", "three"))
    one = Composite(("?",), ("a", "b", "c"), rows)
    found = score(one, "1. paris\n2. No\n")
    assert (found.attempted, found.correct, found.right) == (2, 1, (1, 0, 0))
    assert score(one, one.gold).correct == 3
    assert score(one, "").attempted == 0
