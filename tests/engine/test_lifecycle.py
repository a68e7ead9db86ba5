"""Experts come and go while requests run: two ranks, every change on both, or on neither."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from meteora_cluster.member import free_port
from meteora_dist.bank import Bank, BankEdit, NewExpert, edit_bank
from meteora_dist.engine.config import EngineConfig
from meteora_dist.engine.rank import RankEngine
from meteora_dist.engine.request import GenerationRequest
from meteora_dist.errors import AdapterError, EngineUnavailable, InvalidRequest
from meteora_dist.moe.holdings import Resident
from meteora_dist.moe.inject import inject
from meteora_dist.moe.residency import Residency
from meteora_dist.moe.routing import BASE, RoutingChoice, named, plan_pass
from tests.support.ranks import run_ranks
from tests.support.tiny import SPECS, Spec, load_tiny_llama, write_adapter

EXPERTS = len(SPECS)
CHANGES = 50
CHOICES = [
    *(RoutingChoice(), BASE, named(2), RoutingChoice(top_k=1)),
    *(RoutingChoice(mode="fixed", experts=((3, 0.6), (1, 0.4))), RoutingChoice(top_k=EXPERTS, temperature=20.0)),
    *(RoutingChoice(temperature=3.0), named(0)),
]
STREAMS = [
    GenerationRequest(
        f"stream-{i}", tuple(range(3 + 7 * i, 20 + 9 * i)), 16, routing=choice, ignore_eos=True, generation=1
    )
    for i, choice in enumerate(CHOICES)
]
NEWCOMER = GenerationRequest("by-name", tuple(range(40, 70)), 8, routing=named(EXPERTS), ignore_eos=True)
AUTO = GenerationRequest("auto", tuple(range(40, 70)), 8, ignore_eos=True)
Tokens = list[int]


@dataclass
class Seen:
    """What one rank saw.

    Attributes:
        alone: Its streams' tokens before any change.
        during: The same streams' tokens, over and over, while changes were made.
        by_name: Tokens of ``NEWCOMER`` in several generations that have the new expert.
        auto: Tokens of ``AUTO`` in the same ones.
        resident: Memory at the start, and after each change.
        refusals: What a damaged bank, an undone change and a foreign generation were answered with.
        after_failure: The streams' tokens after a change that failed on rank 1.
        two_generations: ``AUTO`` in the first and in the last generation, in one batch.
        order: Whether a drop waited for its generation's last request.
    """

    alone: list[Tokens]
    resident: list[Resident]
    during: list[list[Tokens]] = field(default_factory=list)
    by_name: list[Tokens] = field(default_factory=list)
    auto: list[Tokens] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    after_failure: list[Tokens] = field(default_factory=list)
    two_generations: list[Tokens] = field(default_factory=list)
    order: list[str] = field(default_factory=list)


def generations(base: Path, bank: Bank, folder: Path, count: int) -> list[Bank]:
    """``bank`` and its next ``count`` generations: "extra" is added, removed, added again ..."""
    extra = NewExpert(write_adapter(base, folder / "extra", Spec(6, 12), seed=31))
    banks = [bank]
    for number in range(count):
        edit = BankEdit(add={"extra": extra}) if number % 2 == 0 else BankEdit(remove=("extra",))
        banks.append(edit_bank(banks[-1], edit, folder / f"{number + 2}"))
    return banks


def config(base: Path, bank: Path, ep: int = 2) -> EngineConfig:
    return EngineConfig(model=base, bank=bank, ep=ep, max_batch_tokens=64, kv_cache_tokens=4096, max_batch_requests=12)


async def answer(engine: RankEngine, request: GenerationRequest) -> Tokens:
    return [event.token_id async for event in engine.generate(request)]


async def together(engine: RankEngine, requests: list[GenerationRequest]) -> list[Tokens]:
    return await asyncio.gather(*(answer(engine, request) for request in requests))


def plain(base: Path, bank: Bank, request: GenerationRequest) -> Tokens:
    """Greedy tokens from whole forward passes of a model that holds nothing but this bank."""
    routed = inject(load_tiny_llama(base), bank, torch.float32)
    ids = list(request.prompt_ids)
    for _ in range(request.max_tokens):
        step = plan_pass([request.routing], [len(ids)], [bank.manifest.generation], routed.live, 5)
        with torch.no_grad(), routed.context.routed(step):
            ids.append(int(routed.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(request.prompt_ids) :]


class Driver:
    """Makes changes on one rank; the other one does the same."""

    def __init__(self, engine: RankEngine, bank: Bank) -> None:
        self.engine = engine
        self.residency = Residency.of(bank, 2)
        self.changes = 0

    async def go(self, residency: Residency) -> None:
        self.changes += 1
        await asyncio.to_thread(self.engine.prepare, self.changes, residency)
        await asyncio.to_thread(self.engine.commit, self.changes)
        self.residency = residency


async def _under_load(driver: Driver, mine: list[GenerationRequest], banks: list[Bank], seen: Seen) -> None:
    engine, done = driver.engine, asyncio.Event()

    async def stream(request: GenerationRequest) -> None:
        answers: list[Tokens] = []
        while not done.is_set() or not answers:
            answers.append(await answer(engine, replace(request, request_id=f"{request.request_id}-{len(answers)}")))
        seen.during.append(answers)

    async def change() -> None:
        for bank in banks:
            # The streams use generation 1; the one between is over with the requests just made.
            older = [number for number in driver.residency.folders if number != 1]
            then = driver.residency.with_bank(bank)
            await driver.go(then.without(older[0]) if older else then)
            seen.resident.append(engine.resident)
            if bank.manifest.generation % 10 == 2:
                seen.by_name.append(await answer(engine, NEWCOMER))
                seen.auto.append(await answer(engine, AUTO))
        await driver.go(driver.residency.without(banks[-1].manifest.generation))
        seen.resident.append(engine.resident)
        done.set()

    await asyncio.gather(change(), *(stream(request) for request in mine))


async def _failing_change(driver: Driver, mine: list[GenerationRequest], damaged: Bank, seen: Seen) -> None:
    """Rank 1 finds the new expert's file cut short, rank 0 does not; the world then discards the change."""
    number, then = driver.changes + 1, driver.residency.with_bank(damaged)
    try:
        await asyncio.to_thread(driver.engine.prepare, number, then)
    except AdapterError as error:
        seen.refusals.append(str(error))
    driver.engine.discard(number)
    try:
        await asyncio.to_thread(driver.engine.commit, number)
    except EngineUnavailable as error:
        seen.refusals.append(str(error))
    try:
        await answer(driver.engine, replace(AUTO, generation=damaged.manifest.generation))
    except InvalidRequest as error:
        seen.refusals.append(str(error))
    seen.resident.append(driver.engine.resident)
    seen.after_failure = await together(driver.engine, mine)


