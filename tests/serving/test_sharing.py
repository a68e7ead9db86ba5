"""Two replicas, each with a real engine of its own, share one folder of generations."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from meteora_dist.bank import Bank, BankEdit, NewExpert, edit_bank
from meteora_dist.engine.config import EngineConfig
from meteora_dist.engine.rank import RankEngine
from meteora_dist.errors import BankError, EngineUnavailable, StaleGeneration
from meteora_dist.moe.residency import Residency
from meteora_dist.observability import metrics
from meteora_dist.observability.memory import MemoryRecorder
from meteora_dist.serving.generations import Generations
from meteora_dist.serving.keys import ANONYMOUS
from meteora_dist.serving.replicas import GONE_AFTER_LOOKS, ReplicaState
from meteora_dist.serving.request import TextRequest
from meteora_dist.serving.selection import select
from meteora_dist.serving.sharing import Sharing
from meteora_dist.serving.tokenizer import TextTokenizer
from tests.serving.lone import CHANGES, POLL_S, Replica, lone_replica
from tests.support.tiny import SPECS, Spec, write_adapter

PATIENCE_S = 30


@pytest.fixture(scope="module")
def extra(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> NewExpert:
    return NewExpert(write_adapter(tiny_base, tmp_path_factory.mktemp("extra"), Spec(6, 12), seed=31))


@pytest.fixture(scope="module")
def other(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> NewExpert:
    return NewExpert(write_adapter(tiny_base, tmp_path_factory.mktemp("other"), Spec(2, 4), seed=32))


@pytest.fixture(scope="module")
def engines(tiny_base: Path, tiny_bank: Bank) -> Iterator[tuple[RankEngine, ...]]:
    """One for each replica of a test; what they hold is from the test before."""
    config = EngineConfig(model=tiny_base, bank=tiny_bank.path, max_model_len=128, kv_cache_tokens=4096)
    engines = RankEngine(config), RankEngine(config)
    yield engines
    for engine in engines:
        engine.stop()


class Service:
    """The replicas of one service."""

    def __init__(self, engines: tuple[RankEngine, ...], bank: Bank, folder: Path, tokenizer: TextTokenizer) -> None:
        self.bank, self.folder, self.tokenizer = bank, folder, tokenizer
        self.stack = AsyncExitStack()
        self._engines = iter(engines)

    async def start(self) -> Replica:
        """One more."""
        engine, change = next(self._engines), next(CHANGES)
        bank = Generations(self.bank.path, self.folder).open()
        await asyncio.to_thread(engine.prepare, change, Residency.of(bank, 1))
        await asyncio.to_thread(engine.commit, change)
        return await self.stack.enter_async_context(lone_replica(engine, self.bank.path, self.folder, self.tokenizer))

    @property
    def kept(self) -> list[int]:
        """Numbers of the generations that are there, finished or not."""
        return sorted(int(path.name.split("-")[1]) for path in self.folder.glob("*generation-*"))


@pytest.fixture
async def service(
    engines: tuple[RankEngine, ...], tiny_bank: Bank, tokenizer: TextTokenizer, tmp_path: Path
) -> AsyncIterator[Service]:
    service = Service(engines, tiny_bank, tmp_path / "generations", tokenizer)
    async with service.stack:
        yield service


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not true():
            await asyncio.sleep(POLL_S / 2)


async def test_what_one_replica_changes_the_other_serves(service: Service, extra: NewExpert, other: NewExpert) -> None:
    a, b = await service.start(), await service.start()
    request = TextRequest(("Who?",), "auto", select("auto"), max_tokens=40, ignore_eos=True, trace=True)
    begun = b.service.pieces(await b.service.prepare(request, ANONYMOUS))
    before = await anext(begun)
    assert (await a.experts.add("extra", extra)).generation == 2
    await until(lambda: b.experts.serving == 2)
    assert b.names == a.names == (*SPECS, "extra")
    assert await b.ask("extra") == await a.ask("extra")
    assert await b.ask("auto") == await a.ask("auto")
    # And back; the request of before finishes with the experts it began with.
    await b.experts.replace("extra", other, expected=2)
    await until(lambda: a.experts.serving == 3)
    assert await b.ask("extra") == await a.ask("extra")
    rest = [piece async for piece in begun]
    assert {piece.experts for piece in (before, *rest)} == {tuple(SPECS)}
    assert rest[-1].ending is not None
    await until(lambda: (a.experts.live, b.experts.live, service.kept) == ((3,), (3,), [3]))
    await until(lambda: [one.generation for one in a.sharing.states] == [3, 3])
    assert a.sharing.states[1].replica == b.sharing.generations.replica


async def test_of_two_changes_at_once_exactly_one_wins(service: Service, extra: NewExpert, other: NewExpert) -> None:
    a, b = await service.start(), await service.start()
    for number in range(2, 6):
        tries = [a.experts.replace("wide", extra), b.experts.replace("wide", other)]
        outcomes = await asyncio.gather(*tries, return_exceptions=True)
        (won,) = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
        (lost,) = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        assert isinstance(lost, StaleGeneration)
        assert f"generation {number} of the bank is the newest now" in str(lost)
        await until(lambda won=won: a.experts.manifest == b.experts.manifest == won)  # type: ignore[misc]
        assert await a.ask("wide") == await b.ask("wide")
        await until(lambda n=number: a.experts.live == b.experts.live == (n,))  # type: ignore[misc]
    await until(lambda: service.kept == [5])


async def test_a_change_for_a_generation_that_another_replica_has_ended_is_stale(
    service: Service, extra: NewExpert
) -> None:
    a, b = await service.start(), await service.start()
    b.sharing.stop()
    await a.experts.add("extra", extra)
    assert b.experts.serving == 1
    with pytest.raises(StaleGeneration, match="for generation 1 of the bank, but the newest is 2"):
        await b.experts.remove("extra", expected=1)
    # It has caught up by that; without an expectation it would have done so just as well.
    assert (await b.experts.remove("extra")).generation == 3


async def test_a_replica_that_starts_takes_the_newest(service: Service, extra: NewExpert) -> None:
    first = await service.start()
    await first.experts.add("extra", extra)
    answer = await first.ask("extra")
    first.sharing.stop()
    again = await service.start()
    assert (again.experts.serving, again.names) == (2, (*SPECS, "extra"))
    assert await again.ask("extra") == answer


async def test_what_was_written_and_not_published_goes_with_its_replica(service: Service, extra: NewExpert) -> None:
    a = await service.start()
    await a.experts.add("extra", extra)
    await until(lambda: service.kept == [2])
    dead = Sharing(Generations(service.bank.path, service.folder), POLL_S, MemoryRecorder())
    bank = await dead.join()
    edit_bank(bank, BankEdit(remove=("plain",)), dead.generations.place(3))
    await until(lambda: len(a.sharing.states) == 2)
    await asyncio.sleep(2 * GONE_AFTER_LOOKS * POLL_S)
    # While its replica lives it may yet be published.
    assert (service.kept, a.experts.serving) == ([2, 3], 2)
    dead.stop()
    await until(lambda: service.kept == [2])
    assert len(a.sharing.states) == 1
    assert (await a.experts.remove("extra")).generation == 3


async def test_a_generation_stays_while_any_replica_uses_it(service: Service, extra: NewExpert) -> None:
    a, b = await service.start(), await service.start()
    await a.experts.add("extra", extra)
    await until(lambda: b.experts.serving == 2)
    with b.world.using(2):
        await a.experts.remove("extra")
        await until(lambda: a.experts.live == (3,) and b.experts.live == (2, 3))
        await asyncio.sleep(3 * GONE_AFTER_LOOKS * POLL_S)
        assert service.kept == [2, 3]
        # The files are whole: a rank that is rebuilt can load it.
        assert Bank.open(b.world.residency.folders[2]).names == (*SPECS, "extra")
    await until(lambda: b.experts.live == (3,) and service.kept == [3])


async def test_a_replica_that_cannot_load_the_newest_says_so_and_tries_again(
    service: Service, extra: NewExpert, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = await service.start(), await service.start()
    load = b.world.engine.prepare

    def unreadable(number: int, residency: Residency) -> None:
        raise BankError(service.folder, "a disk has failed")

    monkeypatch.setattr(b.world.engine, "prepare", unreadable)
    await a.experts.add("extra", extra)
    await until(lambda: b.service.missing == 2)
    with pytest.raises(EngineUnavailable, match="could not load generation 2 of the bank, and tries again"):
        b.service.check()
    with pytest.raises(EngineUnavailable, match="cannot load generation 2 of the bank, which is the newest"):
        await b.experts.remove("plain")
    assert await b.ask("plain") == await a.ask("plain")
    await until(lambda: [one.state for one in a.sharing.states] == ["serving", "behind"])
    await until(lambda: (b.metrics.value(metrics.BANK_FOLLOW_FAILURES) or 0) >= 2)
    monkeypatch.setattr(b.world.engine, "prepare", load)
    await until(lambda: b.experts.serving == 2)
    b.service.check()
    await until(lambda: [one.state for one in a.sharing.states] == ["serving", "serving"])


async def test_a_folder_that_fails_stops_nothing(service: Service, extra: NewExpert) -> None:
    a, b = await service.start(), await service.start()
    await a.experts.add("extra", extra)
    await until(lambda: b.experts.serving == 2)
    (service.folder / "replica-odd.json").write_text("{}")
    await until(lambda: (b.metrics.value(metrics.BANK_FOLLOW_FAILURES) or 0) >= 2)
    b.service.check()
    assert await b.ask("extra") == await a.ask("extra")
    (service.folder / "replica-odd.json").unlink()
    await a.experts.remove("extra")
    await until(lambda: b.experts.serving == 3)


class Follower:
    """Does as it is told, but for the first ``failures`` times."""

    serving = 1
    needed = (1,)

    def __init__(self, failures: int = 0) -> None:
        self.failures, self.rebalanced = failures, 0

    async def follow(self) -> None:
        raise AssertionError("there is nothing to follow")

    async def rebalance_here(self) -> int:
        if self.failures:
            self.failures -= 1
            raise EngineUnavailable("a rank was lost")
        self.rebalanced += 1
        return 0


async def test_a_rebalance_is_called_for_at_every_replica_but_the_first(tiny_bank: Bank, tmp_path: Path) -> None:
    followers = [Follower(), Follower(), Follower(failures=2)]
    sharings = [Sharing(Generations(tiny_bank.path, tmp_path), POLL_S, MemoryRecorder()) for _ in followers]
    for sharing, follower in zip(sharings, followers, strict=True):
        await sharing.join()
        sharing.serve(follower)
    for calls in (1, 2):
        sharings[0].generations.call_rebalance()
        await until(lambda calls=calls: followers[1].rebalanced == followers[2].rebalanced == calls)  # type: ignore[misc]
    late = Sharing(Generations(tiny_bank.path, tmp_path), POLL_S, MemoryRecorder())
    await late.join()
    late.serve(lately := Follower())
    await asyncio.sleep(5 * POLL_S)
    assert [follower.rebalanced for follower in (*followers, lately)] == [0, 2, 2, 0]
    for sharing in (*sharings, late):
        sharing.stop()


async def test_who_starts_while_others_publish_takes_what_stays(
    tiny_bank: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generations, other = Generations(tiny_bank.path, tmp_path), Generations(tiny_bank.path, tmp_path)
    sharing = Sharing(generations, POLL_S, MemoryRecorder())
    tell, told = sharing._replicas.tell, []

    def overtaken(state: ReplicaState) -> None:
        tell(state)
        told.append(state.live)
        if len(told) == 1:
            # Just before this replica is heard of.
            other.publish(edit_bank(tiny_bank, BankEdit(remove=("plain",)), other.place(2)))

    monkeypatch.setattr(sharing._replicas, "tell", overtaken)
    assert (await sharing.join()).manifest.generation == 2
    sharing.stop()
    assert told[:2] == [(0,), (2,)]


def test_nothing_that_others_put_there_is_removed(tiny_bank: Bank, tmp_path: Path) -> None:
    generations = Generations(tiny_bank.path, tmp_path)
    second = tiny_bank.manifest.model_copy(update={"generation": 2})
    for number in (2, 3):
        generations.place(number).mkdir()
        manifest = second.model_copy(update={"generation": number})
        generations.publish(replace(tiny_bank, path=generations.place(number), manifest=manifest))
    for name in ("lost+found", ".snapshot", "generation-old", "notes-2-me"):
        (tmp_path / name).mkdir()
    for _ in range(GONE_AFTER_LOOKS + 1):
        generations.tidy(())
    left = {path.name for path in tmp_path.iterdir()}
    others = {".snapshot", "generation-old", "lost+found", "notes-2-me"}
    assert left == others | {"published-2", "published-3", generations.place(3).name}
