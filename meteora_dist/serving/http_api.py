"""The OpenAI-compatible HTTP interface."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from http import HTTPStatus
from time import time

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.telemetry import TelemetryConfig
from starlette.exceptions import HTTPException

from meteora_dist import __version__
from meteora_dist.errors import InvalidRequest, MeteoraError
from meteora_dist.observability.calls import CANCELLED, current_call
from meteora_dist.serving.admin import AdminService
from meteora_dist.serving.admin_http import ADMIN_READS, ADMIN_WRITES, admin_routes
from meteora_dist.serving.http_guard import PROBES, CallerGone, Guard, caller_of, failure_response, while_wanted
from meteora_dist.serving.observed import Observed
from meteora_dist.serving.openai_objects import (
    ChatChunk,
    ChatCompletion,
    Completion,
    CompletionChunk,
    Health,
    Model,
    ModelList,
)
from meteora_dist.serving.openai_reply import DONE, Json, Reply, event
from meteora_dist.serving.openai_schema import ChatBody, CompletionBody, parse
from meteora_dist.serving.openapi import GENERATION, GUARDED, answers, body, describe
from meteora_dist.serving.playground.page import page_routes, read_assets
from meteora_dist.serving.request import Ending, Piece, collect, usage_of
from meteora_dist.serving.service import TextService
from meteora_dist.serving.status import METHOD_NOT_ALLOWED, NO_SUCH_ROUTE, Failure, failure_of

logger = logging.getLogger(__name__)

# FastAPI's own spans and logs would have what callers write into a query, and the text of exceptions.
_NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False}
_WRITTEN = (Completion, CompletionChunk, ChatCompletion, ChatChunk, ModelList, Model, Health)
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def create_api(service: TextService, admin: AdminService | None = None, playground: bool = False) -> FastAPI:
    """The application: answers are JSON, streams of server-sent events or the playground, errors OpenAI error objects.

    Everything but the probes and the playground's files lies behind the service's gate.

    Args:
        service: What answers.
        admin: Administers its experts, below ``/admin``; None where nobody may.
        playground: Whether ``/`` is the page to try the service with.
    """
    api = FastAPI(title="meteora", version=__version__, docs_url=None, redoc_url=None, telemetry=_NO_TELEMETRY)
    page = read_assets() if playground else {}
    api.add_middleware(Guard, gate=service.gate, limits=service.limits, public=PROBES | page.keys())
    # Around the guard: it sees what that refuses.
    api.add_middleware(Observed, observer=service.observer)
    started = int(time())

    @api.post(
        "/v1/completions",
        openapi_extra=body(CompletionBody),
        responses=answers(Completion, *GENERATION, chunk=CompletionChunk),
        operation_id="createCompletion",
    )
    async def completions(request: Request) -> Response:
        """Continues texts or token ids, whole or as a stream of server-sent events."""
        return await _answer(service, request, parse(CompletionBody, await request.body()))

    @api.post(
        "/v1/chat/completions",
        openapi_extra=body(ChatBody),
        responses=answers(ChatCompletion, *GENERATION, chunk=ChatChunk),
        operation_id="createChatCompletion",
    )
    async def chat_completions(request: Request) -> Response:
        """Answers a conversation, whole or as a stream of server-sent events."""
        return await _answer(service, request, parse(ChatBody, await request.body()))

    @api.get("/v1/models", responses=answers(ModelList, *GUARDED), operation_id="listModels", response_model=None)
    async def models(request: Request) -> Json:
        """Lists what the caller may name as ``model``: modes and experts."""
        names = service.catalog.models_of(caller_of(request))
        return {"object": "list", "data": [_model(name, started) for name in names]}

    @api.get(
        "/v1/models/{name}",
        responses=answers(Model, *GUARDED, 403, 404),
        operation_id="retrieveModel",
        response_model=None,
    )
    async def model(name: str, request: Request) -> Json:
        """Describes one of them."""
        service.catalog.check([name], caller_of(request))
        return _model(name, started)

    @api.get("/healthz", responses=answers(Health, 503), operation_id="healthz", response_model=None)
    @api.get("/readyz", responses=answers(Health, 503), operation_id="readyz", response_model=None)
    async def ready() -> Json:
        """Whether the ranks answer; both paths say the same, and need no key."""
        service.check()
        return {"status": "ok"}

    @api.get("/livez", responses=answers(Health), operation_id="livez", response_model=None)
    async def alive() -> Json:
        """Whether the replica answers; needs no key."""
        return {"status": "ok"}

    if admin is not None:
        api.include_router(admin_routes(admin))
    api.include_router(page_routes(page))
    api.add_exception_handler(MeteoraError, _on_error)
    api.add_exception_handler(Exception, _on_error)
    api.add_exception_handler(HTTPException, _on_http_error)
    api.add_exception_handler(RequestValidationError, _on_bad_parameter)
    reads, writes = (ADMIN_READS, ADMIN_WRITES) if admin is not None else ((), ())
    describe(api, read=[CompletionBody, ChatBody, *reads], written=[*_WRITTEN, *writes])
    return api


async def _answer(service: TextService, request: Request, asked: CompletionBody | ChatBody) -> Response:
    prepared = await service.prepare(asked.to_request(), caller_of(request))
    reply = Reply(prepared, isinstance(asked, ChatBody), asked.include_usage)
    pieces = service.pieces(prepared)
    try:
        async with while_wanted(request):
            if not asked.stream:
                async with aclosing(pieces):
                    return JSONResponse(reply.whole(await collect(pieces, len(prepared.answers))))
            # Waiting for the first piece gives errors of the start their own status.
            first = await anext(pieces)
    except CallerGone:
        current_call().failed(CANCELLED, "cancelled")
        return Response(status_code=CANCELLED)
    events = _events(reply, first, pieces)
    return StreamingResponse(events, media_type="text/event-stream", headers=_STREAM_HEADERS)


async def _events(reply: Reply, first: Piece, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[str, None]:
    prepared = reply.prepared
    endings: dict[int, Ending] = {}
    begun: set[int] = set()
    async with aclosing(pieces):
        try:
            async for piece in _with(first, pieces):
                if piece.index not in begun or not piece.silent:
                    yield event(reply.chunk(piece, first=piece.index not in begun))
                begun.add(piece.index)
                if piece.ending is not None:
                    endings[piece.index] = piece.ending
            if reply.include_usage:
                in_order = tuple(endings[index] for index in range(len(prepared.answers)))
                yield event(reply.usage_chunk(usage_of(in_order, prepared.asked.n)))
            yield DONE
        except Exception as error:
            # The status is out already: the error becomes the last event.
            yield event(_failure(error).body())


async def _with(first: Piece, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[Piece, None]:
    yield first
    async for piece in pieces:
        yield piece


def _model(name: str, created: int) -> Json:
    return {"id": name, "object": "model", "created": created, "owned_by": "meteora"}


def _failure(error: Exception) -> Failure:
    failure = failure_of(error)
    current_call().failed(failure.status.http, failure.status.code)
    if failure.status.http == HTTPStatus.INTERNAL_SERVER_ERROR:
        logger.error("a request failed", exc_info=error)
    return failure


async def _on_error(_: Request, error: Exception) -> Response:
    return failure_response(_failure(error))


async def _on_bad_parameter(request: Request, error: Exception) -> Response:
    """A parameter of the URL that cannot be read; bodies are read by ``parse``."""
    assert isinstance(error, RequestValidationError), "registered for it"
    first = error.errors()[0]
    name = str(first["loc"][-1])
    return await _on_error(request, InvalidRequest(f"{name}: {first['msg'][:1].lower()}{first['msg'][1:]}", name))


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "registered for it"
    url, method = request.url.path, request.method
    if error.status_code == HTTPStatus.NOT_FOUND:
        failure = Failure(NO_SUCH_ROUTE, f"there is no {url} here")
    elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        failure = Failure(METHOD_NOT_ALLOWED, f"{url} does not take {method}")
    else:
        return await _on_error(request, error)
    current_call().failed(failure.status.http, failure.status.code)
    return JSONResponse(failure.body(), failure.status.http, dict(error.headers or {}))
