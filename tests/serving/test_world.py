"""The world over real Ray actors that stand in for ranks: where requests go, and how they end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from meteora_cluster.group import ActorGroup
from meteora_cluster.local import local_ray
from meteora_cluster.member import Member
from meteora_cluster.placement import Resources
from meteora_dist.engine.request import GenerationRequest, TokenEvent
from meteora_dist.errors import EngineUnavailable, InvalidRequest
from meteora_dist.serving.world import World

pytestmark = pytest.mark.ray


class CountingRank(Member):
    """Produces its own number until the request's limit, as slowly as the request's seed says, in milliseconds."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.live: set[str] = set()

    async def start(self, rendezvous: str) -> None:
        pass

    async def watch(self) -> None:
        await asyncio.sleep(3600)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        self.live.add(request.request_id)
        try:
            if request.prompt_ids == (0,):
                raise InvalidRequest("no zeros", "prompt")
            for left in reversed(range(request.max_tokens)):
                await asyncio.sleep(request.sampling.seed / 1000)
                yield TokenEvent(self.rank, None if left else "length")
        finally:
            self.live.remove(request.request_id)

    async def about(self) -> tuple[int, set[str]]:
        return os.getpid(), self.live


@pytest.fixture(scope="module")
def own_ray(ray_home: Path) -> Iterator[None]:
    with local_ray(cpus=2):
        yield


@pytest.fixture
async def group(own_ray: None) -> ActorGroup:
    return await ActorGroup.launch(CountingRank, [(0,), (1,)], Resources(cpus=0.5), timeout_s=60)


@pytest.fixture
async def world(group: ActorGroup) -> AsyncIterator[World]:
    world = World(group)
    yield world
    world.stop()


def request(name: str, tokens: int, milliseconds: int = 0, prompt: int = 1) -> GenerationRequest:
    plain = GenerationRequest(name, (prompt,), tokens)
    sampling = type(plain.sampling)(seed=milliseconds)
    return GenerationRequest(name, (prompt,), tokens, sampling)


async def test_requests_go_to_the_rank_with_the_fewest(world: World) -> None:
    slow = world.generate(request("slow", 100, 50))
    assert (await anext(slow)).token_id == 0
    assert [event.token_id async for event in world.generate(request("a", 2))] == [1, 1]
    assert [event.token_id async for event in world.generate(request("b", 1))] == [1]
    await slow.aclose()
    assert [event.token_id async for event in world.generate(request("c", 1))] == [0]


async def test_closing_cancels_on_the_rank(world: World, group: ActorGroup) -> None:
    async with aclosing(world.generate(request("gone", 1000, 50))) as events:
        await anext(events)
        assert (await group.actors[0].about.remote())[1] == {"gone"}
    for _ in range(50):
        if not (await group.actors[0].about.remote())[1]:
            return
        await asyncio.sleep(0.1)
    raise AssertionError("the rank still works on a request nobody waits for")


async def test_errors_of_the_rank_arrive_as_they_are(world: World) -> None:
    with pytest.raises(InvalidRequest, match="no zeros") as caught:
        await anext(world.generate(request("bad", 1, prompt=0)))
    assert caught.value.param == "prompt"


async def test_a_lost_rank_ends_every_request_and_all_later_ones(world: World, group: ActorGroup) -> None:
    world.check()
    streams = [world.generate(request(name, 1000, 50)) for name in ("on rank 0", "on rank 1")]
    for stream in streams:
        await anext(stream)
    pid, _ = await group.actors[1].about.remote()
    os.kill(pid, signal.SIGKILL)
    ends = await asyncio.wait_for(asyncio.gather(*map(_drain, streams), return_exceptions=True), timeout=10)
    assert [type(end) for end in ends] == [EngineUnavailable, EngineUnavailable]
    with pytest.raises(EngineUnavailable, match="lost a rank"):
        world.check()
    with pytest.raises(EngineUnavailable, match="lost a rank"):
        await anext(world.generate(request("late", 1)))


async def _drain(stream: AsyncGenerator[TokenEvent, None]) -> None:
    async for _ in stream:
        pass
