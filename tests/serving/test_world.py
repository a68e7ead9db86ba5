"""The world over real Ray actors that stand in for ranks: where requests go, how they end, and how they survive."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import pytest_asyncio
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from meteora_cluster.local import local_ray
from meteora_cluster.placement import Resources, world_bundles
from meteora_dist.engine.request import GenerationRequest, Sampling, TokenEvent
from meteora_dist.errors import EngineUnavailable, InvalidRequest
from meteora_dist.moe.placement import contiguous
from meteora_dist.moe.residency import Residency
from meteora_dist.moe.roster import roster_of
from meteora_dist.observability.ranks import Losses
from meteora_dist.serving.config import ServiceConfig
from meteora_dist.serving.world import World
from tests.serving.counting import POISON, CountingRank

pytestmark = [pytest.mark.ray, pytest.mark.asyncio(loop_scope="module")]

TOKENS = 60
"""Of a long answer; at 50 ms each it is under way when something happens."""
HELD = Residency(roster_of({1: ("a", "b")}), contiguous(2, groups=2), {1: Path("bank")})
PATIENCE_S = 120
"""For new ranks on a busy machine."""


@pytest.fixture(scope="module")
def own_ray(ray_home: Path) -> Iterator[None]:
    with local_ray(cpus=2):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ranks find how to start."""
    return tmp_path_factory.mktemp("ranks")


async def launch(folder: Path, placement: PlacementGroup | None = None, **more: Any) -> World:
    config = ServiceConfig(
        model=folder,
        bank=folder,
        ep=2,
        rank_cpus=0.5,
        start_timeout_s=PATIENCE_S,
        heartbeat_s=0.2,
        heartbeat_timeout_s=2,
        stall_timeout_s=5,
        max_rebuilds=2,
        rebuild_wait_s=PATIENCE_S,
        **more,
    )
    return await World.launch(config, HELD, placement, member=CountingRank)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(own_ray: None, folder: Path) -> AsyncIterator[World]:
    """One for all tests that it survives."""
    world = await launch(folder)
    yield world
    world.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def short_lived(own_ray: None, tmp_path: Path) -> AsyncIterator[World]:
    world = await launch(tmp_path)
    yield world
    world.stop()


def request(name: str, tokens: int = TOKENS, milliseconds: int = 50, prompt: int = 1) -> GenerationRequest:
    return GenerationRequest(name, (prompt,), tokens, Sampling(seed=milliseconds))


def actors(world: World) -> Any:
    return world._crew.result()._actors


async def kill(world: World) -> None:
    os.kill((await actors(world)[1].about.remote())[0], signal.SIGKILL)


async def stop(world: World) -> None:
    os.kill((await actors(world)[1].about.remote())[0], signal.SIGSTOP)


async def fail(world: World) -> None:
    await actors(world)[1].fail.remote()


async def stall(world: World) -> None:
    await actors(world)[1].stall.remote(6.0)


async def rest(stream: AsyncGenerator[TokenEvent, None]) -> list[int]:
    return [event.token_id async for event in stream]


async def rank_of(stream: AsyncGenerator[TokenEvent, None]) -> int:
    shares = (await anext(stream)).shares
    assert shares is not None
    return int(shares[0])


async def rank_of_one_token(world: World, name: str) -> int:
    async with aclosing(world.generate(request(name, 1, 0))) as stream:
        return await rank_of(stream)


async def until(state: str, world: World) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while world.state != state:
            await asyncio.sleep(0.01)


async def test_requests_go_to_the_rank_with_the_fewest(world: World) -> None:
    slow = world.generate(request("slow"))
    assert await rank_of(slow) == 0
    assert [await rank_of_one_token(world, name) for name in "ab"] == [1, 1]
    await slow.aclose()
    assert await rank_of_one_token(world, "c") == 0


async def test_closing_cancels_on_the_rank_within_100_ms(world: World) -> None:
    times = []
    for number in range(5):
        async with aclosing(world.generate(request(f"gone {number}"))) as events:
            await anext(events)
            assert (await actors(world)[0].about.remote())[1] == {f"gone {number}"}
            closed = time.monotonic()
        async with asyncio.timeout(5):
            while (await actors(world)[0].about.remote())[1]:
                await asyncio.sleep(0.005)
        times.append(time.monotonic() - closed)
    assert median(times) < 0.1, times


async def test_errors_of_the_rank_arrive_as_they_are(world: World) -> None:
    with pytest.raises(InvalidRequest, match="no fourteens") as caught:
        await anext(world.generate(request("bad", prompt=POISON + 1)))
    assert caught.value.param == "prompt"
    assert world.state == "serving"


