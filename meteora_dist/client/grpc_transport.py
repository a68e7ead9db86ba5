"""The gRPC interface as a transport."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, cast

import grpc

from meteora_dist.client.answers import (
    Answer,
    FinishReason,
    Piece,
    Reply,
    RoutingTrace,
    TokenLogprob,
    TokenRouting,
    Usage,
)
from meteora_dist.client.failures import CallFailed, Failed, of_grpc
from meteora_dist.client.question import Message, Prompt, Question, Routing
from meteora_dist.serving.proto.meteora.v1 import inference_pb2 as pb
from meteora_dist.serving.proto.meteora.v1.inference_pb2_grpc import InferenceStub

_CHOOSING = ("auto", "auto-sequence", "base")
_OF_REQUEST = ("model", "max_tokens", "n", "top_logprobs", "ignore_eos")
_NO_LIMIT = [("grpc.max_receive_message_length", -1)]
_FINISH_REASONS: dict[pb.FinishReason, FinishReason] = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
}


class GrpcTransport:
    """Calls one service over gRPC. Made inside the event loop that uses it."""

    def __init__(self, target: str, api_key: str | None, secure: bool) -> None:
        if secure:
            self._channel = grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(), options=_NO_LIMIT)
        else:
            self._channel = grpc.aio.insecure_channel(target, options=_NO_LIMIT)
        self._stub: Any = InferenceStub(self._channel)  # type: ignore[no-untyped-call]  # generated
        self._metadata = () if api_key is None else (("authorization", f"Bearer {api_key}"),)

    async def models(self) -> tuple[str, ...]:
        """As ``Transport`` says."""
        with _failures():
            listed = await self._stub.ListExperts(pb.ListExpertsRequest(), metadata=self._metadata)
        return (*_CHOOSING, *(expert.name for expert in listed.experts))

    async def generate(self, question: Question) -> Reply:
        """As ``Transport`` says."""
        with _failures():
            got = await self._stub.Generate(request_of(question), metadata=self._metadata)
        answers = tuple(
            Answer(choice.text, choice.index, _FINISH_REASONS[choice.finish_reason], *_details(choice))
            for choice in got.choices
        )
        return Reply(got.id, got.model, answers, _usage(got.usage))

    async def stream(self, question: Question) -> AsyncGenerator[Piece, None]:
        """As ``Transport`` says."""
        call = self._stub.GenerateStream(request_of(question), metadata=self._metadata)
        usage: Usage | None = None
        try:
            with _failures():
                async for part in call:
                    usage = _usage(part.usage) if part.HasField("usage") else None
                    choice = part.choice
                    reason = _FINISH_REASONS.get(choice.finish_reason)
                    yield Piece(choice.text, choice.index, reason, *_details(choice), usage)
        finally:
            call.cancel()
        if usage is None:
            raise Failed(CallFailed("the stream was cut off before its end"))

    async def close(self) -> None:
        """As ``Transport`` says."""
        await self._channel.close()


def request_of(question: Question) -> pb.GenerateRequest:
    """The request's message; raises TypeError or ValueError for an option of another type than its field."""
    options: dict[str, Any] = dict(question.options)
    message = pb.GenerateRequest(stop=options.pop("stop", ()))
    _put_prompt(message, question.prompt)
    if (routing := options.pop("routing", None)) is not None:
        message.routing.CopyFrom(_routing(routing))
    if (schema := options.pop("json", None)) is not None:
        message.response_format.CopyFrom(_format(schema))
    message.sampling.logit_bias.update(options.pop("logit_bias", {}))
    for name, value in options.items():
        setattr(message if name in _OF_REQUEST else message.sampling, name, value)
    return message


def _put_prompt(message: pb.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        message.prompt = prompt
    elif not prompt or isinstance(prompt[0], str):
        message.texts.CopyFrom(pb.Texts(texts=cast("list[str]", prompt)))
    elif isinstance(prompt[0], Mapping):
        turns = cast("list[Message]", prompt)
        message.chat.messages.extend(pb.ChatMessage(role=turn["role"], content=turn["content"]) for turn in turns)
    else:
        rows = cast("list[list[int]]", [prompt] if isinstance(prompt[0], int) else prompt)
        message.token_prompts.prompts.extend(pb.TokenIds(ids=ids) for ids in rows)


def _routing(routing: Routing) -> pb.Routing:
    mode = None if routing.mode is None else f"MODE_{routing.mode.upper().replace('-', '_')}"
    experts = [pb.ChosenExpert(name=name, weight=weight) for name, weight in routing.experts.items()]
    return pb.Routing(
        mode=mode,
        experts=experts,
        top_k=routing.top_k,
        temperature=routing.temperature,
        vote=None if routing.vote is None else f"VOTE_RULE_{routing.vote.upper()}",
        trace=bool(routing.trace),
        trace_layers=routing.trace == "layers",
    )


def _format(schema: Literal[True] | Mapping[str, object]) -> pb.ResponseFormat:
    return pb.ResponseFormat(json_object=True) if schema is True else pb.ResponseFormat(json_schema=json.dumps(schema))


@contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise of_grpc(error) from error


def _details(choice: pb.Choice) -> tuple[tuple[TokenLogprob, ...], RoutingTrace | None]:
    scored = tuple(
        TokenLogprob(one.token.text, one.token.logprob, tuple((top.text, top.logprob) for top in one.top))
        for one in choice.logprobs
    )
    return scored, _trace(choice.routing) if choice.HasField("routing") else None


def _trace(routing: pb.RoutingTrace) -> RoutingTrace:
    tokens = tuple(_token(one) for one in routing.tokens)
    return RoutingTrace(tuple(routing.experts), tokens, routing.dominating or None, tuple(routing.votes))


def _token(found: pb.TokenRouting) -> TokenRouting:
    layers = tuple(found.layer_experts), tuple(found.layer_shares)
    return TokenRouting(found.token, found.id, tuple(found.shares), *layers)


def _usage(usage: pb.Usage) -> Usage:
    return Usage(usage.prompt_tokens, usage.completion_tokens)
