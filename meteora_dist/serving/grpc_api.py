"""The gRPC interface: the methods of ``meteora.v1.Inference`` over the same text service as HTTP."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Protocol

import grpc

from meteora_dist.errors import InvalidRequest
from meteora_dist.serving.proto.meteora.v1 import inference_pb2 as pb
from meteora_dist.serving.request import Ending, Piece, TextRequest, TokenTrace, Turn, collect
from meteora_dist.serving.service import TextService
from meteora_dist.serving.status import INTERNAL, failure_of

logger = logging.getLogger(__name__)

_ROLES = ("system", "user", "assistant")
_MAX_DETAILS = 1000
"""Characters of a message: it travels in the trailers, which clients limit to a few kilobytes."""


class GrpcContext(Protocol):
    """The part of a gRPC context that is used."""

    def set_code(self, code: grpc.StatusCode) -> None:
        """Sets the status."""

    def set_details(self, details: str) -> None:
        """Sets the message."""


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
        with _status(grpc_context):
            prepared = await self.service.prepare(text_request(request))
            async with aclosing(self.service.pieces(prepared)) as pieces:
                answer = await collect(pieces)
            return pb.GenerateResponse(
                id=prepared.id,
                model=prepared.asked.model,
                text=answer.text,
                finish_reason=_finish_reason(answer.ending),
                usage=_usage(answer.ending),
                routing=self._trace(prepared.asked, answer.tokens, answer.dominating),
            )

    async def GenerateStream(
        self, request: pb.GenerateRequest, grpc_context: GrpcContext
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        """Answers piece by piece."""
        with _status(grpc_context):
            prepared = await self.service.prepare(text_request(request))
            async with aclosing(self.service.pieces(prepared)) as pieces:
                async for piece in pieces:
                    if piece.text or piece.tokens or piece.ending:
                        yield self._message(prepared.id, prepared.asked, piece)

    async def ListExperts(self, request: pb.ListExpertsRequest, grpc_context: GrpcContext) -> pb.ListExpertsResponse:
        """Lists the experts."""
        with _status(grpc_context):
            manifest = self.service.catalog.manifest
            experts = [
                pb.Expert(name=expert.name, rank=expert.rank, alpha=expert.alpha, rslora=expert.rslora)
                for expert in manifest.experts
            ]
            return pb.ListExpertsResponse(
                base_model=manifest.base_model,
                experts=experts,
                default_top_k=manifest.routing.top_k,
                default_temperature=manifest.routing.temperature,
            )

    def _message(self, request_id: str, asked: TextRequest, piece: Piece) -> pb.GenerateStreamResponse:
        return pb.GenerateStreamResponse(
            id=request_id,
            model=asked.model,
            text=piece.text,
            finish_reason=_finish_reason(piece.ending),
            usage=_usage(piece.ending),
            routing=self._trace(asked, piece.tokens, piece.dominating),
        )

    def _trace(
        self, asked: TextRequest, tokens: Sequence[TokenTrace], dominating: str | None
    ) -> pb.RoutingTrace | None:
        if not asked.trace:
            return None
        shown = [pb.TokenRouting(token=token.token, id=token.id, shares=token.shares) for token in tokens]
        return pb.RoutingTrace(experts=self.service.catalog.experts, tokens=shown, dominating=dominating or "")


def text_request(message: pb.GenerateRequest) -> TextRequest:
    """The protocol-independent request.

    Raises:
        InvalidRequest: It has neither prompt nor chat, or a message's role is unknown.
    """
    sampling, routing = message.sampling, message.routing
    return TextRequest(
        prompt=_prompt(message),
        model=message.model or "auto",
        max_tokens=message.max_tokens if message.HasField("max_tokens") else None,
        temperature=sampling.temperature if sampling.HasField("temperature") else 1.0,
        top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
        seed=sampling.seed if sampling.HasField("seed") else None,
        stop=tuple(message.stop),
        top_k=routing.top_k if routing.HasField("top_k") else None,
        gate_temperature=routing.temperature if routing.HasField("temperature") else None,
        trace=routing.trace,
    )


def _prompt(message: pb.GenerateRequest) -> str | tuple[Turn, ...]:
    kind = message.WhichOneof("input")
    if kind is None:
        raise InvalidRequest("one of prompt and chat is required", "prompt")
    if kind == "prompt":
        prompt: str = message.prompt
        return prompt
    for turn in message.chat.messages:
        if turn.role not in _ROLES:
            raise InvalidRequest(f"role {turn.role!r} must be one of {', '.join(_ROLES)}", "chat.messages")
    return tuple(Turn(turn.role, turn.content) for turn in message.chat.messages)


@contextmanager
def _status(context: GrpcContext) -> Iterator[None]:
    """Turns an error into a status and a readable message; Serve sends both only when the method raises as well."""
    try:
        yield
    except Exception as error:
        failure = failure_of(error)
        if failure.status is INTERNAL:
            logger.error("a call failed", exc_info=error)
        context.set_code(failure.status.grpc)
        context.set_details(failure.details()[:_MAX_DETAILS])
        raise CallFailed(failure.message) from None


def _finish_reason(ending: Ending | None) -> pb.FinishReason:
    reasons = {
        None: pb.FINISH_REASON_UNSPECIFIED,
        "stop": pb.FINISH_REASON_STOP,
        "length": pb.FINISH_REASON_LENGTH,
    }
    return reasons[ending.finish_reason if ending else None]


def _usage(ending: Ending | None) -> pb.Usage | None:
    if ending is None:
        return None
    return pb.Usage(prompt_tokens=ending.prompt_tokens, completion_tokens=ending.completion_tokens)