@pytest.mark.parametrize("harm", [kill, stop, fail, stall])
async def test_requests_outlive_a_rank(world: World, harm: Callable[[World], Awaitable[None]]) -> None:
    before = actors(world)
    streams = [world.generate(request(name)) for name in ("on rank 0", "on rank 1")]
    firsts = [(await anext(stream)).token_id for stream in streams]
    rests = [asyncio.ensure_future(rest(stream)) for stream in streams]
    assert [rank.active for rank in await world.reports()] == [1, 1]
    so_far = world.losses
    await harm(world)
    harmed = time.monotonic()
    await until("rebuilding", world)
    # At once, or within heartbeat_s + heartbeat_timeout_s; a second for a busy machine.
    assert time.monotonic() - harmed < (3.5 if harm is stop else 1.5)
    with pytest.raises(EngineUnavailable, match="is being rebuilt"):
        world.check()
    for first, tokens in zip(firsts, await asyncio.wait_for(asyncio.gather(*rests), PATIENCE_S), strict=True):
        assert [first, *tokens] == list(range(1, 1 + TOKENS))
    assert world.state == "serving"
    assert not set(before) & set(actors(world))
    assert world.losses == Losses(so_far.lost + 1, so_far.rebuilt + 1, so_far.failed, world.losses.rebuild_s)
    assert 0 < world.losses.rebuild_s - so_far.rebuild_s <= time.monotonic() - harmed


async def test_new_requests_wait_for_a_rebuild_but_not_for_long(world: World, folder: Path) -> None:
    (folder / "slow").touch()
    live = asyncio.ensure_future(rest(world.generate(request("live", 10))))
    await kill(world)
    await until("rebuilding", world)
    usual = world.blueprint
    world.blueprint = replace(usual, config=usual.config.model_copy(update={"rebuild_wait_s": 0.5}))
    with pytest.raises(EngineUnavailable, match=r"not back within 0.5 s: try again"):
        await anext(world.generate(request("impatient", 1)))
    world.blueprint = usual
    waiting = asyncio.ensure_future(rest(world.generate(request("patient", 2))))
    (folder / "slow").unlink()
    assert await asyncio.wait_for(waiting, PATIENCE_S) == [1, 2]
    assert await live == list(range(1, 11))


async def test_a_request_that_is_closed_meanwhile_is_not_resumed(world: World) -> None:
    async with aclosing(world.generate(request("closed"))) as events:
        await anext(events)
        await kill(world)
        waiting = asyncio.ensure_future(rest(events))
        await until("rebuilding", world)
        waiting.cancel()
        await asyncio.wait([waiting])
    await until("serving", world)
    assert [(await actor.about.remote())[1] for actor in actors(world)] == [set(), set()]


async def test_a_request_that_kills_every_crew_is_given_up_and_the_others_live(world: World) -> None:
    steady = world.generate(request("steady", 200))
    assert (await anext(steady)).token_id == 1
    tokens = asyncio.ensure_future(rest(steady))
    with pytest.raises(EngineUnavailable, match="was lost 3 times while it worked on this request"):
        await asyncio.wait_for(rest(world.generate(request("poison", prompt=POISON))), PATIENCE_S)
    assert await tokens == list(range(2, 201))


async def test_standby_ranks_take_the_places_of_lost_ones(own_ray: None, tmp_path: Path) -> None:
    home = placement_group(world_bundles(2, Resources(cpus=0.5)))
    world = await launch(tmp_path, home, standby=True, replica_cpus=0)
    try:
        survivor = actors(world)[0]
        for _ in range(2):
            stream = world.generate(request("live", 20))
            first = (await anext(stream)).token_id
            waiting = [seat.actor for seat in world._standby._waiting.values()]
            await kill(world)
            assert [first, *await asyncio.wait_for(rest(stream), PATIENCE_S)] == list(range(1, 21))
            await until("serving", world)
            assert actors(world)[0] == survivor
            assert actors(world)[1] in waiting
            assert await actors(world)[1].is_prepared.remote()
        tokens = asyncio.ensure_future(rest(world.generate(request("slow", 2, milliseconds=1500))))
        await asyncio.sleep(0.5)
        await kill(world)
        await until("rebuilding", world)
        await until("serving", world)
        assert len(world._standby.waiting) == 1, "a third would take the time that the request needs"
        assert await asyncio.wait_for(tokens, PATIENCE_S) == [1, 2]
        assert len(world._standby.waiting) == 2
        # One that fails is no worse for it; a crew that has produced nothing is replaced as a whole.
        stream = world.generate(request("once", 20))
        await anext(stream)
        before = actors(world)
        await fail(world)
        await asyncio.wait_for(rest(stream), PATIENCE_S)
        await until("serving", world)
        assert actors(world) == before
        world._crew.result().produced = 0
        await kill(world)
        await until("rebuilding", world)
        await until("serving", world)
        assert not set(actors(world)) & set(before)
    finally:
        world.stop()
        remove_placement_group(home)


async def test_a_world_that_cannot_be_rebuilt_fails_with_the_cause(short_lived: World, tmp_path: Path) -> None:
    world = short_lived
    (tmp_path / "broken").touch()
    stream = world.generate(request("live"))
    await anext(stream)
    await kill(world)
    with pytest.raises(EngineUnavailable, match="could not be rebuilt"):
        await asyncio.wait_for(rest(stream), PATIENCE_S)
    assert world.state == "failed"
    assert "2 rebuilds in a row have failed: starting the ranks: rank 0: ValueError: no weights" in str(world.failure)
    for use in (world.check, lambda: anext(world.generate(request("late")))):
        with pytest.raises(EngineUnavailable, match="is being replaced"):
            await use()


async def test_a_stopped_world_ends_its_requests(short_lived: World) -> None:
    world = short_lived
    stream = world.generate(request("live"))
    await anext(stream)
    world.stop()
    world.stop()
    with pytest.raises(EngineUnavailable):
        await asyncio.wait_for(rest(stream), 10)
