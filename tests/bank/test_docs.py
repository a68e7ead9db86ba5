"""The code in docs/bank-format.md runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from meteora_dist.bank import Bank
from tests.support.tiny import random_gates

PAGE = Path(__file__).parents[2] / "docs" / "bank-format.md"


def test_the_pages_code(tiny_base: Path, tiny_bank: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    (tmp_path / "model").symlink_to(tiny_base)
    monkeypatch.chdir(tmp_path)
    adapters = {name: tiny_bank.path / "experts" / name for name in tiny_bank.names}
    exec(compile(code, str(PAGE), "exec"), {"adapters": adapters, "gates": random_gates(len(adapters))})
    assert Bank.open(tmp_path / "bank").names == tiny_bank.names
