"""``meteora train gates`` as it is typed: a bank from start to end, and what it says of a run that is there already."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from meteora_dist.bank import Bank
from meteora_dist.cli.main import build_app
from meteora_dist.cli.train_display import held_out, last_metrics, line
from meteora_dist.errors import BankError, TrainingError
from tests.support.tasks import write_tasks


def test_from_adapters_to_a_bank(tiny_base: Path, tiny_bank: Bank, tmp_path: Path) -> None:
    arguments = ["train", "gates", "--base", str(tiny_base), "--adapters", str(tiny_bank.path / "experts")]
    arguments += ["--data", str(write_tasks(tmp_path / "data")), "--run", str(tmp_path / "run")]
    for pair in ("steps=4", "dtype=float32", "zero_stage=3", "activation_checkpointing=true", "log_every=2"):
        arguments += ["--set", pair]
    app = build_app(arguments)
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "bank")])
    assert result.exit_code == 0, result.exception
    assert "4 experts, 14 gates" in result.output
    assert "held-out rows: loss" in result.output
    bank = Bank.open(tmp_path / "bank")
    bank.check_base(tiny_base)
    # Nothing is trained twice, nor overwritten.
    there = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "bank")])
    assert isinstance(there.exception, BankError)
    again = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "again")])
    assert again.exit_code == 0, again.exception
    assert Bank.open(tmp_path / "again").manifest == bank.manifest
    other = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "other"), "--set", "seed=1"])
    assert isinstance(other.exception, TrainingError)


def test_what_the_bar_says(tmp_path: Path) -> None:
    assert last_metrics(tmp_path) == {}
    # A line is read once it is whole.
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    assert last_metrics(tmp_path) == {"step": 1, "loss": 0.5}
    metrics = {"step": 2, "loss": 0.25, "gate_ce/layer/0": 1.0, "held_out/loss": 0.125, "held_out/gate_ce/layer/0": 1.0}
    assert line(metrics) == "loss 0.2500"
    assert line(held_out(metrics)) == "loss 0.1250"