async def _dropping(driver: Driver, rank: int, bank: Bank, seen: Seen) -> None:
    await driver.go(driver.residency.with_bank(bank))
    number = bank.manifest.generation
    pair = [replace(AUTO, generation=1), replace(AUTO, request_id="newer", generation=number)]
    seen.two_generations = await together(driver.engine, pair)
    long = replace(AUTO, request_id="long", max_tokens=60, generation=number)
    stream = driver.engine.generate(long)
    if rank == 0:
        await anext(stream)

    async def finish() -> None:
        async for _ in stream:
            pass
        seen.order.append("request")

    async def drop() -> None:
        await driver.go(driver.residency.without(number))
        seen.order.append("change")

    await asyncio.gather(drop(), *([finish()] if rank == 0 else []))


async def _run(rank: int, engine: RankEngine, banks: list[Bank], damaged: Bank) -> Seen:
    mine, driver = STREAMS[rank::2], Driver(engine, banks[0])
    seen = Seen(await together(engine, mine), [engine.resident])
    await _under_load(driver, mine, banks[1:], seen)
    await _failing_change(driver, mine, damaged, seen)
    await _dropping(driver, rank, banks[-2], seen)
    return seen


def _lifecycle(rank: int, base: Path, folders: list[Path], damaged: list[Path], rendezvous: str) -> Seen:
    banks = [Bank.open(folder) for folder in folders]
    engine = RankEngine(config(base, folders[0]), rank, rendezvous)
    # Opened while it was whole, as the replica does; rank 1 has a copy of its own that is cut short by now.
    announced = replace(banks[1], path=damaged[rank])
    seen = asyncio.run(_run(rank, engine, banks, announced))
    engine.stop()
    return seen


@pytest.fixture(scope="module")
def banks(tiny_base: Path, tiny_bank: Bank, tmp_path_factory: pytest.TempPathFactory) -> list[Bank]:
    return generations(tiny_base, tiny_bank, tmp_path_factory.mktemp("banks"), CHANGES)


@pytest.fixture(scope="module")
def ranks(tiny_base: Path, banks: list[Bank], tmp_path_factory: pytest.TempPathFactory) -> list[Seen]:
    damaged = shutil.copytree(banks[1].path, tmp_path_factory.mktemp("damaged") / "bank")
    weights = damaged / "experts" / "extra" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    folders = [bank.path for bank in banks]
    rendezvous = f"tcp://127.0.0.1:{free_port()}"
    return run_ranks(2, _lifecycle, tiny_base, folders, [folders[1], damaged], rendezvous, join=False)


