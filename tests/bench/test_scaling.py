"""The scaling benchmark measures what it says, on the tiny model; its speeds prove nothing here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from meteora_dist.bank import Bank
from meteora_dist.cli.main import main


def test_both_worlds_are_measured(
    tiny_base: Path, tiny_bank: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "scaling.json"
    options = ["--model", str(tiny_base), "--bank", str(tiny_bank.path), "--requests", "3", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["meteora", "bench", "scaling", *options, "--tokens", "3", "--repeats", "1"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    one, two = json.loads(file.read_text())
    assert (one["ep"], one["threads"], one["requests"]) == (1, 2, 3)
    assert (two["ep"], two["threads"], two["requests"]) == (2, 1, 3)
    assert one["exchange_share"] == 0 < two["exchange_share"] < 1
    assert min(one["tokens_per_s"], two["tokens_per_s"]) > 0
