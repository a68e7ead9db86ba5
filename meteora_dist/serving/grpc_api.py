"""The gRPC interface: the methods of ``meteora.v1.Inference`` over the same text service as HTTP."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any, Protocol

import grpc
from google.protobuf.message import Message

from meteora_dist.engine.request import Sampling
from meteora_dist.errors import InvalidRequest
from meteora_dist.observability.calls import current_call
from meteora_dist.serving.json_grammar import json_grammar
from meteora_dist.serving.keys import Caller
from meteora_dist.serving.proto.meteora.v1 import inference_pb2 as pb
from meteora_dist.serving.request import (
    Answer,
    Ending,
    Piece,
    Prompt,
    ScoredToken,
    TextRequest,
    TokenIds,
    TokenTrace,
    Turn,
    Usage,
    collect,
    usage_of,
)
from meteora_dist.serving.selection import select
from meteora_dist.serving.service import Prepared, TextService
from meteora_dist.serving.status import INTERNAL, failure_of

logger = logging.getLogger(__name__)

_ROLES = ("system", "user", "assistant")
_SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)
_FINISH_REASONS = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
}


class GrpcContext(Protocol):
    """The part of a gRPC context that is used."""

    def set_code(self, code: grpc.StatusCode) -> None:
        """Sets the status."""

    def set_details(self, details: str) -> None:
        """Sets the message."""

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]]:
        """What the caller sent beside the message."""

    def trailing_metadata(self) -> Sequence[tuple[str, str | bytes]]:
        """What goes back after the answer; Serve has put its ``request_id`` there."""


class CallFailed(Exception):
    """Ends a call whose status and message are set."""


class GrpcMethods:
    """One method an RPC; Serve's gRPC proxy finds them by name.

    Attributes:
        service: What answers.
    """

    service: TextService

    async def Generate(self, request: pb.GenerateRequest, grpc_context: GrpcContext) -> pb.GenerateResponse:
        """Answers in one message."""
        with self._call("Generate", request, grpc_context) as caller:
            prepared = await self.service.prepare(text_request(request), caller)
            async with aclosing(self.service.pieces(prepared)) as pieces:
                answers = await collect(pieces, len(prepared.answers))
            usage = usage_of(tuple(answer.ending for answer in answers), prepared.asked.n)
            return pb.GenerateResponse(
                id=prepared.id,
                model=prepared.asked.model,
                choices=[_choice(prepared, answer) for answer in answers],
                usage=_usage(usage),
            )

    async def GenerateStream(
        self, request: pb.GenerateRequest, grpc_context: GrpcContext
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        """Answers piece by piece."""
        with self._call("GenerateStream", request, grpc_context) as caller:
            prepared = await self.service.prepare(text_request(request), caller)
            endings: dict[int, Ending] = {}
            async with aclosing(self.service.pieces(prepared)) as pieces:
                async for piece in pieces:
                    if piece.silent:
                        continue
                    message = pb.GenerateStreamResponse(
                        id=prepared.id, model=prepared.asked.model, choice=_choice(prepared, piece)
                    )
                    if piece.ending is not None:
                        endings[piece.index] = piece.ending
                        if len(endings) == len(prepared.answers):
                            in_order = tuple(endings[index] for index in range(len(endings)))
                            message.usage.CopyFrom(_usage(usage_of(in_order, prepared.asked.n)))
                    yield message

    async def ListExperts(self, request: pb.ListExpertsRequest, grpc_context: GrpcContext) -> pb.ListExpertsResponse:
        """Lists the experts."""
        with self._call("ListExperts", request, grpc_context) as caller:
            manifest = self.service.catalog.manifest
            experts = [
                pb.Expert(name=expert.name, rank=expert.rank, alpha=expert.alpha, rslora=expert.rslora)
                for expert in manifest.experts
                if caller.may_use(expert.name)
            ]
            return pb.ListExpertsResponse(
                base_model=manifest.base_model,
                experts=experts,
                default_top_k=manifest.routing.top_k,
                default_temperature=manifest.routing.temperature,
            )

    @contextmanager
    def _call(self, method: str, request: Message, context: GrpcContext) -> Iterator[Caller]:
        """One call: yields who calls, once gate and size allow it; errors set the status and raise CallFailed."""
        carried = _carried(context)
        with (
            self.service.observer.call("grpc", method, carried),
            _status(context),
            self.service.gate.enter(carried.get("authorization")) as caller,
        ):
            self.service.limits.check_size(request.ByteSize())
            yield caller


def text_request(message: pb.GenerateRequest) -> TextRequest:
    """The protocol-independent request.

    Raises:
        InvalidRequest: It has no prompt, a message's role is unknown, or its routing options contradict each other.
    """
    routing = message.routing
    model = message.model or "auto"
    experts = [(one.name, one.weight if one.HasField("weight") else None) for one in routing.experts]
    return TextRequest(
        prompts=_prompts(message),
        model=model,
        selection=select(
            model,
            _word(pb.Mode, "MODE_", routing.mode),
            experts,
            given(routing, "top_k"),
            given(routing, "temperature"),
            _word(pb.VoteRule, "VOTE_RULE_", routing.vote),
        ),
        n=message.n if message.HasField("n") else 1,
        max_tokens=given(message, "max_tokens"),
        sampling=_sampling(message.sampling),
        seed=given(message.sampling, "seed"),
        stop=tuple(message.stop),
        ignore_eos=message.ignore_eos,
        top_logprobs=given(message, "top_logprobs"),
        grammar=_grammar(message.response_format),
        trace=routing.trace or routing.trace_layers,
        trace_layers=routing.trace_layers,
    )


def given(message: Any, field: str) -> Any:
    """The value of an optional field, or None."""
    return getattr(message, field) if message.HasField(field) else None


def _sampling(message: pb.Sampling) -> Sampling:
    stated = {name: value for name in _SAMPLING if (value := given(message, name)) is not None}
    return Sampling(**{"temperature": 1.0} | stated, logit_bias=tuple(sorted(message.logit_bias.items())))


def _word(kind: Any, prefix: str, value: int) -> str | None:
    """The word for a value of an enum whose names begin with ``prefix``; None for the unspecified one, number 0."""
    if value == 0:
        return None
    known = value in kind.values()
    return kind.Name(value).removeprefix(prefix).lower().replace("_", "-") if known else f"number {value}"


def _grammar(message: pb.ResponseFormat) -> str | None:
    kind = message.WhichOneof("type")
    if kind == "json_schema":
        try:
            schema = json.loads(message.json_schema)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"response_format.json_schema is not valid JSON: {error}", "response_format") from None
        if not isinstance(schema, dict):
            raise InvalidRequest("response_format.json_schema must be a JSON object", "response_format")
        return json_grammar(schema)
    return json_grammar(None) if kind == "json_object" and message.json_object else None


def _prompts(message: pb.GenerateRequest) -> tuple[Prompt, ...]:
    kind = message.WhichOneof("input")
    if kind is None:
        raise InvalidRequest("one of prompt, chat, texts and token_prompts is required", "prompt")
    if kind == "prompt":
        return (message.prompt,)
    if kind == "texts":
        return tuple(message.texts.texts)
    if kind == "token_prompts":
        return tuple(TokenIds(tuple(prompt.ids)) for prompt in message.token_prompts.prompts)
    for turn in message.chat.messages:
        if turn.role not in _ROLES:
            raise InvalidRequest(f"role {turn.role!r} must be one of {', '.join(_ROLES)}", "chat.messages")
    return (tuple(Turn(turn.role, turn.content) for turn in message.chat.messages),)


def _carried(context: GrpcContext) -> dict[str, str]:
    """The metadata that are text, the first of each name; without an ``x-request-id``, Serve's own is that."""
    metadata = [*context.invocation_metadata()]
    metadata += [("x-request-id", value) for key, value in context.trailing_metadata() if key == "request_id"]
    return {key: value for key, value in reversed(metadata) if isinstance(value, str)}