def test_fifty_changes_touch_no_token_of_eight_streams(ranks: list[Seen]) -> None:
    for seen in ranks:
        assert len(seen.resident) > CHANGES
        assert len(seen.during) == len(STREAMS) // 2
        for answers in seen.during:
            assert len(answers) > 1
            assert all(tokens in seen.alone for tokens in answers)
            assert len({tuple(tokens) for tokens in answers}) == 1
    assert len({tuple(tokens) for seen in ranks for tokens in seen.alone}) == len(STREAMS)


def test_a_new_expert_is_there_at_once_by_name_and_for_the_gates(
    ranks: list[Seen], banks: list[Bank], tiny_base: Path
) -> None:
    assert banks[1].prototypes == (False, False, False, False, True)
    by_name, auto = plain(tiny_base, banks[1], NEWCOMER), plain(tiny_base, banks[1], AUTO)
    assert by_name != auto
    assert auto != plain(tiny_base, banks[0], AUTO)
    for seen in ranks:
        assert seen.by_name == [by_name] * (CHANGES // 10)
        assert seen.auto == [auto] * (CHANGES // 10)


def test_removing_frees_what_adding_took(ranks: list[Seen], banks: list[Bank]) -> None:
    pairs = [banks[1].pair(linear, EXPERTS) for linear in banks[1].linears]
    extra = sum(pair.a_RH.nbytes + pair.b_OR.nbytes for pair in pairs if pair is not None)
    for seen in ranks:
        first, without = seen.resident[0], seen.resident[2 : CHANGES + 1 : 2]
        assert len(without) == CHANGES // 2
        assert {after.expert_bytes for after in without} == {first.expert_bytes}
        assert seen.resident[CHANGES + 1] == first
    # It lives on one of the two ranks; the gates, with one row more, on both.
    grown = [seen.resident[1].expert_bytes - seen.resident[0].expert_bytes for seen in ranks]
    assert sorted(grown) == [0, extra]
    for seen in ranks:
        assert seen.resident[1].gate_bytes * EXPERTS == seen.resident[0].gate_bytes * (2 * EXPERTS + 1)


def test_a_load_that_fails_on_one_rank_changes_nothing_on_either(ranks: list[Seen]) -> None:
    first, second = ranks
    assert "adapter_model.safetensors: truncated" in second.refusals[0]
    for seen, refusals in ((first, first.refusals), (second, second.refusals[1:])):
        assert len(refusals) == 2
        assert "was not prepared" in refusals[0]
        assert refusals[1] == "generation 2 of the bank is not served; [1] are"
        assert seen.resident[-1] == seen.resident[0]
        assert seen.after_failure == seen.alone


def test_one_prompt_in_two_generations_at_once_shares_nothing(
    ranks: list[Seen], banks: list[Bank], tiny_base: Path
) -> None:
    expected = [plain(tiny_base, banks[0], AUTO), plain(tiny_base, banks[1], AUTO)]
    assert expected[0] != expected[1]
    for seen in ranks:
        assert seen.two_generations == expected


def test_a_generation_is_dropped_after_its_last_request(ranks: list[Seen]) -> None:
    first, second = ranks
    assert first.order == ["request", "change"]
    assert second.order == ["change"]


async def test_a_world_can_start_with_several_generations(tiny_base: Path, banks: list[Bank]) -> None:
    residency = Residency.of(banks[0], 1).with_bank(banks[1])
    engine = RankEngine(config(tiny_base, banks[0].path, ep=1), residency=residency)
    try:
        older = replace(AUTO, request_id="older", generation=1)
        assert await together(engine, [AUTO, older]) == [
            plain(tiny_base, banks[1], AUTO),
            plain(tiny_base, banks[0], AUTO),
        ]
        with pytest.raises(InvalidRequest, match="no expert number 5: generation 2 of the bank has 5"):
            await answer(engine, replace(NEWCOMER, routing=named(5)))
    finally:
        engine.stop()


async def test_no_cached_block_is_shared_between_requests(tiny_base: Path, tiny_bank: Bank) -> None:
    # transformers knows blocks by their tokens alone; keys and values depend on generation and routing as well.
    engine = RankEngine(config(tiny_base, tiny_bank.path, ep=1))
    try:
        await answer(engine, AUTO)
        processor = engine._manager.batch_processor
        assert processor is not None
        assert not processor.cache.allow_block_sharing
        assert not processor.cache.use_prefix_sharing
    finally:
        engine.stop()
