"""Experts come and go over real Ray actors that stand in for ranks: all ranks follow a change, or none does."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import pytest_asyncio

from meteora_cluster.local import local_ray
from meteora_dist.bank import Bank, NewExpert
from meteora_dist.engine.request import GenerationRequest, Sampling
from meteora_dist.errors import BankError, EngineUnavailable, ExpertNotFound, InvalidRequest, StaleGeneration
from meteora_dist.moe.placement import Placement
from meteora_dist.moe.residency import Residency
from meteora_dist.observability.metrics import Nowhere
from meteora_dist.serving.catalog import Catalog
from meteora_dist.serving.config import ServiceConfig
from meteora_dist.serving.experts import ExpertAdmin
from meteora_dist.serving.gate import Gate
from meteora_dist.serving.generations import Generations
from meteora_dist.serving.limits import Limits
from meteora_dist.serving.server import open_model
from meteora_dist.serving.service import TextService
from meteora_dist.serving.sharing import Sharing
from meteora_dist.serving.tokenizer import TextTokenizer
from meteora_dist.serving.world import World
from tests.serving.counting import CountingRank
from tests.support.tiny import SPECS, Spec, write_adapter

pytestmark = [pytest.mark.ray, pytest.mark.asyncio(loop_scope="module")]

PATIENCE_S = 120
"""For new ranks on a busy machine."""


@pytest.fixture(scope="module")
def own_ray(ray_home: Path) -> Iterator[None]:
    with local_ray(cpus=2):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ranks find how to behave."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def extra(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> NewExpert:
    return NewExpert(write_adapter(tiny_base, tmp_path_factory.mktemp("extra"), Spec(6, 12), seed=31))


@pytest.fixture(scope="module")
def other(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> NewExpert:
    return NewExpert(write_adapter(tiny_base, tmp_path_factory.mktemp("other"), Spec(2, 4), seed=32))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(own_ray: None, folder: Path, tiny_bank: Bank) -> AsyncIterator[World]:
    """One for all tests: each finds the generation that the one before has left."""
    config = ServiceConfig(
        model=folder,
        bank=folder,
        ep=2,
        rank_cpus=0.5,
        start_timeout_s=PATIENCE_S,
        heartbeat_s=0.2,
        rebuild_wait_s=PATIENCE_S,
    )
    world = await World.launch(config, Residency.of(tiny_bank, 2), member=CountingRank)
    yield world
    world.stop()


class Setting:
    """A service over the world, and what it keeps on disk."""

    def __init__(self, world: World, tokenizer: TextTokenizer, configured: Path, folder: Path) -> None:
        bank = Bank.open(world.residency.folders[world.residency.roster.newest])
        self.world, self.folder, self.first = world, folder, bank.manifest.generation
        gate = Gate(None, anonymous=True)
        self.service = TextService(world, tokenizer, Catalog(bank.manifest), Limits(64, max_live_requests=8), gate)
        self.generations = Generations(configured, folder)
        self.sharing = Sharing(self.generations, 0.02, Nowhere())
        self.admin = ExpertAdmin(world, self.service, self.generations, bank)

    @property
    def names(self) -> tuple[str, ...]:
        return self.service.catalog.experts

    @property
    def kept(self) -> list[str]:
        """Names of all generations that are there, finished or not."""
        return sorted(path.name for path in self.folder.glob("*generation-*"))

    async def settled(self, *live: int) -> None:
        """Returns once these generations, and no others, are on the ranks and on the disk."""
        folders = {self.generations.place(number) for number in live}
        async with asyncio.timeout(PATIENCE_S):
            while self.admin.live != live or set(self.folder.glob("*generation-*")) - folders:
                await asyncio.sleep(0.02)


@pytest_asyncio.fixture(loop_scope="module")
async def setting(world: World, tokenizer: TextTokenizer, tiny_bank: Bank, tmp_path: Path) -> AsyncIterator[Setting]:
    setting = Setting(world, tokenizer, tiny_bank.path, tmp_path / "kept")
    await setting.sharing.join()
    setting.sharing.serve(setting.admin)
    yield setting
    if "extra" in setting.names:
        await setting.admin.remove("extra")
    await setting.settled(setting.admin.manifest.generation)
    setting.sharing.stop()


def request(tokens: int = 60) -> GenerationRequest:
    return GenerationRequest("live", (1,), tokens, Sampling(seed=50))


@contextmanager
def flag(folder: Path, name: str) -> Iterator[None]:
    (folder / name).touch()
    try:
        yield
    finally:
        (folder / name).unlink(missing_ok=True)


async def held(world: World) -> list[tuple[int, int]]:
    """(adapters, generations) on each rank."""
    return [(report.expert_bytes, report.gate_bytes) for report in await world.reports()]


async def pending(world: World) -> list[int]:
    return [await actor.pending.remote() for actor in world._crew.result()._actors]


async def kill(world: World) -> None:
    os.kill((await world._crew.result()._actors[1].about.remote())[0], signal.SIGKILL)


async def tokens_of(world: World, tokens: int) -> list[int]:
    return [event.token_id async for event in world.generate(request(tokens))]


async def test_an_expert_is_there_for_new_requests_and_goes_again(setting: Setting, extra: NewExpert) -> None:
    before = await held(setting.world)
    added = await setting.admin.add("extra", extra)
    assert added.generation == setting.first + 1
    assert setting.names == (*SPECS, "extra")
    await setting.settled(added.generation)
    assert sum(adapters for adapters, _ in await held(setting.world)) == len(SPECS) + 1
    removed = await setting.admin.remove("extra")
    assert setting.names == tuple(SPECS)
    await setting.settled(removed.generation)
    assert await held(setting.world) == before
    with pytest.raises(ExpertNotFound, match="no expert 'extra'"):
        await setting.admin.remove("extra")


async def test_a_generation_lives_as_long_as_its_last_request(setting: Setting, extra: NewExpert) -> None:
    world = setting.world
    older = world.generate(request())
    assert (await anext(older)).token_id == 1
    for change in (setting.admin.add("extra", extra), setting.admin.remove("extra")):
        await change
    # The one in between was never used; the first one is.
    await setting.settled(setting.first, setting.first + 2)
    assert [generations for _, generations in await held(world)] == [2, 2]
    # A call that is between two of its requests uses it, too.
    with world.using(setting.first):
        assert [event.token_id async for event in older] == list(range(2, 61))
        await asyncio.sleep(0.2)
        assert setting.admin.live == (setting.first, setting.first + 2)
    await setting.settled(setting.first + 2)


async def test_a_stale_change_is_refused_with_both_numbers(setting: Setting, other: NewExpert) -> None:
    now = setting.first
    with pytest.raises(StaleGeneration, match=f"for generation {now - 1} of the bank, but the newest is {now}"):
        await setting.admin.replace("wide", other, expected=now - 1)
    # Two callers who have both seen the same generation: one of them wins.
    tries = [setting.admin.replace("wide", other, expected=now), setting.admin.remove("wide", expected=now)]
    won, lost = await asyncio.gather(*tries, return_exceptions=True)
    assert isinstance(lost, StaleGeneration)
    assert not isinstance(won, BaseException)
    assert won.generation == now + 1
    assert setting.names == tuple(SPECS)
    assert won.experts[1].digest != won.experts[0].digest


async def test_a_rank_that_cannot_load_leaves_all_as_they_were(
    setting: Setting, extra: NewExpert, folder: Path
) -> None:
    world, before = setting.world, await held(setting.world)
    with flag(folder, "unloadable"), pytest.raises(BankError, match="is damaged") as caught:
        await setting.admin.add("extra", extra)
    assert caught.value.path == folder
    assert (await held(world), await pending(world)) == (before, [0, 0])
    assert (setting.admin.live, setting.kept) == ((setting.first,), [])
    assert setting.names == tuple(SPECS)
    with pytest.raises(InvalidRequest, match=f"generation {setting.first + 1} is not served"):
        await anext(world.generate(GenerationRequest("early", (1,), 1, generation=setting.first + 1)))
    # The number is free again.
    assert (await setting.admin.add("extra", extra)).generation == setting.first + 1
    await setting.admin.remove("extra")


async def test_a_rank_lost_before_the_decision_leaves_all_as_they_were(
    setting: Setting, extra: NewExpert, folder: Path
) -> None:
    world, before = setting.world, await held(setting.world)
    live = asyncio.ensure_future(tokens_of(world, 20))
    with flag(folder, "slow prepare"):
        change = asyncio.ensure_future(setting.admin.add("extra", extra))
        await asyncio.sleep(0.3)
        await kill(world)
        with pytest.raises(EngineUnavailable, match="which is not made: try again"):
            await asyncio.wait_for(change, PATIENCE_S)
    assert await live == list(range(1, 21))
    assert await held(world) == before
    assert (setting.admin.live, setting.kept, setting.names) == ((setting.first,), [], tuple(SPECS))


async def test_a_rank_lost_after_the_decision_leaves_the_change_made(
    setting: Setting, extra: NewExpert, folder: Path
) -> None:
    world = setting.world
    live = asyncio.ensure_future(tokens_of(world, 20))
    with flag(folder, "slow commit"):
        change = asyncio.ensure_future(setting.admin.add("extra", extra))
        async with asyncio.timeout(PATIENCE_S):
            while world.blueprint.residency == world.residency:
                await asyncio.sleep(0.01)
        await kill(world)
        added = await asyncio.wait_for(change, PATIENCE_S)
    assert await live == list(range(1, 21))
    assert setting.names == (*SPECS, "extra")
    await setting.settled(added.generation)
    assert sum(adapters for adapters, _ in await held(world)) == len(SPECS) + 1
    await setting.admin.remove("extra")


async def test_a_caller_who_goes_away_does_not_break_a_change(setting: Setting, extra: NewExpert, folder: Path) -> None:
    with flag(folder, "slow prepare"):
        change = asyncio.ensure_future(setting.admin.add("extra", extra))
        await asyncio.sleep(0.2)
        change.cancel()
        with suppress(asyncio.CancelledError):
            await change
    # The next one waits for it.
    removed = await setting.admin.remove("extra")
    assert removed.generation == setting.first + 2
    await setting.settled(removed.generation)


async def test_a_restart_finds_the_newest_generation(
    setting: Setting, extra: NewExpert, tiny_base: Path, tiny_bank: Bank
) -> None:
    added = await setting.admin.add("extra", extra)
    await setting.settled(added.generation)
    config = ServiceConfig(model=tiny_base, bank=tiny_bank.path, generations=setting.folder)
    # Of a replica that ended while it wrote one, and while it gave another to its ranks.
    (setting.folder / ".generation-99-gone-1.x").mkdir()
    (setting.folder / "generation-98-gone-1" / "experts").mkdir(parents=True)
    await setting.settled(added.generation)
    assert setting.kept == [setting.generations.place(added.generation).name]
    assert open_model(config)[0].manifest == added
    removed = await setting.admin.remove("extra")
    assert open_model(config)[0].manifest == removed


async def test_a_generation_that_cannot_be_kept_is_taken_back(
    setting: Setting, extra: NewExpert, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await held(setting.world)

    def full(bank: Bank) -> None:
        raise BankError(setting.folder, "cannot be written (no space left)")

    monkeypatch.setattr(setting.generations, "publish", full)
    with pytest.raises(BankError, match="no space left"):
        await setting.admin.add("extra", extra)
    assert await held(setting.world) == before
    assert (setting.admin.live, setting.kept, setting.names) == ((setting.first,), [], tuple(SPECS))


async def test_the_list_says_where_experts_are_and_a_rebalance_moves_them(setting: Setting) -> None:
    listed = await setting.admin.list()
    assert [status.entry.name for status in listed] == list(SPECS)
    # Stand-ins report a load of 1 on rank 0 and of 11 on rank 1, for each adapter they hold.
    assert [status.routed for status in listed] == [1 + 10 * status.groups[0] for status in listed]
    adapters = {adapter.digest: adapter.parameters for adapter in setting.admin._newest.adapters}
    assert [status.resident_bytes for status in listed] == [4 * adapters[status.entry.digest] for status in listed]
    await setting.world.change(lambda now: now.placed(Placement(((0,),) * len(SPECS), groups=2)))
    moved = await setting.admin.rebalance()
    assert 0 < moved < len(SPECS)
    again = await setting.admin.list()
    assert [status.groups for status in again].count((1,)) == moved
    assert await held(setting.world) == [(len(SPECS) - moved, 1), (moved, 1)]


async def test_generations_of_another_bank_are_refused(setting: Setting, tiny_bank: Bank, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "bank.json").write_text((tiny_bank.path / "bank.json").read_text() + "\n")
    setting.generations.publish(tiny_bank)
    with pytest.raises(BankError, match=r"generation 1 follows from .* remove .*kept to start from"):
        Generations(other, setting.folder).open()
    (setting.folder / "published-1" / "record.json").write_text("{}")
    with pytest.raises(BankError, match="must have `folder`, a name, and `follows`"):
        setting.generations.open()


async def test_without_generations_the_configured_bank_is_served(tiny_bank: Bank, tmp_path: Path) -> None:
    assert ServiceConfig(model=tmp_path, bank=tiny_bank.path).generations_folder == Path(
        f"{tiny_bank.path}-generations"
    )
    generations = Generations(tiny_bank.path, tmp_path / "none")
    assert generations.open() == Bank.open(tiny_bank.path)
    generations.remove(tiny_bank.path)
    assert tiny_bank.path.exists()
