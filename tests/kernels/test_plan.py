"""The plan: the bank alone decides the regime, and tokens only who computes what."""

from __future__ import annotations

from dataclasses import fields

import pytest

from meteora_kernels.launch import DEFAULT, launch_of, tiles_of
from meteora_kernels.routed_lora.plan import plan

COLUMNS = tiles_of(DEFAULT).dense_columns


@pytest.mark.parametrize(
    ("ranks", "whole", "regime"),
    [
        ([[8] * 28], True, "dense"),
        ([[COLUMNS]], True, "dense"),
        ([[COLUMNS], [1, COLUMNS]], True, "grouped"),
        ([[8] * 28], False, "grouped"),
        ([[8] * 1024], True, "grouped"),
        ([[0, 0]], True, "dense"),
        ([[], []], True, "grouped"),
    ],
)
def test_the_bank_decides_the_regime(ranks: list[list[int]], whole: bool, regime: str) -> None:
    for tokens in (1, 64, 4096):
        assert plan(tokens, ranks, whole, "some GPU").regime == regime


def test_tokens_change_nothing_that_orders_sums() -> None:
    tiles = tiles_of(DEFAULT)
    few, many = launch_of(tiles.few_tokens, tiles), launch_of(tiles.few_tokens + 1, tiles)
    changed = {field.name for field in fields(few) if getattr(few, field.name) != getattr(many, field.name)}
    assert changed == {"rows", "planes", "project_rows"}
    assert (few.planes, many.planes) == (tiles.splits, 1)
    # From 64 rows on a Hopper GPU would be given another instruction.
    assert max(many.project_rows, many.rows) < 64
