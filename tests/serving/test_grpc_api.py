"""The gRPC methods over a scripted engine: shapes of answers, streams and errors."""

from __future__ import annotations

import grpc
import pytest

from meteora_dist.engine.request import Sampling
from meteora_dist.errors import EngineUnavailable, InvalidRequest
from meteora_dist.serving.grpc_api import CallFailed, GrpcMethods, text_request
from meteora_dist.serving.json_grammar import json_grammar
from meteora_dist.serving.proto.meteora.v1 import inference_pb2 as pb
from meteora_dist.serving.request import TextRequest, Turn
from meteora_dist.serving.selection import Selection
from meteora_dist.serving.tokenizer import TextTokenizer
from tests.serving.asking import Context
from tests.serving.conftest import MakeService
from tests.serving.scripted import ScriptedEngine, says


def methods(make_service: MakeService, engine: ScriptedEngine) -> GrpcMethods:
    servicer = GrpcMethods()
    servicer.service = make_service(engine)
    return servicer


def test_unset_fields_get_the_defaults_of_http() -> None:
    assert text_request(pb.GenerateRequest(prompt="Hi")) == TextRequest(("Hi",))


def test_set_fields_are_taken_zeros_too() -> None:
    sampling = pb.Sampling(temperature=0, top_p=0.5, seed=0, top_k=3, min_p=0.25, repetition_penalty=1.5)
    sampling.presence_penalty, sampling.frequency_penalty = -1, 2
    sampling.logit_bias.update({7: 1.5, 3: -100})
    message = pb.GenerateRequest(
        model="auto",
        chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="Hi")]),
        sampling=sampling,
        max_tokens=0,
        stop=["a", "b"],
        routing=pb.Routing(top_k=1, temperature=20, trace=True, mode=pb.MODE_AUTO),
        n=2,
        top_logprobs=0,
        ignore_eos=True,
        response_format=pb.ResponseFormat(json_object=True),
    )
    assert text_request(message) == TextRequest(
        prompts=((Turn("user", "Hi"),),),
        selection=Selection(top_k=1, temperature=20.0),
        n=2,
        max_tokens=0,
        sampling=Sampling(0.0, 0.5, 0, 3, 0.25, -1.0, 2.0, 1.5, ((3, -100.0), (7, 1.5))),
        seed=0,
        stop=("a", "b"),
        ignore_eos=True,
        top_logprobs=0,
        grammar=json_grammar(None),
        trace=True,
    )


async def test_generate_answers_in_one_message(tokenizer: TextTokenizer, make_service: MakeService) -> None:
    request = pb.GenerateRequest(prompt="Hi", routing=pb.Routing(trace=True))
    got = await methods(make_service, says(tokenizer, "yes")).Generate(request, Context())
    (choice,) = got.choices
    assert (got.model, choice.text, choice.finish_reason) == ("auto", "yes", pb.FINISH_REASON_STOP)
    assert got.usage == pb.Usage(prompt_tokens=2, completion_tokens=4)
    assert list(choice.routing.experts) == ["plain", "wide", "rooted", "partial"]
    assert choice.routing.dominating == "wide"
    assert [token.token for token in choice.routing.tokens] == ["y", "e", "s", ""]
    assert list(choice.routing.tokens[0].shares) == pytest.approx([0.1, 0.6, 0.2, 0.1])


async def test_layers_are_reported_when_asked_for(tokenizer: TextTokenizer, make_service: MakeService) -> None:
    for routing, layers in ((pb.Routing(trace_layers=True), [1, 3, -1]), (pb.Routing(trace=True), [])):
        request = pb.GenerateRequest(prompt="Hi", max_tokens=1, routing=routing)
        got = await methods(make_service, says(tokenizer, "yes")).Generate(request, Context())
        (token,) = got.choices[0].routing.tokens
        assert list(token.layer_experts) == layers
        assert list(token.layer_shares) == [0.75, 0.5, 0.0][: len(layers)]
        assert list(token.shares) == pytest.approx([0.1, 0.6, 0.2, 0.1])


