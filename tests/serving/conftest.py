"""A text service over an engine that says what the test tells it to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meteora_dist.bank import Bank
from meteora_dist.observability.calls import Observer
from meteora_dist.serving.catalog import Catalog
from meteora_dist.serving.gate import Gate
from meteora_dist.serving.limits import Limits
from meteora_dist.serving.service import TextService
from meteora_dist.serving.tokenizer import TextTokenizer
from tests.serving.asking import gate_of
from tests.serving.scripted import ScriptedEngine, says

MakeService = Callable[..., TextService]


@pytest.fixture(scope="session")
def tokenizer(tiny_base: Path) -> TextTokenizer:
    """One token a byte; ``<s>`` is 258 and ``</s>`` 259."""
    return TextTokenizer.open(tiny_base)


@pytest.fixture
def make_service(tokenizer: TextTokenizer, tiny_bank: Bank) -> MakeService:
    """Makes a service over a scripted engine: a context of 64 tokens, two answers at once, none that waits, no keys."""

    def make(
        engine: ScriptedEngine,
        live: int = 2,
        gate: Gate | None = None,
        observer: Observer | None = None,
        **limits: Any,
    ) -> TextService:
        numbers = {"max_model_len": 64, "max_live_requests": live, "max_waiting_requests": 0} | limits
        gate = gate or Gate(None, anonymous=True)
        return TextService(engine, tokenizer, Catalog(tiny_bank.manifest), Limits(**numbers), gate, observer)

    return make


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    """A gate for the callers of ``asking.ENTRIES``; the key of each is its name."""
    return gate_of(tmp_path)


@pytest.fixture
def guarded(tokenizer: TextTokenizer, make_service: MakeService, gate: Gate) -> TextService:
    """A service behind it that says yes."""
    return make_service(says(tokenizer, "yes"), gate=gate)
