"""One engine, and two in lockstep: tokens equal a plain loop without any cache, alone or in company (oracle 8)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from meteora_cluster.member import free_port
from meteora_dist.bank import Bank
from meteora_dist.engine.config import EngineConfig
from meteora_dist.engine.manager import Notes
from meteora_dist.engine.rank import RankEngine
from meteora_dist.engine.request import GenerationRequest, Sampling, TokenEvent
from meteora_dist.errors import BankError, EngineUnavailable, InvalidRequest, ModelError, PromptTooLong
from meteora_dist.moe.inject import inject
from meteora_dist.moe.routed_model import RoutedModel
from meteora_dist.moe.routing import BASE, RoutingChoice, named, plan_step
from meteora_dist.moe.wire import EXCHANGE_KINDS
from meteora_dist.serving.json_grammar import json_grammar
from tests.support.ranks import run_ranks
from tests.support.tiny import ALL_LINEARS, LAYERS, SPECS, linears, load_tiny_llama

EXPERTS = len(SPECS)
CHOICES = [
    RoutingChoice(),
    BASE,
    named(2),
    RoutingChoice(top_k=1),
    RoutingChoice(mode="fixed", experts=((3, 0.6), (1, 0.4))),
    RoutingChoice(top_k=EXPERTS, temperature=20.0),
]
REQUESTS = [
    GenerationRequest(f"r{i}", tuple(range(3 + 7 * i, 20 + 9 * i)), 6 + i, routing=choice, trace=True)
    for i, choice in enumerate(CHOICES)
]


def config(base: Path, bank: Bank, ep: int = 1) -> EngineConfig:
    return EngineConfig(
        model=base, bank=bank.path, ep=ep, max_batch_tokens=32, kv_cache_tokens=4096, max_batch_requests=8
    )


async def collect(engine: RankEngine, request: GenerationRequest) -> list[TokenEvent]:
    return [event async for event in engine.generate(request)]


async def together(engine: RankEngine, requests: list[GenerationRequest]) -> list[list[TokenEvent]]:
    return await asyncio.gather(*(collect(engine, request) for request in requests))


def tokens(events: list[TokenEvent]) -> list[int]:
    return [event.token_id for event in events]


@pytest.fixture(scope="module")
def engine(tiny_base: Path, tiny_bank: Bank) -> Iterator[RankEngine]:
    engine = RankEngine(config(tiny_base, tiny_bank))
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def expected(tiny_base: Path, tiny_bank: Bank) -> list[list[int]]:
    """Greedy tokens of every request from whole forward passes, one request at a time, without a cache."""
    routed = inject(load_tiny_llama(tiny_base), tiny_bank, torch.float32)
    return [plain_loop(routed, request) for request in REQUESTS]


def plain_loop(routed: RoutedModel, request: GenerationRequest) -> list[int]:
    ids = list(request.prompt_ids)
    while len(ids) < len(request.prompt_ids) + request.max_tokens:
        step = plan_step([request.routing], [len(ids)], EXPERTS, max(1, request.routing.slots))
        with torch.no_grad(), routed.context.routed(step):
            ids.append(int(routed.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == 259:
            break
    return ids[len(request.prompt_ids) :]


async def test_alone_equals_the_plain_loop(engine: RankEngine, expected: list[list[int]]) -> None:
    assert [tokens(await collect(engine, request)) for request in REQUESTS] == expected


async def test_in_company_equals_the_plain_loop(engine: RankEngine, expected: list[list[int]]) -> None:
    # 32 tokens a batch split the longer prompts, so prefill and decode share batches too.
    assert [tokens(events) for events in await together(engine, REQUESTS)] == expected


async def test_the_last_event_says_why_it_is_the_last(engine: RankEngine) -> None:
    events = await collect(engine, REQUESTS[1])
    reasons = [event.finish_reason for event in events]
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    assert reasons[-1] == ("stop" if events[-1].token_id == 259 else "length")
    longer = await collect(engine, replace(REQUESTS[1], max_tokens=40, ignore_eos=True))
    assert len(longer) == 40
    assert longer[-1].finish_reason == "length"


async def test_shares_tell_which_experts_acted(engine: RankEngine) -> None:
    auto, base, expert, _, blend, everyone = await together(engine, REQUESTS)
    for events in (auto, everyone):
        for event in events:
            assert event.shares is not None
            assert sum(event.shares) == pytest.approx(1.0, abs=1e-5)
    assert {event.shares for event in base} == {(0.0,) * EXPERTS}
    assert {event.shares for event in expert} == {(0.0, 0.0, 1.0, 0.0)}
    for event in blend:
        assert event.shares == pytest.approx((0.0, 0.4, 0.0, 0.6), abs=1e-5)
    untraced = await collect(engine, replace(REQUESTS[0], trace=False))
    assert {event.shares for event in untraced} == {None}


def layers_by_hand(routed: RoutedModel, ids: list[int], bank: Bank) -> list[tuple[int, float]]:
    """The dominating expert of each layer at the last token, from each linear's own input and gate: top-2, softmax."""
    sums_LE = torch.zeros(LAYERS, EXPERTS)

    def gather(name: str, x: torch.Tensor) -> None:
        logits_E = gates[name].float() @ x.reshape(-1, x.shape[-1])[-1]
        weights_K, ids_K = logits_E.topk(2)
        sums_LE[int(name.split(".")[2]), ids_K] += weights_K.softmax(0)

    gates = load_file(bank.path / "gates.safetensors")
    modules = {name: routed.model.get_submodule(name) for name in linears()}
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: gather(name, inputs[0]))
        for name, module in modules.items()
    ]
    with torch.no_grad(), routed.context.routed(plan_step([RoutingChoice()], [len(ids)], EXPERTS, 2)):
        routed.model(torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    shares_L, experts_L = (sums_LE / len(ALL_LINEARS)).max(1)
    return list(zip(experts_L.tolist(), shares_L.tolist(), strict=True))


async def test_layers_tell_which_expert_dominates_each(engine: RankEngine, tiny_base: Path, tiny_bank: Bank) -> None:
    routed = inject(load_tiny_llama(tiny_base), tiny_bank, torch.float32)
    asking = [replace(request, trace_layers=True) for request in REQUESTS[:3]]
    # In company of one that does not ask, and with a prompt that two passes read.
    auto, base, expert, silent = await together(engine, [*asking, REQUESTS[3]])
    ids = list(asking[0].prompt_ids)
    for event in auto:
        assert event.layers is not None
        by_hand = layers_by_hand(routed, ids, tiny_bank)
        assert [number for number, _ in event.layers] == [number for number, _ in by_hand]
        assert [share for _, share in event.layers] == pytest.approx([share for _, share in by_hand], abs=1e-5)
        ids.append(event.token_id)
    assert len({event.layers for event in auto}) > 1
    assert {event.layers for event in base} == {((-1, 0.0),) * LAYERS}
    assert {event.layers for event in expert} == {((2, 1.0),) * LAYERS}
    assert {event.layers for event in silent} == {None}
    long = replace(asking[0], request_id="long", prompt_ids=tuple(range(3, 73)), max_tokens=1)
    (event,) = await collect(engine, long)
    assert event.layers is not None
    by_hand = layers_by_hand(routed, list(long.prompt_ids), tiny_bank)
    assert [number for number, _ in event.layers] == [number for number, _ in by_hand]


async def test_the_report_counts_the_requests_of_the_rank(engine: RankEngine, tiny_bank: Bank) -> None:
    request = replace(REQUESTS[2], request_id="counted", ignore_eos=True)
    before = engine.report()
    async with aclosing(engine.generate(request)) as events:
        await anext(events)
        during = engine.report()
        async for _ in events:
            pass
    after = engine.report()
    assert (during.active + during.waiting, during.cache_used > 0) == (1, True)
    grown = {digest: load - before.loads[digest] for digest, load in after.loads.items()}
    # The last token is not read any more; every linear counts, those that the expert leaves alone as well.
    read = len(request.prompt_ids) + request.max_tokens - 1
    assert grown == dict.fromkeys(tiny_bank.digests, 0) | {tiny_bank.digests[2]: read * after.linears}
    assert (after.expert_bytes, after.gate_bytes) == (engine.resident.expert_bytes, engine.resident.gate_bytes)
    assert set(after.exchange_s) == set(after.exchanged_bytes) == set(EXCHANGE_KINDS)


async def test_seeded_sampling_ignores_the_company(engine: RankEngine) -> None:
    sampled = replace(REQUESTS[0], sampling=Sampling(temperature=1.5, top_p=0.95, seed=42), max_tokens=12)
    alone = tokens(await collect(engine, sampled))
    company = await together(engine, [sampled, *REQUESTS[1:]])
    assert tokens(company[0]) == alone
    other = replace(sampled, sampling=Sampling(temperature=1.5, top_p=0.95, seed=43))
    assert tokens(await collect(engine, other)) != alone


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.5, top_p=0.95, seed=42)])
async def test_what_is_left_of_a_request_produces_what_was_left(engine: RankEngine, sampling: Sampling) -> None:
    # Prompts of 17 and 27 tokens: with 32 a pass, the rest of the second is prefilled in two parts.
    for request in (REQUESTS[0], REQUESTS[5]):
        whole = replace(request, sampling=sampling, max_tokens=14, ignore_eos=True)
        events = await collect(engine, whole)
        for produced in (1, 2, 9, 13):
            left = whole.after(tokens(events[:produced]))
            assert len(left.prompt_ids) + left.max_tokens == len(whole.prompt_ids) + 14
            resumed = await collect(engine, left)
            assert tokens(resumed) == tokens(events[produced:])
            assert resumed[-1].finish_reason == "length"
            for event, expected in zip(resumed, events[produced:], strict=True):
                assert event.shares == pytest.approx(expected.shares, abs=1e-5)


