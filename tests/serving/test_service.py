"""From a text request to pieces of text, over a scripted engine."""

from __future__ import annotations

import asyncio
import dataclasses
from contextlib import aclosing
from typing import Any

import pytest

from meteora_dist.bank.manifest import RouterSettings, VoteRule
from meteora_dist.errors import EngineUnavailable, ExpertNotFound, InvalidRequest, Overloaded, PromptTooLong
from meteora_dist.moe.routing import BASE, RoutingChoice, named
from meteora_dist.serving.catalog import Catalog
from meteora_dist.serving.keys import ANONYMOUS
from meteora_dist.serving.request import Answer, Prompt, TextRequest, TokenIds, collect, usage_of
from meteora_dist.serving.selection import Selection, select
from meteora_dist.serving.service import TextService
from meteora_dist.serving.tokenizer import TextTokenizer
from tests.serving.conftest import MakeService
from tests.serving.scripted import ScriptedEngine, says


async def answer(service: TextService, prompt: Prompt = "Hi", **fields: Any) -> Answer:
    return (await answers(service, (prompt,), **fields))[0]


async def answers(service: TextService, prompts: tuple[Prompt, ...], **fields: Any) -> tuple[Answer, ...]:
    prepared = await service.prepare(TextRequest(prompts, **fields), ANONYMOUS)
    return await collect(service.pieces(prepared), len(prepared.answers))


async def test_an_answer_has_text_reason_and_counts(tokenizer: TextTokenizer, make_service: MakeService) -> None:
    got = await answer(make_service(says(tokenizer, "yes")))
    assert (got.text, got.ending.finish_reason) == ("yes", "stop")
    assert (got.ending.prompt_tokens, got.ending.completion_tokens) == (2, 4)


async def test_max_tokens_ends_with_length(tokenizer: TextTokenizer, make_service: MakeService) -> None:
    got = await answer(make_service(says(tokenizer, "yesterday")), max_tokens=3)
    assert (got.text, got.ending.finish_reason, got.ending.completion_tokens) == ("yes", "length", 3)


async def test_a_stop_text_ends_the_generation_itself(tokenizer: TextTokenizer, make_service: MakeService) -> None:
    engine = says(tokenizer, "one. two. three.")
    got = await answer(make_service(engine), stop=(". t",))
    assert (got.text, got.ending.finish_reason, got.ending.completion_tokens) == ("one", "stop", 6)
    assert engine.closed == [engine.seen[0].request_id]


async def test_held_back_text_is_sent_at_the_end(tokenizer: TextTokenizer, make_service: MakeService) -> None:
    got = await answer(make_service(says(tokenizer, "one EN")), stop=("END",))
    assert got.text == "one EN"


async def test_the_trace_has_every_token_and_the_dominating_expert(
    tokenizer: TextTokenizer, make_service: MakeService
) -> None:
    got = await answer(make_service(says(tokenizer, "é!")), trace=True)
    assert [token.token for token in got.tokens] == ["", "é", "!", ""]
    assert got.tokens[-1].id == 259
    assert got.dominating == "wide"
    untraced = await answer(make_service(says(tokenizer, "é!")))
    assert (untraced.tokens, untraced.dominating) == ((), None)


@pytest.mark.parametrize(
    ("selection", "routing"),
    [
        (Selection(), RoutingChoice("auto", 2, 1.0)),
        (Selection(top_k=9, temperature=20.0), RoutingChoice("auto", 4, 20.0)),
        (Selection("base"), BASE),
        (select("rooted"), named(2)),
        (select("wide:0.5,plain:-2"), RoutingChoice("fixed", experts=((1, 0.5), (0, -2.0)))),
    ],
)
async def test_the_selection_chooses_the_routing(
    tokenizer: TextTokenizer, make_service: MakeService, selection: Selection, routing: RoutingChoice
) -> None:
    engine = says(tokenizer, "x")
    await answer(make_service(engine), selection=selection)
    assert engine.seen[0].routing == routing


