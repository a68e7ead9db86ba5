"""Numbered records: one writer a number, however many try."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from meteora_dist.errors import BankError
from meteora_dist.serving.records import Records

NUMBERS = 20
WRITERS = 4


def write_all(folder: Path, author: str) -> list[int]:
    """The numbers that were this author's."""
    records = Records(folder, "change")
    return [number for number in range(1, NUMBERS + 1) if records.write(number, {"by": author}, author)]


def test_of_several_processes_exactly_one_writes_each_number(tmp_path: Path) -> None:
    authors = [f"author-{number}" for number in range(WRITERS)]
    with ProcessPoolExecutor(WRITERS) as pool:
        won = list(pool.map(write_all, [tmp_path] * WRITERS, authors))
    assert sorted(number for numbers in won for number in numbers) == list(range(1, NUMBERS + 1))
    records = Records(tmp_path, "change")
    assert records.newest() == NUMBERS
    for author, numbers in zip(authors, won, strict=True):
        assert {records.read(number)["by"] for number in numbers} <= {author}
    assert not list(tmp_path.glob(".*"))


def test_a_record_whose_answer_was_lost_is_known_as_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(move: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
        def moved(source: Path, place: Path) -> None:
            move(source, place)
            move(source, place)

        return moved

    monkeypatch.setattr(os, "rename", twice(os.rename))
    assert Records(tmp_path, "change").write(1, {"by": "me"}, "me")
    assert not Records(tmp_path, "change").write(1, {"by": "you"}, "you")


def test_what_cannot_be_written_is_no_conflict(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BankError, match="change-1: cannot be written"):
        Records(tmp_path / "file", "change").write(1, {}, "me")
    with pytest.raises(BankError, match="file: cannot be read"):
        Records(tmp_path / "file", "change").newest()
    assert Records(tmp_path / "none", "change").newest() == 0


def test_old_records_go_and_their_numbers_are_not_the_newest_again(tmp_path: Path) -> None:
    records = Records(tmp_path, "change")
    for number in (1, 2, 1001, 1002):
        records.write(number, {}, "me")
    (tmp_path / "change-x").mkdir()
    records.prune()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["change-1001", "change-1002", "change-x"]
    assert records.newest() == 1002