async def test_closing_the_iterator_frees_the_cache_within_100_ms(engine: RankEngine) -> None:
    await collect(engine, REQUESTS[0])
    processor = engine._manager.batch_processor
    assert processor is not None
    free, times = processor.cache.compute_free_capacity(), []
    for number in range(5):
        stream = engine.generate(replace(REQUESTS[0], request_id=f"c{number}", max_tokens=400, ignore_eos=True))
        await anext(stream)
        assert processor.scheduler.active_requests
        assert processor.cache.compute_free_capacity() < free
        closed = time.monotonic()
        await stream.aclose()
        async with asyncio.timeout(5):
            while processor.scheduler.active_requests or processor.cache.compute_free_capacity() < free:
                await asyncio.sleep(0.001)
        times.append(time.monotonic() - closed)
    assert median(times) < 0.1, times
    assert not engine._live


async def test_a_cache_too_small_for_all_costs_time_but_no_token(
    tiny_base: Path, tiny_bank: Bank, expected: list[list[int]]
) -> None:
    # Room for about three requests of two pages each, asked for by six: some are put back and prefilled again.
    small = config(tiny_base, tiny_bank).model_copy(update={"kv_cache_tokens": 384, "max_model_len": 128})
    engine = RankEngine(small)
    try:
        longer = [replace(request, max_tokens=100, ignore_eos=True) for request in REQUESTS]
        crowded = await together(engine, longer)
        alone = [await collect(engine, request) for request in longer]
    finally:
        engine.stop()
    assert [tokens(events) for events in crowded] == [tokens(events) for events in alone]
    for events, greedy in zip(alone, expected, strict=True):
        assert tokens(events)[: len(greedy)] == greedy


