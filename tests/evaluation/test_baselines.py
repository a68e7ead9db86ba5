"""One adapter on all tasks: its rows, and its training as ``examples/train_adapters.py`` does it."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from meteora_dist.adapters import read_adapter
from meteora_dist.evaluation.tasks import TaskRow

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_a_balanced_mixture_takes_equally_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    mixture = importlib.import_module("demo_tasks").mixture
    few, many = [TaskRow(f"few {i}", "t") for i in range(5)], [TaskRow(f"many {i}", "t") for i in range(50)]
    balanced = mixture([few, many], balanced=True, seed=1)
    assert len(balanced) == len(set(balanced)) == 10
    assert sum(row.input.startswith("many") for row in balanced) == 5
    assert balanced == mixture([few, many], balanced=True, seed=1)
    assert balanced != mixture([few, many], balanced=True, seed=2)
    assert len(mixture([few, many], balanced=True, seed=1, most=3)) == 6
    assert mixture([few, many], balanced=False, seed=1) == few + many


def test_a_trained_mixture_is_an_adapter_that_banks_take(
    monkeypatch: pytest.MonkeyPatch, tiny_base: Path, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    training = importlib.import_module("train_adapters")
    rows = [TaskRow(f"q{i}", "yes") for i in range(8)]
    training.train(tiny_base, "lora-b", training.Recipe(2, 4, tokens=200), rows, tmp_path)
    adapter = read_adapter(tmp_path / "lora-b")
    assert {shape.rank for shape in adapter.shapes.values()} == {2}
    # Something was learnt: B starts at zero.
    assert all(adapter.load(module).b_OR.any() for module in adapter.shapes)
