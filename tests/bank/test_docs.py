"""The code in docs/bank-format.md runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from meteora_dist.bank import Bank
from tests.support.tiny import random_gates

PAGE = Path(__file__).parents[2] / "docs" / "bank-format.md"


def test_the_pages_code(tiny_base: Path, tiny_bank: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL))
    (tmp_path / "model").symlink_to(tiny_base)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "poems").symlink_to(tiny_bank.path / "experts" / tiny_bank.names[0])
    names = ("chess", *tiny_bank.names[1:])
    adapters = {name: tiny_bank.path / "experts" / old for name, old in zip(names, tiny_bank.names, strict=True)}
    exec(compile(code, str(PAGE), "exec"), {"adapters": adapters, "gates": random_gates(len(adapters))})
    assert Bank.open(tmp_path / "bank").names == names
    assert Bank.open(tmp_path / "bank-2").names == (*names[1:], "poems")
