"""The committed stubs are those of the committed proto."""

from __future__ import annotations

from pathlib import Path

from meteora_dist.serving.proto.generate import ROOT, generate


def test_regenerating_changes_nothing(tmp_path: Path) -> None:
    stubs = generate(tmp_path)
    assert len(stubs) == 3
    for stub in stubs:
        assert stub.read_text() == (ROOT / stub.relative_to(tmp_path)).read_text(), f"run make proto: {stub.name}"