async def test_auto_sequence_votes_once_a_prompt_and_then_names_the_expert(
    tokenizer: TextTokenizer, make_service: MakeService
) -> None:
    engine = says(tokenizer, "x")
    await answers(make_service(engine), ("Hi",), n=2, selection=Selection("auto-sequence"))
    vote, *answered = engine.seen
    assert (vote.vote, vote.max_tokens, vote.routing) == ("gates", 1, RoutingChoice("auto", 2, 1.0))
    # The scripted engine gives expert 1 the largest share.
    assert [request.routing for request in answered] == [named(1), named(1)]
    assert {request.prompt_ids for request in engine.seen} == {tokenizer.encode("Hi")}


def with_routers(service: TextService, rule: VoteRule = "majority") -> TextService:
    """The same service of a bank that has layer routers."""
    manifest = service.catalog.manifest
    routing = manifest.routing.model_copy(update={"vote": rule})
    fields = {"routers": RouterSettings(digest="0" * 64), "routing": routing}
    service.catalog = Catalog(manifest.model_copy(update=fields))
    return service


@pytest.mark.parametrize(
    ("bank", "asked", "expert"),
    [("majority", None, 1), ("last", None, 2), ("majority", "last", 2), ("last", "majority", 1)],
    ids=["bank majority", "bank last", "request last", "request majority"],
)
async def test_routers_vote_where_the_bank_has_them(
    tokenizer: TextTokenizer, make_service: MakeService, bank: VoteRule, asked: VoteRule | None, expert: int
) -> None:
    engine = says(tokenizer, "x")
    selection = Selection("auto-sequence", vote=asked)
    got = await answers(with_routers(make_service(engine), bank), ("Hi",), n=2, selection=selection, trace=True)
    ballot, *answered = engine.seen
    assert (ballot.vote, ballot.max_tokens, ballot.routing, ballot.trace) == ("routers", 1, BASE, False)
    assert [request.routing for request in answered] == [named(expert), named(expert)]
    # The scripted layers vote 1, 3, 1, 2.
    assert [one.votes for one in got] == [(0, 2, 1, 1)] * 2


async def test_votes_are_shown_in_traces_of_auto_sequence_alone(
    tokenizer: TextTokenizer, make_service: MakeService
) -> None:
    service = with_routers(make_service(says(tokenizer, "x")))
    assert (await answer(service, selection=Selection("auto-sequence"))).votes == ()
    assert (await answer(service, selection=select("wide"), trace=True)).votes == ()
    assert (await answer(service, trace=True)).votes == ()


async def test_a_rule_for_routers_needs_routers(tokenizer: TextTokenizer, make_service: MakeService) -> None:
    with pytest.raises(InvalidRequest, match="this one has none; its gates vote") as refused:
        await answer(make_service(says(tokenizer, "x")), selection=Selection("auto-sequence", vote="last"))
    assert refused.value.param == "routing.vote"


async def test_a_call_may_have_several_prompts_and_answers(tokenizer: TextTokenizer, make_service: MakeService) -> None:
    engine = says(tokenizer, "yes")
    prompts = ("Hi", TokenIds(tokenizer.encode("Hello")))
    got = await answers(make_service(engine, 6), prompts, n=3, seed=5)
    assert [(one.index, one.text) for one in got] == [(index, "yes") for index in range(6)]
    assert usage_of(tuple(one.ending for one in got), 3).prompt_tokens == 2 + 5
    seeds = [request.sampling.seed for request in sorted(engine.seen, key=lambda request: request.request_id)]
    assert seeds[0] == 5
    assert len(set(seeds[:3])) == 3
    assert seeds[:3] == seeds[3:]


