"""Layer routers vote in the engine's own passes: in any company, over split prompts, in live generations."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from meteora_dist.bank import Bank, BankEdit, NewExpert, Routers, edit_bank
from meteora_dist.bank.manifest import Pooling
from meteora_dist.bank.routers import ROUTER_ROWS_FILE
from meteora_dist.engine.config import EngineConfig
from meteora_dist.engine.rank import RankEngine
from meteora_dist.engine.request import GenerationRequest
from meteora_dist.errors import InvalidRequest
from meteora_dist.moe.residency import Residency
from meteora_dist.moe.routers import LayerRouters, Span, pool
from meteora_dist.moe.routing import BASE, RoutingChoice, named
from tests.support.tiny import LAYERS, SPECS, Spec, load_tiny_llama, random_routers, write_adapter, write_tiny_bank

EXPERTS = len(SPECS)
BALLOTS = [
    GenerationRequest(f"vote-{i}", tuple((7 * i + k * (i + 1)) % 250 for k in range(length)), 1, vote="routers")
    for i, length in enumerate((1, 9, 33, 75, 64, 20))
]
"""Prompts of up to 75 tokens, where a pass takes 32."""
BALLOTS = [replace(ballot, routing=BASE) for ballot in BALLOTS]
COMPANY = [
    GenerationRequest(f"r{i}", tuple(range(3 + i, 40 + i)), 12, routing=choice, trace=True)
    for i, choice in enumerate((RoutingChoice(), named(2), BASE))
]


def config(base: Path, bank: Bank) -> EngineConfig:
    return EngineConfig(model=base, bank=bank.path, max_batch_tokens=32, kv_cache_tokens=4096, max_batch_requests=12)


def pooled(base: Path, prompt: tuple[int, ...], pooling: Pooling) -> torch.Tensor:
    """What the routers see of a prompt, [L, H], by a plain forward pass of the base model."""
    with torch.no_grad():
        states = load_tiny_llama(base)(torch.tensor([prompt]), output_hidden_states=True).hidden_states
    return torch.cat([pool(hidden[0], [Span(0, len(prompt), pooling)]) for hidden in states[:-1]])


async def vote(engine: RankEngine, ballot: GenerationRequest) -> tuple[int, ...] | None:
    (event,) = [event async for event in engine.generate(ballot)]
    return event.votes


async def answer(engine: RankEngine, request: GenerationRequest) -> list[int]:
    return [event.token_id async for event in engine.generate(request)]


@pytest.mark.parametrize("pooling", ["last", "mean"])
async def test_votes_in_company_over_split_prompts(tiny_base: Path, tmp_path: Path, pooling: Pooling) -> None:
    weights = random_routers(EXPERTS)
    bank = write_tiny_bank(tiny_base, tmp_path, routers=Routers(weights, pooling))
    routers = LayerRouters(torch.stack(list(weights.values())), torch.ones(EXPERTS, dtype=torch.bool), pooling)
    expected = [routers.votes(pooled(tiny_base, ballot.prompt_ids, pooling)) for ballot in BALLOTS]
    assert len(set(expected)) > 2
    engine = RankEngine(config(tiny_base, bank))
    try:
        alone = [await answer(engine, request) for request in COMPANY]
        seen = await asyncio.gather(
            *(vote(engine, ballot) for ballot in BALLOTS), *(answer(engine, request) for request in COMPANY)
        )
        assert list(seen[: len(BALLOTS)]) == expected
        assert list(seen[len(BALLOTS) :]) == alone
        # The rest of a prompt that lost its caller is forgotten.
        stream = engine.generate(replace(BALLOTS[3], request_id="lost"))
        task = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await stream.aclose()
        assert await vote(engine, BALLOTS[3]) == expected[3]
        assert engine._manager._votes._sums == {}
    finally:
        engine.stop()


async def test_a_bank_without_routers_cannot_vote_by_them(tiny_base: Path, tiny_bank: Bank) -> None:
    engine = RankEngine(config(tiny_base, tiny_bank))
    try:
        with pytest.raises(InvalidRequest, match="generation 1 of the bank has no routers that could vote"):
            await vote(engine, BALLOTS[0])
    finally:
        engine.stop()


async def test_each_generation_votes_with_its_own_routers(tiny_base: Path, tmp_path: Path) -> None:
    """An expert is added, with rows that all prompts of ours choose, and removed again, while others vote."""
    first = write_tiny_bank(tiny_base, tmp_path, routers=Routers(random_routers(EXPERTS)))
    folder = shutil.copytree(write_adapter(tiny_base, tmp_path / "plain-extra", Spec(3, 6), 31), tmp_path / "extra")
    prompt = BALLOTS[2].prompt_ids
    rows_LH = 50 * pooled(tiny_base, prompt, "last")
    save_file({f"model.layers.{layer}": rows_LH[layer].clone() for layer in range(LAYERS)}, folder / ROUTER_ROWS_FILE)
    more = edit_bank(first, BankEdit(add={"extra": NewExpert(folder)}), tmp_path / "2")
    bare = edit_bank(
        more, BankEdit(add={"bare": NewExpert(tmp_path / "plain-extra")}, remove=("extra",)), tmp_path / "3"
    )
    engine = RankEngine(config(tiny_base, first))
    over = asyncio.Event()

    async def voting() -> set[tuple[int, ...] | None]:
        seen, number = set(), 0
        while not over.is_set():
            number += 1
            seen.add(await vote(engine, replace(BALLOTS[3], request_id=f"old-{number}", generation=1)))
        return seen

    async def go(number: int, residency: Residency) -> Residency:
        await asyncio.to_thread(engine.prepare, number, residency)
        await asyncio.to_thread(engine.commit, number)
        return residency

    try:
        before = await vote(engine, BALLOTS[3])
        under_load = asyncio.ensure_future(voting())
        residency = await go(1, Residency.of(first, 1).with_bank(more))
        assert await vote(engine, replace(BALLOTS[2], generation=2)) == (EXPERTS,) * LAYERS
        old = await vote(engine, replace(BALLOTS[2], generation=1))
        residency = await go(2, residency.with_bank(bare).without(2))
        # "bare" stands where "extra" stood, and has no rows.
        assert await vote(engine, replace(BALLOTS[2], generation=3)) == old
        with pytest.raises(InvalidRequest, match="generation 2 of the bank is not served"):
            await vote(engine, replace(BALLOTS[2], generation=2))
        over.set()
        assert await under_load == {before}
        await go(3, residency.without(1))
        assert list(engine.routed.routers) == [3]
    finally:
        over.set()
        engine.stop()