async def test_a_stream_ends_with_reason_and_usage(tokenizer: TextTokenizer, make_service: MakeService) -> None:
    servicer = methods(make_service, says(tokenizer, "é!"))
    got = [message async for message in servicer.GenerateStream(pb.GenerateRequest(prompt="Hi"), Context())]
    assert [message.choice.text for message in got] == ["é", "!", ""]
    assert [message.choice.finish_reason for message in got] == [0, 0, pb.FINISH_REASON_STOP]
    assert [message.HasField("usage") for message in got] == [False, False, True]
    assert not any(message.choice.HasField("routing") for message in got)


async def test_list_experts_describes_the_bank(make_service: MakeService) -> None:
    got = await methods(make_service, ScriptedEngine([])).ListExperts(pb.ListExpertsRequest(), Context())
    assert (got.base_model, got.default_top_k, got.default_temperature) == ("tiny-llama", 2, 1.0)
    assert [(expert.name, expert.rank, expert.alpha, expert.rslora) for expert in got.experts] == [
        ("plain", 4, 8, False),
        ("wide", 8, 4, False),
        ("rooted", 4, 3, True),
        ("partial", 2, 16, False),
    ]


@pytest.mark.parametrize(
    ("request_", "code", "details"),
    [
        (pb.GenerateRequest(), grpc.StatusCode.INVALID_ARGUMENT, "one of prompt, chat, texts and token_prompts"),
        (pb.GenerateRequest(prompt="a", max_tokens=-1), grpc.StatusCode.INVALID_ARGUMENT, "max_tokens is -1"),
        (pb.GenerateRequest(prompt="x" * 99), grpc.StatusCode.INVALID_ARGUMENT, "holds 64 tokens"),
        (
            pb.GenerateRequest(prompt="a", model="nobody"),
            grpc.StatusCode.NOT_FOUND,
            "served are auto, auto-sequence, base",
        ),
        (
            pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="tool")])),
            grpc.StatusCode.INVALID_ARGUMENT,
            "role 'tool' must be one of system, user, assistant",
        ),
    ],
)
async def test_bad_requests_set_status_and_raise(
    make_service: MakeService, request_: pb.GenerateRequest, code: grpc.StatusCode, details: str
) -> None:
    servicer = methods(make_service, ScriptedEngine([]))
    unary, stream = Context(), Context()
    with pytest.raises(CallFailed):
        await servicer.Generate(request_, unary)
    with pytest.raises(CallFailed):
        _ = [message async for message in servicer.GenerateStream(request_, stream)]
    assert unary == stream
    assert unary.code == code
    assert details in unary.details


async def test_messages_stay_short_enough_for_trailers(make_service: MakeService) -> None:
    context = Context()
    with pytest.raises(CallFailed):
        await methods(make_service, ScriptedEngine([])).Generate(
            pb.GenerateRequest(prompt="Hi", model="x" * 99_999), context
        )
    assert len(context.details) == 1000


async def test_an_engine_that_dies_in_a_stream_is_unavailable(
    tokenizer: TextTokenizer, make_service: MakeService
) -> None:
    servicer = methods(make_service, says(tokenizer, "half", error=EngineUnavailable("restarting")))
    context = Context()
    stream = servicer.GenerateStream(pb.GenerateRequest(prompt="Hi"), context)
    got = [(await anext(stream)).choice.text for _ in range(4)]
    with pytest.raises(CallFailed):
        await anext(stream)
    assert ("".join(got), context.code) == ("half", grpc.StatusCode.UNAVAILABLE)
    assert context.details == "restarting (retry after 5 s)"


async def test_a_fault_of_ours_tells_no_detail(make_service: MakeService) -> None:
    servicer = methods(make_service, ScriptedEngine([], error=RuntimeError("/srv/secret")))
    context = Context()
    with pytest.raises(CallFailed) as caught:
        await servicer.Generate(pb.GenerateRequest(prompt="Hi"), context)
    assert context.code == grpc.StatusCode.INTERNAL
    assert "secret" not in context.details + str(caught.value)


@pytest.mark.parametrize(
    "schema", ['{"const": NaN}', '{"const": "\\ud800"}', '{"items":' * 300 + "{}" + "}" * 300, "[" * 9999]
)
def test_json_that_is_none_of_a_schema_is_refused(schema: str) -> None:
    message = pb.GenerateRequest(prompt="Hi", response_format=pb.ResponseFormat(json_schema=schema))
    with pytest.raises(InvalidRequest, match="JSON") as caught:
        text_request(message)
    assert caught.value.param == "response_format"
