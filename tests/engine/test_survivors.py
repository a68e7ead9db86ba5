"""A rank whose neighbour is lost leaves its world, keeps nothing of it, and is of the next one."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from meteora_dist.bank import Bank
from meteora_dist.engine.config import EngineConfig
from meteora_dist.engine.rank import RankEngine
from meteora_dist.engine.request import GenerationRequest
from meteora_dist.errors import EngineUnavailable
from meteora_dist.moe.routing import RoutingChoice
from tests.support.ranks import meet, rendezvous, run_ranks

REQUEST = GenerationRequest("live", tuple(range(3, 23)), 150, routing=RoutingChoice(), ignore_eos=True)
"""Uses all experts, so that a pass needs both ranks; long enough to be under way when one is lost."""


def config_of(folder: Path, bank: Path, ep: int, tp: int) -> EngineConfig:
    return EngineConfig(model=folder, bank=bank, ep=ep, tp=tp, max_model_len=512, kv_cache_tokens=1024)


async def generate(
    engine: RankEngine, request: GenerationRequest, tokens: list[int], at_ten: Callable[[], None] = lambda: None
) -> None:
    async for event in engine.generate(request):
        tokens.append(event.token_id)
        if len(tokens) == 10:
            at_ten()


def survivor(rank: int, base: Path, bank: Path, folder: Path, ep: int, tp: int) -> tuple[list[int], int, list[int]]:
    """Rank 0 of two worlds; its neighbour in the first is process 1, in the second process 2.

    Returns the tokens across both worlds, how many of them are the first one's, and those of a lone rank.
    """
    config = config_of(base, bank, ep, tp)
    if rank == 1:
        engine = RankEngine(config, 1, rendezvous(folder, "first", 1))
        meet(folder, "ten", 1, 2)
        engine.abandon()
        return [], 0, []
    if rank == 2:
        meet(folder, "left", 1, 2)
        engine = RankEngine(config, 1, rendezvous(folder, "second", 1))
        meet(folder, "over", 1, 2)
        engine.stop()
        return [], 0, []
    alone = RankEngine(config_of(base, bank, 1, 1))
    undisturbed: list[int] = []
    asyncio.run(generate(alone, REQUEST, undisturbed))
    alone.stop()
    engine = RankEngine(config, 0, rendezvous(folder, "first", 0))
    tokens: list[int] = []
    with pytest.raises(EngineUnavailable):
        asyncio.run(generate(engine, REQUEST, tokens, lambda: meet(folder, "ten", 0, 2)))
    first = len(tokens)
    engine.abandon()
    model = weakref.ref(engine.routed.model)
    del engine
    gc.collect()
    assert model() is None, "the next engine needs the room"
    meet(folder, "left", 0, 2)
    engine = RankEngine(config, 0, rendezvous(folder, "second", 0))
    asyncio.run(generate(engine, REQUEST.after(tokens), tokens))
    meet(folder, "over", 0, 2)
    engine.stop()
    return tokens, first, undisturbed


@pytest.mark.parametrize(("ep", "tp"), [(2, 1), (1, 2)])
def test_a_rank_outlives_its_world(tiny_base: Path, tiny_bank: Bank, tmp_path: Path, ep: int, tp: int) -> None:
    (tokens, first, undisturbed), _, _ = run_ranks(3, survivor, tiny_base, tiny_bank.path, tmp_path, ep, tp, join=False)
    assert tokens == undisturbed
    assert 10 <= first < 150


def test_a_rank_leaves_while_nobody_has_work(tiny_base: Path, tiny_bank: Bank) -> None:
    engine = RankEngine(config_of(tiny_base, tiny_bank.path, 1, 1))
    engine.abandon()
    with pytest.raises(EngineUnavailable, match="is not running"):
        engine.check()