async def test_a_stopped_engine_refuses(tiny_base: Path, tiny_bank: Bank) -> None:
    engine = RankEngine(config(tiny_base, tiny_bank))
    engine.check()
    engine.stop()
    with pytest.raises(EngineUnavailable, match="not running"):
        await collect(engine, REQUESTS[0])


async def test_a_failing_pass_reaches_every_caller(tiny_base: Path, tiny_bank: Bank) -> None:
    engine = RankEngine(config(tiny_base, tiny_bank))
    try:

        def fail(*_: object) -> None:
            raise RuntimeError("a broken kernel")

        engine.routed.model.get_decoder().layers[0].register_forward_pre_hook(fail)
        answers = await asyncio.gather(*(collect(engine, request) for request in REQUESTS), return_exceptions=True)
        assert [type(answer) for answer in answers] == [EngineUnavailable] * len(REQUESTS)
        assert "a broken kernel" in str(answers[0])
        with pytest.raises(EngineUnavailable, match="not running"):
            engine.check()
    finally:
        engine.stop()


@pytest.mark.parametrize(("max_tokens", "reasons"), [(2, [None, "length"]), (3, [None, None])])
async def test_a_loop_that_fails_after_a_requests_last_token_has_not_failed_it(
    engine: RankEngine, monkeypatch: pytest.MonkeyPatch, max_tokens: int, reasons: list[str | None]
) -> None:
    def fail(request: GenerationRequest, eos: int | list[int]) -> None:
        failed = GenerationOutput(request.request_id, generated_tokens=[5, 6], error="x", status=RequestStatus.FAILED)
        engine._deliver(failed, Notes())

    monkeypatch.setattr(engine._manager, "submit", fail)
    events = engine.generate(replace(REQUESTS[0], max_tokens=max_tokens))
    assert [(await anext(events)).finish_reason for _ in reasons] == reasons
    if reasons[-1] is None:
        with pytest.raises(EngineUnavailable, match="interrupted: x"):
            await anext(events)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompt_ids": ()}, InvalidRequest, "from 0 to 259"),
        ({"prompt_ids": (3, 260)}, InvalidRequest, "from 0 to 259"),
        ({"prompt_ids": (-1,)}, InvalidRequest, "from 0 to 259"),
        ({"max_tokens": 0}, InvalidRequest, "max_tokens is 0"),
        ({"max_tokens": 5000}, PromptTooLong, "need 5017 tokens, but the context holds 2048"),
    ],
)
async def test_what_no_pass_can_serve_is_refused(
    engine: RankEngine, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        await collect(engine, replace(REQUESTS[0], **change))
    engine.check()


def test_missing_model_and_foreign_bank_are_refused(tiny_base: Path, tiny_bank: Bank, tmp_path: Path) -> None:
    with pytest.raises((ModelError, BankError), match=str(tmp_path)):
        RankEngine(config(tmp_path, tiny_bank))
    with pytest.raises(BankError, match=str(tmp_path)):
        RankEngine(EngineConfig(model=tiny_base, bank=tmp_path))


def _lockstep(rank: int, base: Path, bank_path: Path, rendezvous: str) -> list[list[int]]:
    """Rank 0 serves all requests but two; rank 1 serves those two, and mostly just its experts."""
    engine = RankEngine(EngineConfig(model=base, bank=bank_path, ep=2, max_batch_tokens=32), rank, rendezvous)
    mine = REQUESTS[:4] if rank == 0 else REQUESTS[4:]
    answers = asyncio.run(together(engine, mine))
    engine.stop()
    return [tokens(events) for events in answers]


def test_two_ranks_in_lockstep_equal_one(
    tiny_base: Path, tiny_bank: Bank, tmp_path: Path, expected: list[list[int]]
) -> None:
    rendezvous = f"tcp://127.0.0.1:{free_port()}"
    first, second = run_ranks(2, _lockstep, tiny_base, tiny_bank.path, rendezvous, join=False)
    assert first + second == expected


RICH = [
    GenerationRequest(
        "penalties", tuple(range(30, 40)), 12, Sampling(0.9, seed=4, presence_penalty=1.5, repetition_penalty=1.3)
    ),
    GenerationRequest(
        "json",
        tuple(range(50, 60)),
        40,
        Sampling(1.0, seed=2),
        grammar=json_grammar({"enum": ["left", "right", 12345]}),
    ),
    GenerationRequest(
        "scored", tuple(range(20, 30)), 8, Sampling(0.7, seed=1, logit_bias=((65, 4.0),)), top_logprobs=2
    ),
]


async def test_an_interrupted_request_goes_on_as_if_it_had_not_been(tiny_base: Path, tiny_bank: Bank) -> None:
    engine = RankEngine(config(tiny_base, tiny_bank))
    try:
        whole = await together(engine, RICH)
        for request, events in zip(RICH, whole, strict=True):
            assert len(events) > 4
            for cut in (1, len(events) - 1):
                rest = await collect(engine, request.after(tokens(events)[:1]).after(tokens(events)[1:cut]))
                assert [(one.token_id, one.finish_reason) for one in rest] == [
                    (one.token_id, one.finish_reason) for one in events[cut:]
                ]
    finally:
        engine.stop()


async def test_a_vote_reports_the_shares_over_the_whole_prompt(tiny_base: Path, tiny_bank: Bank) -> None:
    # 75 tokens take three passes of 32.
    prompt = tuple(3 + i % 90 for i in range(75))
    engine = RankEngine(config(tiny_base, tiny_bank))
    try:
        traced = [
            (await collect(engine, GenerationRequest(f"t{n}", prompt[:n], 1, trace=True)))[0].shares
            for n in range(1, len(prompt) + 1)
        ]
        vote = GenerationRequest("vote", prompt, 1, vote="gates")
        (event,), *_ = await together(engine, [vote, *REQUESTS[:2]])
        assert event.shares == pytest.approx(torch.tensor(traced).mean(0).tolist(), abs=1e-5)
    finally:
        engine.stop()


async def test_a_grammar_that_is_none_or_too_complex_fails_its_own_request_alone(
    tiny_base: Path, tiny_bank: Bank
) -> None:
    many = {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(1500)}}
    engine = RankEngine(config(tiny_base, tiny_bank))
    try:
        steady = asyncio.ensure_future(collect(engine, REQUESTS[0]))
        for grammar, says in [
            ('{"grammars": [{"lark_grammar": "start: x"}]}', "cannot be used: .*unknown name"),
            (json_grammar(many), "cannot be followed: Parser Error: Current row has 6007 items; max is 2000"),
        ]:
            broken = GenerationRequest("broken", (5, 6), 20, grammar=grammar)
            with pytest.raises(InvalidRequest, match=f"grammar of the answer {says}") as refused:
                await collect(engine, broken)
            assert refused.value.param == "response_format"
            assert "verbose" not in str(refused.value)
        assert len(await steady) == REQUESTS[0].max_tokens
    finally:
        engine.stop()
