"""Requests share cached prefixes, and only with requests of the same routing: tokens stay those of a plain loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from meteora_dist.bank import Bank
from meteora_dist.engine.config import EngineConfig
from meteora_dist.engine.rank import SHARED_PAGE_TOKENS, RankEngine
from meteora_dist.engine.request import GenerationRequest
from meteora_dist.moe.inject import inject
from tests.engine.test_rank import CHOICES, collect, plain_loop, together, tokens
from tests.support.tiny import load_tiny_llama

COMMON = tuple((11 * place + 3) % 250 for place in range(3 * SHARED_PAGE_TOKENS + 5))
REQUESTS = [
    GenerationRequest(f"{row}-{number}", (*COMMON, 7 + row, 9), 5, routing=choice)
    for row in range(2)
    for number, choice in enumerate(CHOICES)
]


@pytest.fixture(scope="module")
def engine(tiny_base: Path, tiny_bank: Bank) -> Iterator[RankEngine]:
    config = EngineConfig(
        model=tiny_base, bank=tiny_bank.path, max_batch_tokens=64, kv_cache_tokens=4096, share_prefixes=True
    )
    engine = RankEngine(config)
    yield engine
    engine.stop()


@pytest.fixture
def passed(engine: RankEngine, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many tokens of each request's prompt and answer went through the model."""
    counts: dict[str, int] = {}
    step = engine._manager._step

    def counting(processor, futures, requests, slots) -> None:  # type: ignore[no-untyped-def]
        for future, request in zip(futures, requests, strict=True):
            counts[request.request_id] = counts.get(request.request_id, 0) + future.query_length
        step(processor, futures, requests, slots)

    monkeypatch.setattr(engine._manager, "_step", counting)
    return counts


async def test_shared_prefixes_leave_the_tokens_as_they_are(
    engine: RankEngine, passed: dict[str, int], tiny_base: Path, tiny_bank: Bank
) -> None:
    routed = inject(load_tiny_llama(tiny_base), tiny_bank, torch.float32)
    expected = [plain_loop(routed, request) for request in REQUESTS]
    assert len({tuple(answer) for answer in expected}) > len(CHOICES)
    half = len(CHOICES)
    first, second = REQUESTS[:half], REQUESTS[half:]
    assert [tokens(events) for events in await together(engine, first)] == expected[:half]
    # Nobody finds another routing's pages, and everybody its own.
    assert [passed[one.request_id] for one in first] == [len(COMMON) + 1 + len(e) for e in expected[:half]]
    assert [tokens(events) for events in await together(engine, second)] == expected[half:]
    shared = 3 * SHARED_PAGE_TOKENS
    assert [passed[one.request_id] for one in second] == [len(COMMON) + 1 - shared + len(e) for e in expected[half:]]


async def test_a_vote_reads_its_whole_prompt(engine: RankEngine, passed: dict[str, int]) -> None:
    plain = replace(REQUESTS[0], request_id="plain", max_tokens=1)
    await collect(engine, plain)
    ballots = [replace(plain, request_id=f"vote-{number}", vote="gates") for number in range(2)]
    shares = [(await collect(engine, one))[0].shares for one in ballots]
    assert shares[0] == shares[1]
    assert [passed[one.request_id] for one in ballots] == [len(plain.prompt_ids)] * 2
