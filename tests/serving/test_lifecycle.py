"""Experts come and go in a running service over real ranks of a tiny model, and no request notices."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from meteora_cluster.local import local_ray
from meteora_dist.bank import Bank, NewExpert
from meteora_dist.engine.request import GenerationRequest, Sampling
from meteora_dist.moe.residency import Residency
from meteora_dist.observability.metrics import Nowhere
from meteora_dist.serving.catalog import Catalog
from meteora_dist.serving.config import ServiceConfig
from meteora_dist.serving.experts import ExpertAdmin
from meteora_dist.serving.gate import Gate
from meteora_dist.serving.generations import Generations
from meteora_dist.serving.keys import ANONYMOUS
from meteora_dist.serving.limits import Limits
from meteora_dist.serving.request import TextRequest
from meteora_dist.serving.selection import select
from meteora_dist.serving.service import TextService
from meteora_dist.serving.sharing import Sharing
from meteora_dist.serving.tokenizer import TextTokenizer
from meteora_dist.serving.world import World
from tests.support.tiny import SPECS, Spec, write_adapter

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

CHANGES = 50
TOKENS = 40


def greedy(prompt: str, model: str, top_k: int | None = None, trace: bool = False) -> TextRequest:
    return TextRequest(
        (prompt,), model, select(model, top_k=top_k), max_tokens=TOKENS, sampling=Sampling(temperature=0), trace=trace
    )


STREAMS = [
    greedy(f"stream {number}", model, top_k, trace)
    for number, (model, top_k, trace) in enumerate(
        [
            *(("auto", None, True), ("auto", 1, False), ("auto", 4, True), ("base", None, False)),
            *(("plain", None, True), ("auto-sequence", None, False), ("rooted:0.5,wide:1", None, True)),
            ("partial", None, False),
        ]
    )
]
PATIENCE_S = 120


@pytest.fixture(scope="module")
def own_ray(ray_home: Path) -> Iterator[None]:
    with local_ray(cpus=2):
        yield


@pytest.fixture(scope="module")
def extra(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> NewExpert:
    return NewExpert(write_adapter(tiny_base, tmp_path_factory.mktemp("extra"), Spec(6, 12), seed=31))


@dataclass
class Served:
    """A service as its replica sees it."""

    world: World
    service: TextService
    admin: ExpertAdmin
    kept: Path


@dataclass(frozen=True)
class Answer:
    """What one request got: its text, its experts, and the generations that were the newest at its start and end."""

    text: str
    experts: tuple[str, ...]
    began: int
    ended: int


@asynccontextmanager
async def serving(base: Path, bank: Bank, kept: Path, **mesh: int) -> AsyncIterator[Served]:
    config = ServiceConfig(
        model=base,
        bank=bank.path,
        rank_cpus=0.5,
        max_batch_tokens=64,
        kv_cache_tokens=4096,
        max_batch_requests=12,
        rebuild_wait_s=PATIENCE_S,
        generations=kept,
        **mesh,
    )
    world = await World.launch(config, Residency.of(bank, config.ep))
    sharing = Sharing(Generations(bank.path, kept), 0.02, Nowhere())
    try:
        await sharing.join()
        gate = Gate(None, anonymous=True)
        service = TextService(
            world, TextTokenizer.open(base), Catalog(bank.manifest), Limits(512, max_live_requests=64), gate
        )
        admin = ExpertAdmin(world, service, sharing.generations, bank)
        sharing.serve(admin)
        yield Served(world, service, admin, kept)
    finally:
        sharing.stop()
        world.stop()


async def ask(served: Served, request: TextRequest) -> Answer:
    began = served.admin.manifest.generation
    pieces = [piece async for piece in served.service.pieces(await served.service.prepare(request, ANONYMOUS))]
    for token in (token for piece in pieces for token in piece.tokens):
        assert len(token.shares) == len(pieces[0].experts)
        assert sum(token.shares) > 0
    text = "".join(piece.text for piece in pieces)
    return Answer(text, pieces[0].experts, began, served.admin.manifest.generation)


async def settled(served: Served) -> None:
    """Returns once the newest generation is the only one on the ranks and on the disk."""
    async with asyncio.timeout(PATIENCE_S):
        while len(served.admin.live) > 1 or len(list(served.kept.glob("generation-*"))) > 1:
            await asyncio.sleep(0.05)


async def resident(served: Served) -> list[tuple[int, int]]:
    return [(report.expert_bytes, report.gate_bytes) for report in await served.world.reports()]


async def test_fifty_changes_touch_no_token_of_eight_streams(
    own_ray: None, tiny_base: Path, tiny_bank: Bank, extra: NewExpert, tmp_path: Path
) -> None:
    async with serving(tiny_base, tiny_bank, tmp_path / "kept", ep=2) as served:
        admin, start = served.admin, await resident(served)
        expected = {}
        for change in (None, admin.add("extra", extra), admin.remove("extra")):
            if change is not None:
                await change
            for request, answer in zip(STREAMS, await asyncio.gather(*(ask(served, r) for r in STREAMS)), strict=True):
                assert expected.setdefault((request, answer.experts), answer.text) == answer.text
        assert len(expected) == 2 * len(STREAMS)

        done, during = asyncio.Event(), []

        async def stream(request: TextRequest) -> None:
            while not done.is_set():
                during.append((request, await ask(served, request)))

        streams = [asyncio.ensure_future(stream(request)) for request in STREAMS]
        began = time.monotonic()
        for number in range(CHANGES - 2):
            await (admin.add("extra", extra) if number % 2 == 0 else admin.remove("extra"))
        print(f"{CHANGES - 2} changes in {time.monotonic() - began:.1f} s")
        done.set()
        await asyncio.gather(*streams)
        assert [answer.text for _, answer in during] == [expected[request, a.experts] for request, a in during]
        assert {request for request, _ in during} == set(STREAMS)
        assert {answer.experts for _, answer in during} == {tuple(SPECS), (*SPECS, "extra")}
        assert any(answer.began < answer.ended for _, answer in during)

        assert admin.manifest.generation == CHANGES + 1
        await settled(served)
        assert await resident(served) == start
        listed = await admin.list()
        assert sum(status.resident_bytes for status in listed) == sum(experts for experts, _ in start)
        assert all(status.routed > 0 for status in listed)
        moved = await admin.rebalance()
        again = await admin.list()
        assert sum(now.groups != before.groups for now, before in zip(again, listed, strict=True)) == moved
        assert (await ask(served, STREAMS[0])).text == expected[STREAMS[0], tuple(SPECS)]


async def test_a_tp_group_is_rebuilt_with_the_bank_that_is_in_force(
    own_ray: None, tiny_base: Path, tiny_bank: Bank, extra: NewExpert, tmp_path: Path
) -> None:
    async with serving(tiny_base, tiny_bank, tmp_path / "kept", tp=2) as served:
        await served.admin.add("extra", extra)
        await settled(served)
        held = await resident(served)
        requests = [greedy("stream", "extra"), greedy("stream", "auto", trace=True)]
        undisturbed = [await ask(served, request) for request in requests]
        ids = TextTokenizer.open(tiny_base).encode("stream")
        live = served.world.generate(GenerationRequest("live", ids, TOKENS, ignore_eos=True))
        await anext(live)
        answers = asyncio.gather(*(ask(served, request) for request in requests))
        actors = served.world._crew.result()._actors
        os.kill((await actors[1].whereabouts.remote()).pid, signal.SIGKILL)
        assert await answers == undisturbed
        assert len([event async for event in live]) == TOKENS - 1
        assert set(actors).isdisjoint(served.world._crew.result()._actors)
        assert await resident(served) == held
        removed = await served.admin.remove("extra")
        await settled(served)
        assert served.admin.live == (removed.generation,)
