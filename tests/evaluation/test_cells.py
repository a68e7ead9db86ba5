"""Cells are measured once, by all that they depend on."""

from __future__ import annotations

from pathlib import Path

import pytest

from meteora_dist.errors import DatasetError
from meteora_dist.evaluation.cells import ROWS_AT_ONCE, Cells


def test_a_cell_is_made_once_for_each_identity(tmp_path: Path) -> None:
    cells, made = Cells(tmp_path / "cells"), []

    def make() -> list[int]:
        made.append(1)
        return [len(made)]

    assert cells.get("top-2 a/b", {"bank": 1}, make) == [1]
    assert Cells(tmp_path / "cells").get("top-2 a/b", {"bank": 1}, make) == [1]
    assert cells.get("top-2 a/b", {"bank": 2}, make) == [2]
    assert sorted(path.suffix for path in (tmp_path / "cells").iterdir()) == [".json", ".json"]


def test_a_value_that_was_never_finished_leaves_no_cell(tmp_path: Path) -> None:
    cells = Cells(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        cells.get("a", {}, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["{", '{"value": 1}', '{"identity": {"other": 1}, "value": 1}'])
def test_a_damaged_cell_is_named(tmp_path: Path, text: str) -> None:
    cells = Cells(tmp_path)
    cells.get("a", {"x": 1}, lambda: 1)
    path = cells.path("a", {"x": 1})
    path.write_text(text)
    with pytest.raises(DatasetError, match=path.name):
        cells.get("a", {"x": 1}, lambda: 1)


def test_a_cell_of_rows_grows_and_is_kept_while_it_does(tmp_path: Path) -> None:
    cells, asked = Cells(tmp_path), []

    def make(places: list[int]) -> list[int]:
        asked.extend(places)
        if len(asked) > ROWS_AT_ONCE:
            raise KeyboardInterrupt
        return [10 * place for place in places]

    keys = [f"row {number}" for number in range(ROWS_AT_ONCE + 2)]
    with pytest.raises(KeyboardInterrupt):
        cells.rows("a", {"x": 1}, keys, make)
    asked.clear()
    assert cells.rows("a", {"x": 1}, keys, make) == [10 * place for place in range(len(keys))]
    assert asked == [ROWS_AT_ONCE, ROWS_AT_ONCE + 1]
    # Fewer rows, another order and a row twice ask for nothing; other identities do.
    assert cells.rows("a", {"x": 1}, ["row 7", "row 3", "row 7"], make) == [70, 30, 70]
    assert len(asked) == 2
    assert cells.rows("a", {"x": 2}, ["row 7"], make) == [0]