@contextmanager
def _status(context: GrpcContext) -> Iterator[None]:
    """Turns an error into a status and a readable message; Serve sends both only when the method raises as well."""
    try:
        yield
    except Exception as error:
        failure = failure_of(error)
        current_call().failed(failure.status.http, failure.status.code)
        if failure.status is INTERNAL:
            logger.error("a call failed", exc_info=error)
        context.set_code(failure.status.grpc)
        context.set_details(failure.details())
        raise CallFailed(failure.message) from None


def _choice(prepared: Prepared, part: Answer | Piece) -> pb.Choice:
    return pb.Choice(
        index=part.index,
        text=part.text,
        finish_reason=_FINISH_REASONS[part.ending.finish_reason if part.ending else None],
        routing=_trace(prepared, part) if prepared.asked.trace else None,
        logprobs=[
            pb.TokenLogprobs(token=_scored(token.chosen), top=[_scored(other) for other in token.top])
            for token in part.logprobs
        ],
    )


def _trace(prepared: Prepared, part: Answer | Piece) -> pb.RoutingTrace:
    shown = [_token_routing(token) for token in part.tokens]
    return pb.RoutingTrace(experts=part.experts, tokens=shown, dominating=part.dominating or "", votes=part.votes)


def _token_routing(token: TokenTrace) -> pb.TokenRouting:
    layers = token.layers or ()
    return pb.TokenRouting(
        token=token.token,
        id=token.id,
        shares=token.shares,
        layer_experts=[expert for expert, _ in layers],
        layer_shares=[share for _, share in layers],
    )


def _scored(token: ScoredToken) -> pb.ScoredToken:
    return pb.ScoredToken(id=token.id, text=token.text, raw=token.raw, logprob=token.logprob)


def _usage(usage: Usage) -> pb.Usage:
    return pb.Usage(prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens)
