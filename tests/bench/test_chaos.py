"""Chaos on the tiny model: no stream over HTTP or gRPC loses or changes a token, whatever happens to a rank."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from meteora_dist.bank import Bank
from meteora_dist.bench.chaos import ChaosPlan, ChaosRow, _changed
from meteora_dist.bench.chaos_callers import Stream
from meteora_dist.cli.main import main


def stream(*tokens: int, ending: tuple[str, int, int] | None = ("length", 1, 3), failure: str | None = None) -> Stream:
    return Stream(list(tokens), text="".join(map(chr, tokens)), ending=ending, failure=failure)


@pytest.mark.parametrize(
    ("got", "changed"),
    [
        (stream(65, 66, 67), 0),
        (stream(65, 99, 67), 1),  # another token
        (stream(65, 66), 1),  # lost
        (stream(65, 65, 66, 67), 3),  # duplicated: what follows is out of place, and one too many
        (stream(65, 66, 67, ending=("stop", 1, 3)), 1),
        (stream(65, failure="UNAVAILABLE"), 0),  # counts as failed
        (stream(70, failure="UNAVAILABLE"), 1),
    ],
)
def test_every_lost_changed_or_added_token_counts(got: Stream, changed: int) -> None:
    assert _changed(got, stream(65, 66, 67)) == changed


def test_a_pause_counts_from_the_fault() -> None:
    # asked at 0; tokens at 1, 2 and 9; the fault at 2.5
    got = Stream(times=[0.0, 1.0, 2.0, 9.0])
    assert got.pause_s(2.5, 20.0) == 6.5
    assert got.pause_s(9.5, 20.0) == 0.0


def test_a_pause_ends_with_the_next_fault() -> None:
    got = Stream(times=[0.0, 1.0, 2.0, 9.0])
    assert got.pause_s(0.5, 4.5) == 2.5
    assert got.pause_s(4.5, 20.0) == 4.5


def test_a_stream_without_a_token_has_not_recovered() -> None:
    assert not Stream(times=[5.0]).has_token_after(4.0)
    assert not Stream(times=[1.0, 3.0]).has_token_after(4.0)
    assert Stream(times=[1.0, 4.0]).has_token_after(4.0)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ray_home")
def test_no_fault_costs_a_token(
    tiny_base: Path, tiny_bank: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "chaos.json"
    options = ["--model", str(tiny_base), "--bank", str(tiny_bank.path), "--callers", "8", "--tokens", "100"]
    monkeypatch.setattr(sys, "argv", ["meteora", "bench", "chaos", *options, "--injections", "1", "--json", str(file)])
    with pytest.raises(SystemExit) as end:
        main()
    rows = [ChaosRow(**row) for row in json.loads(file.read_text())]
    assert [(row.fault, row.failed, row.changed_tokens) for row in rows] == [
        (fault, 0, 0) for fault in ChaosPlan().faults
    ]
    for row in rows:
        assert row.faults_injected == 1
        assert row.requests >= 8
        assert row.recovery_s_max > 0
    assert end.value.code == 0
