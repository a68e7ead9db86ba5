"""The decode benchmark measures what it says, on the tiny model; its speeds prove nothing here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from meteora_dist.bank import Bank
from meteora_dist.bench.decode import DecodePlan, measure_decode
from meteora_dist.bench.modes import modes_of
from meteora_dist.bench.prefill import PrefillPlan, measure_prefill
from meteora_dist.cli.main import main
from meteora_dist.engine.config import EngineConfig
from meteora_dist.moe.routing import named

MODES = ["base", "named", "named in turn", "auto top-1", "auto top-2"]


async def test_every_mode_at_every_batch_size(tiny_base: Path, tiny_bank: Bank) -> None:
    plan = DecodePlan(batches=(1, 3), tokens=4, repeats=2)
    steps: list[int] = []
    config = EngineConfig(model=tiny_base, bank=tiny_bank.path, kv_cache_tokens=4096)
    rows = await measure_decode(config, plan, lambda: steps.append(1))
    assert [(row.batch, row.mode, row.experts) for row in rows] == [(b, mode, 4) for b in (1, 3) for mode in MODES]
    assert all(row.tokens_per_s > 0 for row in rows)
    assert [row.of_base for row in rows if row.mode == "base"] == [1, 1]
    assert len(steps) == plan.rounds


async def test_prompts_alone_in_every_mode(tiny_base: Path, tiny_bank: Bank) -> None:
    plan = PrefillPlan(tokens=50, repeats=1)
    config = EngineConfig(model=tiny_base, bank=tiny_bank.path, kv_cache_tokens=4096)
    rows = await measure_prefill(config, plan, lambda: None)
    assert [row.mode for row in rows] == ["base", "named", "auto top-1", "auto top-2"]
    assert all(row.seconds > 0 for row in rows)


def test_the_requests_of_a_batch_name_adapters_in_turn() -> None:
    assert modes_of(28)["named in turn"] == tuple(named(expert) for expert in range(8))
    assert modes_of(3)["named in turn"] == tuple(named(expert) for expert in range(3))


def test_the_command_writes_its_rows(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "decode.json"
    options = ["--model", str(tiny_base), "--experts", "6", "--rank", "2", "--batch", "2", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["meteora", "bench", "decode", *options, "--tokens", "3", "--repeats", "1"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    rows = json.loads(file.read_text())
    assert [(row["mode"], row["experts"]) for row in rows] == [(mode, 6) for mode in MODES]
    assert set(rows[0]) == {"mode", "batch", "experts", "tokens_per_s", "of_base", "peak_bytes"}
