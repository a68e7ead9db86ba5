"""All faults of a bank at once, each with its name; a flipped byte anywhere is one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from meteora_dist.bank import Bank
from meteora_dist.bank.check import faults_of
from tests.bank.conftest import Parts


@pytest.fixture
def bank(parts: Parts, tmp_path: Path) -> Bank:
    return parts.write(tmp_path / "bank")


def flip(file: Path) -> None:
    """Changes the last byte, which belongs to a number."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_sound_bank_has_none_and_every_part_was_looked_at(bank: Bank, parts: Parts) -> None:
    parts_seen: list[str] = []
    assert faults_of(bank.path, parts.base, parts_seen.append) == []
    assert parts_seen == ["plain", "few", "upper", "gates", "routers", "base model"]


@pytest.mark.parametrize(
    "file", ["gates.safetensors", "experts/few/adapter_model.safetensors", "experts/upper/adapter_model.safetensors"]
)
def test_a_flipped_byte_is_named(bank: Bank, file: str) -> None:
    flip(bank.path / file)
    (fault,) = faults_of(bank.path)
    assert str((bank.path / file).parent if file.startswith("experts") else bank.path / file) in fault
    assert "digest" in fault


def test_all_faults_are_found_at_once(bank: Bank) -> None:
    flip(bank.path / "experts/few/adapter_model.safetensors")
    (bank.path / "experts/plain/adapter_config.json").unlink()
    shutil.copytree(bank.path / "experts/upper", bank.path / "experts/stray")
    faults = faults_of(bank.path)
    assert [name for name in ("plain", "few", "stray") if any(f"experts/{name}" in fault for fault in faults)] == [
        "plain",
        "few",
        "stray",
    ]
    assert len(faults) == 3


def test_without_a_manifest_or_with_another_base_model(bank: Bank, parts: Parts, tmp_path: Path) -> None:
    other = tmp_path / "base"
    shutil.copytree(parts.base, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": 33}))
    (fault,) = faults_of(bank.path, other)
    assert "fingerprint" in fault
    (bank.path / "bank.json").unlink()
    (fault,) = faults_of(bank.path)
    assert fault.endswith("bank.json: there is no such file")