async def test_a_call_keeps_the_generation_that_was_the_newest_when_it_started(
    tokenizer: TextTokenizer, make_service: MakeService
) -> None:
    engine = dataclasses.replace(says(tokenizer, "ab"), pause=asyncio.Event())
    service = make_service(engine)
    before = service.catalog.manifest
    prepared = [
        await service.prepare(TextRequest(("Hi",), selection=select(model), trace=True), ANONYMOUS)
        for model in ("auto-sequence", "rooted", "plain")
    ]
    running = asyncio.ensure_future(collect(service.pieces(prepared[0]), 1))
    while not engine.seen:
        await asyncio.sleep(0)
    fields = {"experts": (*before.experts[1:], before.experts[0].model_copy(update={"name": "new"}))}
    service.catalog = Catalog(before.model_copy(update=fields | {"generation": 2}))
    assert engine.pause is not None
    engine.pause.set()
    assert (await running)[0].experts == ("plain", "wide", "rooted", "partial")
    assert (await collect(service.pieces(prepared[1]), 1))[0].experts == ("wide", "rooted", "partial", "new")
    # The vote, the answer that follows it, and the call that started later.
    assert [seen.generation for seen in engine.seen] == [1, 1, 2]
    assert [seen.routing for seen in engine.seen[1:]] == [named(1), named(1)]
    with pytest.raises(ExpertNotFound, match="'plain' here; served are auto, auto-sequence, base, wide"):
        await anext(service.pieces(prepared[2]))


async def test_only_requests_without_a_seed_get_different_ones(
    tokenizer: TextTokenizer, make_service: MakeService
) -> None:
    engine = says(tokenizer, "x")
    service = make_service(engine)
    for seed in (None, None, 7, 7, -1):
        await answer(service, seed=seed)
    seeds = [request.sampling.seed for request in engine.seen]
    assert seeds[0] != seeds[1]
    assert seeds[2:] == [7, 7, 2**63 - 1]


async def test_too_long_prompts_and_answers_are_refused_with_the_numbers(make_service: MakeService) -> None:
    service = make_service(ScriptedEngine([]))
    with pytest.raises(PromptTooLong, match=r"holds 64 tokens.*needs 65: 64 of the prompt"):
        await answer(service, prompt="x" * 64)
    with pytest.raises(PromptTooLong, match=r"needs 72: 2 of the prompt and 70 of the answer"):
        await answer(service, max_tokens=70)
    assert (await service.prepare(TextRequest(("x" * 60,)), ANONYMOUS)).answers[0].max_tokens == 4


async def test_an_unknown_model_is_refused_with_those_there_are(make_service: MakeService) -> None:
    with pytest.raises(ExpertNotFound, match="'nobody' here; served are auto, auto-sequence, base, plain, wide"):
        await answer(make_service(ScriptedEngine([])), selection=select("nobody"))


async def test_one_request_too_many_is_refused_and_room_comes_back(
    tokenizer: TextTokenizer, make_service: MakeService
) -> None:
    engine = dataclasses.replace(says(tokenizer, "x"), pause=asyncio.Event())
    service = make_service(engine)
    running = [asyncio.ensure_future(answer(service)) for _ in range(2)]
    while len(engine.seen) < 2:
        await asyncio.sleep(0.01)
    with pytest.raises(Overloaded, match="2 answers are under way"):
        await answer(service)
    running[0].cancel()
    await asyncio.gather(running[0], return_exceptions=True)
    assert engine.closed == [engine.seen[0].request_id]
    engine.pause.set()
    assert (await answer(service)).text == (await running[1]).text == "x"


async def test_closing_the_pieces_cancels_and_frees(tokenizer: TextTokenizer, make_service: MakeService) -> None:
    engine = says(tokenizer, "a long answer")
    service = make_service(engine)
    for _ in range(3):
        async with aclosing(service.pieces(await service.prepare(TextRequest(("Hi",)), ANONYMOUS))) as pieces:
            assert (await anext(pieces)).text == "a"
    assert engine.closed == [request.request_id for request in engine.seen]


async def test_an_engine_that_dies_ends_the_answer(tokenizer: TextTokenizer, make_service: MakeService) -> None:
    with pytest.raises(EngineUnavailable, match="lost"):
        await answer(make_service(says(tokenizer, "half", error=EngineUnavailable("lost"))))
