"""From a text request to pieces of text, over a scripted engine."""

from __future__ import annotations

import asyncio
import dataclasses
from contextlib import aclosing

import pytest

from meteora_dist.errors import EngineUnavailable, ExpertNotFound, InvalidRequest, Overloaded, PromptTooLong
from meteora_dist.moe.routing import BASE, RoutingChoice, named
from meteora_dist.serving.request import Answer, TextRequest, collect
from meteora_dist.serving.service import TextService
from meteora_dist.serving.tokenizer import TextTokenizer
from tests.serving.conftest import MakeService
from tests.serving.scripted import ScriptedEngine, says


async def answer(service: TextService, **fields: object) -> Answer:
    request = TextRequest(**{"prompt": "Hi", **fields})  # type: ignore[arg-type]
    return await collect(service.pieces(await service.prepare(request)))


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
    ("fields", "routing"),
    [
        ({}, RoutingChoice("auto", 2, 1.0)),
        ({"top_k": 9, "gate_temperature": 20.0}, RoutingChoice("auto", 4, 20.0)),
        ({"model": "base"}, BASE),
        ({"model": "rooted"}, named(2)),
    ],
)
async def test_the_model_chooses_the_routing(
    tokenizer: TextTokenizer, make_service: MakeService, fields: dict[str, object], routing: RoutingChoice
) -> None:
    engine = says(tokenizer, "x")
    await answer(make_service(engine), **fields)
    assert engine.seen[0].routing == routing


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


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"max_tokens": -1}, "max_tokens", "max_tokens is -1, but must be at least 1"),
        ({"temperature": 2.5}, "temperature", "between 0 and 2"),
        ({"temperature": float("nan")}, "temperature", "between 0 and 2"),
        ({"top_p": 0.0}, "top_p", "above 0"),
        ({"seed": 2**63}, "seed", "64-bit"),
        ({"stop": ("",)}, "stop", "empty text"),
        ({"stop": tuple("abcde")}, "stop", "5 texts, but must be at most 4"),
        ({"top_k": 0}, "routing.top_k", "at least 1"),
        ({"gate_temperature": 0.0}, "routing.temperature", "above 0"),
        ({"prompt": ()}, "messages", "at least one message"),
        ({"prompt": ""}, "prompt", "no tokens"),
    ],
)
async def test_a_value_out_of_range_is_named(
    make_service: MakeService, fields: dict[str, object], param: str, says: str
) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        await answer(make_service(ScriptedEngine([])), **fields)
    assert caught.value.param == param


async def test_too_long_prompts_and_answers_are_refused_with_the_numbers(make_service: MakeService) -> None:
    service = make_service(ScriptedEngine([]))
    with pytest.raises(PromptTooLong, match=r"holds 64 tokens.*needs 65: 64 of the prompt"):
        await answer(service, prompt="x" * 64)
    with pytest.raises(PromptTooLong, match=r"needs 72: 2 of the prompt and 70 of the answer"):
        await answer(service, max_tokens=70)
    assert (await service.prepare(TextRequest("x" * 60))).generation.max_tokens == 4


async def test_an_unknown_model_is_refused_with_those_there_are(make_service: MakeService) -> None:
    with pytest.raises(ExpertNotFound, match="'nobody' here; served are auto, base, plain, wide, rooted, partial"):
        await answer(make_service(ScriptedEngine([])), model="nobody")


async def test_one_request_too_many_is_refused_and_room_comes_back(
    tokenizer: TextTokenizer, make_service: MakeService
) -> None:
    engine = dataclasses.replace(says(tokenizer, "x"), pause=asyncio.Event())
    service = make_service(engine)
    running = [asyncio.ensure_future(answer(service)) for _ in range(2)]
    while len(engine.seen) < 2:
        await asyncio.sleep(0.01)
    with pytest.raises(Overloaded, match="2 requests are under way"):
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
        async with aclosing(service.pieces(await service.prepare(TextRequest("Hi")))) as pieces:
            assert (await anext(pieces)).text == "a"
    assert engine.closed == [request.request_id for request in engine.seen]


async def test_an_engine_that_dies_ends_the_answer(tokenizer: TextTokenizer, make_service: MakeService) -> None:
    with pytest.raises(EngineUnavailable, match="lost"):
        await answer(make_service(says(tokenizer, "half", error=EngineUnavailable("lost"))))
