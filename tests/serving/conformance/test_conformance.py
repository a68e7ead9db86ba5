"""What every documented parameter does, asked in every way; and what is refused, with the field's name."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import pytest

from tests.serving.conformance.conftest import CONTEXT
from tests.serving.conformance.ways import Grpc, Http, Refused

Way = Http | Grpc

PROMPT = "Which expert answers?"
IDS = [10, 20, 30, 40]
EXPERTS = ("plain", "wide", "rooted", "partial")
EOS = "259"
GREEDY: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}
DRAWN = GREEDY | {"temperature": 1.0, "seed": 3}
LOGGED = GREEDY | {"logprobs": 3}


async def text(way: Way, base: dict[str, Any] = GREEDY, **more: Any) -> str:
    return (await way.ask(base | more)).text


# Each of these leaves the greedy answer as it is: all but the most probable token are cut off, or nothing is changed.
@pytest.mark.parametrize(
    "fields",
    [
        *({"seed": 7}, {"temperature": 1.0, "top_k": 1}, {"temperature": 2.0, "top_p": 1e-9}),
        *({"temperature": 1.0, "min_p": 1.0}, {"top_p": 0.5}, {"top_k": 0}, {"min_p": 0.5}, {"n": 1}),
        *({"presence_penalty": 0.0}, {"frequency_penalty": 0.0}, {"repetition_penalty": 1.0}, {"logit_bias": {}}),
        *({"stop": []}, {"stop": "\u2603"}, {"ignore_eos": False}, {"response_format": {"type": "text"}}),
        *({"logprobs": 0}, {"routing": {}}, {"routing": {"top_k": 2}}, {"routing": {"temperature": 1.0}}),
        *({"routing": {"trace": True}}, {"routing": {"mode": "auto"}}, {"model": "auto"}),
    ],
    ids=str,
)
async def test_what_changes_nothing(way: Way, fields: dict[str, Any]) -> None:
    assert await text(way, **fields) == await text(way)


# Each of these changes the greedy answer, always to the same other one.
@pytest.mark.parametrize(
    "fields",
    [
        *({"temperature": 1.0, "seed": 1}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0}),
        *({"repetition_penalty": 20.0}, {"logit_bias": {"65": 5.0}}, {"response_format": {"type": "json_object"}}),
        *({"prompt": "Another prompt"}, {"prompt": IDS}, {"messages": [{"role": "user", "content": PROMPT}]}),
        *({"routing": {"top_k": 1}}, {"routing": {"top_k": 4}}, {"routing": {"temperature": 50.0}}),
        *({"model": "base"}, {"model": "auto-sequence"}, {"model": "plain:0.9,wide:-3"}),
        *({"model": name} for name in EXPERTS),
    ],
    ids=str,
)
async def test_what_changes_the_answer(way: Way, fields: dict[str, Any]) -> None:
    base = {name: value for name, value in GREEDY.items() if "messages" not in fields or name != "prompt"}
    other = await text(way, base, **fields)
    assert other != await text(way)
    assert other == await text(way, base, **fields)


# Each of these changes what is drawn at temperature 1, with the same seed.
@pytest.mark.parametrize(
    "fields",
    [
        *({"seed": 4}, {"temperature": 0.2}, {"temperature": 2.0}, {"top_k": 2}, {"top_p": 0.2}, {"min_p": 0.5}),
        *({"logit_bias": {"65": 9.0}}, {"repetition_penalty": 0.05}),
    ],
    ids=str,
)
async def test_what_changes_a_draw(way: Way, fields: dict[str, Any]) -> None:
    assert await text(way, DRAWN, **fields) != await text(way, DRAWN)


async def test_a_seed_repeats_a_draw_and_none_does_not(way: Way) -> None:
    assert await text(way, DRAWN) == await text(way, DRAWN)
    free = {name: value for name, value in DRAWN.items() if name != "seed"}
    assert len({await text(way, free) for _ in range(4)}) > 1


@pytest.mark.parametrize("tokens", [1, 5, CONTEXT - len(PROMPT)])
async def test_max_tokens(way: Way, tokens: int) -> None:
    got = await way.ask(GREEDY | {"max_tokens": tokens})
    assert (got.usage, got.answers[0].reason) == ((len(PROMPT), tokens), "length")


async def test_n_answers_differ_by_their_seeds(way: Way) -> None:
    got = await way.ask(DRAWN | {"n": 3})
    assert len({answer.text for answer in got.answers}) == 3
    assert got.answers[0].text == await text(way, DRAWN)
    assert got.usage == (len(PROMPT), 24)
    greedy = await way.ask(GREEDY | {"n": 2})
    assert [answer.text for answer in greedy.answers] == [await text(way)] * 2


async def test_a_list_of_prompts_is_answered_prompt_by_prompt(way: Way) -> None:
    got = await way.ask(GREEDY | {"prompt": [PROMPT, "Hi"], "n": 2})
    one, other = await text(way), await text(way, prompt="Hi")
    assert [answer.text for answer in got.answers] == [one, one, other, other]
    assert got.usage == (len(PROMPT) + 2, 4 * 8)


async def test_token_ids_are_prompts(way: Way, tokenizer: Any) -> None:
    ids = list(tokenizer.encode(PROMPT))
    assert await text(way, prompt=ids) == await text(way)
    got = await way.ask(GREEDY | {"prompt": [ids, IDS]})
    assert [answer.text for answer in got.answers] == [await text(way), await text(way, prompt=IDS)]


async def test_a_chat_is_the_models_template(way: Way) -> None:
    chat = {name: value for name, value in GREEDY.items() if name != "prompt"}
    turns = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}]
    assert await text(way, chat, messages=turns) == await text(way, prompt="<system>Be brief\n<user>Hi\n<assistant>")


async def test_stop_texts_end_the_answer(way: Way) -> None:
    whole = await text(way)
    got = await way.ask(GREEDY | {"stop": ["never", whole[4:6]]})
    assert (got.text, got.answers[0].reason) == (whole[: whole.index(whole[4:6])], "stop")
    assert got.usage[1] < 8


async def test_the_end_of_sequence_ends_the_answer_unless_ignored(way: Way) -> None:
    ended = await way.ask(GREEDY | {"logit_bias": {EOS: 100.0}})
    assert (ended.text, ended.answers[0].reason, ended.usage[1]) == ("", "stop", 1)
    ignored = await way.ask(GREEDY | {"logit_bias": {EOS: 100.0}, "ignore_eos": True})
    assert (ignored.answers[0].reason, ignored.usage[1]) == ("length", 8)


async def test_biases_force_and_forbid_tokens(way: Way, tokenizer: Any) -> None:
    letter = str(tokenizer.encode("A")[0])
    assert await text(way, logit_bias={letter: 100.0}) == "A" * 8
    first = (await way.ask(LOGGED)).answers[0].letters[0]
    forbidden = {str(tokenizer.encode(first)[0]): -100.0} if first.isascii() else {letter: 100.0}
    assert not (await text(way, logit_bias=forbidden)).startswith(first)


@pytest.mark.parametrize("field", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
async def test_penalties_reduce_repeats_and_negative_ones_add_some(way: Way, field: str) -> None:
    long = LOGGED | {"max_tokens": 60, "ignore_eos": True}
    strong, weak = (20.0, 0.2) if field == "repetition_penalty" else (2.0, -2.0)

    async def repeats(value: float) -> int:
        letters = (await way.ask(long | {field: value})).answers[0].letters
        return len(letters) - len(Counter(letters))

    assert await repeats(strong) < await repeats(weak)


@pytest.mark.parametrize("count", [0, 1, 5, 20])
async def test_logprobs_report_the_models_own_probabilities(way: Way, count: int) -> None:
    (answer,) = (await way.ask(GREEDY | {"logprobs": count})).answers
    assert len(answer.scored) == 8
    for one in answer.scored:
        values = [value for _, _, value in one.top]
        assert len(values) == count
        assert values == sorted(values, reverse=True)
        assert sum(map(math.exp, values)) <= 1 + 1e-6
        # Greedy takes the most probable token.
        assert count == 0 or one.chosen == one.top[0]


async def test_logprobs_know_nothing_of_biases_and_temperature(way: Way, tokenizer: Any) -> None:
    plain = (await way.ask(LOGGED)).answers[0].scored[0]
    biased = LOGGED | {"logit_bias": {str(tokenizer.encode("A")[0]): 100.0}, "temperature": 2.0}
    forced = (await way.ask(biased)).answers[0].scored[0]
    assert (forced.chosen[0], forced.top) == ("A", plain.top)


async def test_chat_logprobs_have_the_tokens_bytes(way: Way, tokenizer: Any) -> None:
    half = str(tokenizer.encode("é")[0])
    chat = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "max_tokens": 2}
    (answer,) = (await way.ask(chat | {"logprobs": 1, "logit_bias": {half: 100.0}})).answers
    assert [one.chosen[:2] for one in answer.scored] == [("\ufffd", b"\xc3")] * 2


async def test_json_answers_are_json(way: Way) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "who": {"enum": ["a", "b"]}},
        "required": ["ok", "who"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for base in (GREEDY, DRAWN):
        got = await way.ask(base | {"max_tokens": 100, "response_format": form})
        assert got.answers[0].reason == "stop"
        answer = json.loads(got.text)
        assert (set(answer), answer["who"] in ("a", "b")) == ({"ok", "who"}, True)
    assert (await text(way, response_format={"type": "json_object"})).startswith("{")


async def test_a_named_expert_may_be_named_in_three_ways(way: Way) -> None:
    wanted = await text(way, model="rooted")
    assert await text(way, routing={"mode": "named", "experts": [{"name": "rooted"}]}) == wanted
    assert await text(way, routing={"experts": [{"name": "rooted"}]}) == wanted
    assert await text(way, model="rooted:1") == wanted
    assert await text(way, model="rooted", routing={"mode": "named", "experts": [{"name": "rooted"}]}) == wanted


async def test_blends_are_weighted_sums(way: Way) -> None:
    by_model = await text(way, model="wide:0.7,plain:0.6")
    experts = [{"name": "wide", "weight": 0.7}, {"name": "plain", "weight": 0.6}]
    assert await text(way, routing={"mode": "blend", "experts": experts}) == by_model
    assert await text(way, routing={"experts": experts}) == by_model
    assert await text(way, model="wide:0,plain:0") == await text(way, model="base")
    assert await text(way, model="wide:1,plain:0") == await text(way, model="wide")
    (answer,) = (await way.ask(GREEDY | {"model": "wide:0.75,plain:0.25", "routing": {"trace": True}})).answers
    assert answer.dominating == "wide"
    assert answer.shares[0] == pytest.approx((0.25, 0.75, 0, 0), abs=1e-6)


async def test_auto_sequence_is_one_expert_for_the_whole_answer(way: Way) -> None:
    sequence = GREEDY | {"routing": {"trace": True, "mode": "auto-sequence"}}
    (answer,) = (await way.ask(sequence)).answers
    assert answer.dominating in EXPERTS
    assert answer.text == await text(way, model=answer.dominating)
    assert set(answer.shares) == {tuple(float(name == answer.dominating) for name in EXPERTS)}
    assert await text(way, model="auto-sequence") == answer.text
    assert len({(await way.ask(sequence | {"prompt": [i, 2 * i, 99]})).answers[0].dominating for i in range(8)}) > 1


async def test_traces_report_every_token(way: Way) -> None:
    (auto,) = (await way.ask(GREEDY | {"routing": {"trace": True}})).answers
    assert [sum(shares) for shares in auto.shares] == pytest.approx([1.0] * 8, abs=1e-5)
    assert auto.dominating in EXPERTS
    (base,) = (await way.ask(GREEDY | {"model": "base", "routing": {"trace": True}})).answers
    assert (base.dominating, set(base.shares)) == (None, {(0.0,) * 4})


@pytest.mark.parametrize("fields", [{"n": 2}, {"stop": "zz", "logprobs": 2}, {"routing": {"trace": True}}], ids=str)
async def test_all_four_ways_agree(ways: list[Way], fields: dict[str, Any]) -> None:
    first, *others = [await way.ask(DRAWN | fields) for way in ways]
    for other in others:
        assert (other.usage, len(other.answers)) == (first.usage, len(first.answers))
        for one, same in zip(other.answers, first.answers, strict=True):
            assert (one.text, one.reason, one.dominating, len(one.scored)) == (
                *(same.text, same.reason, same.dominating, len(same.scored)),
            )
            for shares, wanted in zip(one.shares, same.shares, strict=True):
                assert shares == pytest.approx(wanted, abs=1e-6)


async def test_base_may_be_asked_for_by_mode(way: Way) -> None:
    assert await text(way, routing={"mode": "base"}) == await text(way, model="base")


NESTED = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objekt"}}}


@pytest.mark.parametrize(
    ("fields", "status", "param", "says"),
    [
        ({"max_tokens": 0}, 400, "max_tokens", "max_tokens is 0, but must be at least 1"),
        ({"max_tokens": -1}, 400, "max_tokens", "at least 1"),
        ({"max_tokens": CONTEXT}, 400, "prompt", f"the context holds {CONTEXT} tokens"),
        ({"prompt": "x" * CONTEXT}, 400, "prompt", f"the context holds {CONTEXT} tokens"),
        ({"prompt": ""}, 400, "prompt", "no tokens"),
        ({"prompt": []}, 400, "prompt", "at least one prompt"),
        ({"prompt": ["Hi", ""]}, 400, "prompt", "no tokens"),
        ({"prompt": [5, 260]}, 400, "prompt", "token ids from 0 to 259"),
        ({"prompt": [7, -1]}, 400, "prompt", "prompt has -1, which is no token id"),
        ({"prompt": ["Hi"] * 33}, 400, "n", "at most 32 answers"),
        ({"temperature": -0.1}, 400, "temperature", "between 0 and 2"),
        ({"temperature": 2.1}, 400, "temperature", "between 0 and 2"),
        ({"top_p": 0.0}, 400, "top_p", "above 0 and at most 1"),
        ({"top_p": 1.1}, 400, "top_p", "above 0 and at most 1"),
        ({"top_k": -1}, 400, "top_k", "at least 1, or 0"),
        ({"min_p": -0.1}, 400, "min_p", "between 0 and 1"),
        ({"min_p": 1.1}, 400, "min_p", "between 0 and 1"),
        ({"presence_penalty": 2.1}, 400, "presence_penalty", "between -2 and 2"),
        ({"frequency_penalty": -2.1}, 400, "frequency_penalty", "between -2 and 2"),
        ({"repetition_penalty": 0.0}, 400, "repetition_penalty", "between 0.01 and 100"),
        ({"logit_bias": {"5": 101.0}}, 400, "logit_bias", "between -100 and 100"),
        ({"logit_bias": {"260": 1.0}}, 400, "logit_bias", "token ids from 0 to 259"),
        ({"logit_bias": dict.fromkeys(map(str, range(301)), 1.0)}, 400, "logit_bias", "for at most 300"),
        ({"n": 0}, 400, "n", "at least 1"),
        ({"n": 33}, 400, "n", "at most 32 answers"),
        ({"stop": list("abcde")}, 400, "stop", "5 texts, but must be at most 4"),
        ({"stop": [""]}, 400, "stop", "an empty text"),
        ({"logprobs": -1}, 400, "top_logprobs", "between 0 and 20"),
        ({"logprobs": 21}, 400, "top_logprobs", "between 0 and 20"),
        ({"response_format": NESTED}, 400, "response_format", "Invalid type: objekt"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, 400, "ignore_eos", "exclude each other"),
        ({"model": "nobody"}, 404, "model", "there is no model 'nobody' here; served are auto, auto-sequence, base"),
        ({"model": "plain:1,nobody:1"}, 404, "model", "'nobody'"),
        ({"model": "plain:x"}, 400, "model", "'x' is no weight"),
        ({"model": "plain:1,,wide:1"}, 400, "model", "NAME:WEIGHT,NAME:WEIGHT"),
        ({"model": "plain:1,plain:1"}, 400, "model", "names plain more than once"),
        ({"model": "plain:99"}, 400, "model", "between -16 and 16"),
        ({"model": "plain:nan"}, 400, "model", "between -16 and 16"),
        ({"model": "plain", "routing": {"mode": "base"}}, 400, "model", "says another choice than routing"),
        ({"model": "plain", "routing": {"top_k": 1}}, 400, "routing.top_k", "is for mode auto, and this is named"),
        ({"routing": {"top_k": 0}}, 400, "routing.top_k", "at least 1"),
        ({"routing": {"temperature": 0.0}}, 400, "routing.temperature", "between 0.001 and 1000"),
        ({"routing": {"mode": "named"}}, 400, "routing.experts", "one expert"),
        ({"routing": {"mode": "blend"}}, 400, "routing.experts", "0 experts"),
        (
            {"routing": {"mode": "base", "experts": [{"name": "wide"}]}},
            400,
            "routing.experts",
            "is for named and blend",
        ),
        ({"routing": {"experts": [{"name": "nobody"}]}}, 404, "model", "'nobody'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role", "tool|'system'"),
    ],
    ids=lambda value: str(value)[:60],
)
async def test_what_is_refused(way: Way, fields: dict[str, Any], status: int, param: str, says: str) -> None:
    question = {name: value for name, value in GREEDY.items() if "messages" not in fields or name != "prompt"}
    with pytest.raises(Refused) as refused:
        await way.ask(question | fields)
    assert refused.value.status == status
    assert any(part in str(refused.value) for part in says.split("|"))
    if isinstance(way, Http):
        assert refused.value.param == param
