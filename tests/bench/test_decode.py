"""The decode benchmark measures what it says, on the tiny model; its speeds prove nothing here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from meteora_dist.bank import Bank
from meteora_dist.bench.decode import DecodePlan, measure_decode
from meteora_dist.cli.main import main
from meteora_dist.engine.config import EngineConfig


async def test_every_mode_at_every_batch_size(tiny_base: Path, tiny_bank: Bank) -> None:
    plan = DecodePlan(batches=(1, 3), top_k=2, tokens=4, repeats=2)
    steps: list[int] = []
    config = EngineConfig(model=tiny_base, bank=tiny_bank.path, kv_cache_tokens=4096)
    rows = await measure_decode(config, plan, lambda: steps.append(1))
    assert [(row.mode, row.batch, row.experts, row.top_k) for row in rows] == [
        (mode, batch, 4, top_k) for batch in (1, 3) for mode, top_k in (("base", 0), ("named", 1), ("auto", 2))
    ]
    assert all(row.tokens_per_s > 0 for row in rows)
    assert len(steps) == plan.rounds


def test_the_command_writes_its_rows(
    tiny_base: Path, tiny_bank: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "decode.json"
    options = ["--model", str(tiny_base), "--bank", str(tiny_bank.path), "--batch", "2", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["meteora", "bench", "decode", *options, "--tokens", "3", "--repeats", "1"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    rows = json.loads(file.read_text())
    assert [row["mode"] for row in rows] == ["base", "named", "auto"]
    assert set(rows[0]) == {"mode", "batch", "experts", "top_k", "tokens_per_s"}
