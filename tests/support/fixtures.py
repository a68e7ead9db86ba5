"""Fixtures every part of the test suite shares."""

from __future__ import annotations

from pathlib import Path

import pytest

from meteora_dist.bank import Bank
from tests.support.tiny import write_tiny_bank, write_tiny_llama


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny-base"))


@pytest.fixture(scope="session")
def tiny_bank(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """A bank of four random experts for it: mixed ranks and alphas, rsLoRA, missing modules."""
    return write_tiny_bank(tiny_base, tmp_path_factory.mktemp("tiny-bank"))
