"""A local service under load: what is counted as growth, and both commands on the tiny model."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from meteora_dist.bank import Bank
from meteora_dist.bench.load import Call
from meteora_dist.bench.load_report import report
from meteora_dist.bench.local_load import LocalLoadPlan, MemoryRow, memory_rows
from meteora_dist.cli.bench_local import _missed
from meteora_dist.cli.main import main


def test_growth_counts_from_the_end_of_the_warm_up_to_the_highest() -> None:
    samples = [(float(second), {"rank": size}) for second, size in enumerate([10, 90, 100, 104, 110, 102])]
    assert memory_rows(samples, 1.5, {"rank": 2}) == [MemoryRow("rank", 2, 100, 110, 0.1)]


def test_what_a_load_did_not_reach_is_named() -> None:
    flat, grown = MemoryRow("rank", 1, 100, 105, 0.05), MemoryRow("proxy", 1, 100, 106, 0.06)
    calls = [Call("auto", 0.0, 1.0, pieces=[0.5]), Call("auto", 0.0, 0.2, "429")]
    (row,) = report(calls)
    assert _missed(row, [flat], True) == []
    (slow,) = report([*calls, Call("auto", 0.0, 0.3, "429"), Call("auto", 0.0, 1.0, "503")])
    assert _missed(slow, [flat, grown], False) == [
        "a longer --warm-up is needed: not every stream had a whole answer at its end",
        "1 requests failed: 503",
        "p99 of a refusal is 300 ms, above 200",
        "the proxy grew by 6.0%, more than 5%",
    ]
    assert _missed(replace(row, errors={"503": 2}), [], True) == ["2 requests failed: 503"]


def test_a_warm_up_gives_every_stream_an_answer() -> None:
    plan = LocalLoadPlan(streams=2, warm_up_s=5.0)
    calls = [Call("auto", 10.0, 12.0), Call("auto", 10.0, 10.1, "429"), Call("auto", 10.0, 15.0)]
    assert plan.warmed_up(calls)
    assert not plan.warmed_up([*calls[:2], Call("auto", 10.0, 15.5)])


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_home")
def test_both_commands_on_a_service_of_their_own(
    tiny_base: Path, tiny_bank: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.json"

    def rows(*words: str) -> list[dict[str, object]]:
        common = ["--model", str(tiny_base), "--bank", str(tiny_bank.path), "--json", str(file)]
        monkeypatch.setattr(sys, "argv", ["meteora", "bench", *words, *common])
        with pytest.raises(SystemExit):
            main()
        found: list[dict[str, object]] = json.loads(file.read_text())
        return found

    engine, http = rows("frontend", "--repeats", "1", "--tokens", "16")
    assert (engine["way"], http["way"], engine["of_engine"]) == ("engine", "http", 1.0)
    assert 0 < http["of_engine"] < 1.5  # type: ignore[operator]
    assert set(http["cpu_ms_per_token"]) == {"rank", "replica", "proxy", "caller"}  # type: ignore[call-overload]
    size = ["--streams", "4", "--knocking", "2", "--warm-up", "2", "--duration", "2", "--answer-tokens", "8"]
    load, *memory = rows("load", "--ep", "1", *size)
    assert load["errors"] == {}
    assert load["completed"] > 4  # type: ignore[operator]
    assert load["rejected"] > 0  # type: ignore[operator]
    assert {(row["role"], row["processes"]) for row in memory} == {("replica", 1), ("rank", 1), ("proxy", 1)}
