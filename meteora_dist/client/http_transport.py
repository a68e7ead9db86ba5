"""The OpenAI-compatible HTTP interface as a transport."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx

from meteora_dist.client.answers import Answer, Piece, Reply, RoutingTrace, TokenLogprob, TokenRouting, Usage
from meteora_dist.client.failures import CallFailed, Failed, of_error_object, of_http
from meteora_dist.client.question import Question, Routing

Json = dict[str, Any]

_CONNECT_S = 10.0
_DATA = "data: "
_DONE = "[DONE]"
_NO_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=None)


class HttpTransport:
    """Calls one service over HTTP."""

    def __init__(self, url: str, api_key: str | None, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._http = httpx.AsyncClient(
            base_url=url,
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            # Whole calls are timed by the client; a queue of our own would only hide that the service is busy.
            timeout=httpx.Timeout(None, connect=_CONNECT_S),
            limits=_NO_LIMITS,
            transport=transport,
        )

    async def models(self) -> tuple[str, ...]:
        """As ``Transport`` says."""
        with _failures():
            response = await self._http.get("/v1/models")
            return tuple(model["id"] for model in _checked(response).json()["data"])

    async def generate(self, question: Question) -> Reply:
        """As ``Transport`` says."""
        path, body = request_of(question)
        with _failures():
            got = _checked(await self._http.post(path, json=body)).json()
            answers = tuple(
                Answer(_text(choice, "message"), choice["index"], choice["finish_reason"], *_details(choice))
                for choice in got["choices"]
            )
            return Reply(got["id"], got["model"], answers, _usage(got["usage"]))

    async def stream(self, question: Question) -> AsyncGenerator[Piece, None]:
        """As ``Transport`` says."""
        path, body = request_of(question)
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        ending: Piece | None = None
        with _failures():
            async with self._http.stream("POST", path, json=body) as response:
                if response.status_code != httpx.codes.OK:
                    await response.aread()
                _checked(response)
                async for chunk in _chunks(response):
                    # Usage comes by itself, after all endings: the last of them waits for it.
                    if ending is not None:
                        usage = chunk.get("usage")
                        yield replace(ending, usage=_usage(usage)) if usage else ending
                        ending = None
                    for choice in chunk["choices"]:
                        piece = Piece(
                            _text(choice, "delta"), choice["index"], choice["finish_reason"], *_details(choice)
                        )
                        if piece.finish_reason is None:
                            yield piece
                        else:
                            ending = piece
        if ending is not None:
            yield ending

    async def close(self) -> None:
        """As ``Transport`` says."""
        await self._http.aclose()


def request_of(question: Question) -> tuple[str, Json]:
    """Path and body of the request."""
    options = dict(question.options)
    routing, schema, top = options.pop("routing", None), options.pop("json", None), options.pop("top_logprobs", None)
    body: Json = {**options}
    if isinstance(routing, Routing):
        body["routing"] = _routing(routing)
    if schema is not None:
        named = {"name": "answer", "schema": schema}
        body["response_format"] = (
            {"type": "json_object"} if schema is True else {"type": "json_schema", "json_schema": named}
        )
    prompt = question.prompt
    if not isinstance(prompt, str) and prompt and isinstance(prompt[0], Mapping):
        scored = {} if top is None else {"logprobs": True, "top_logprobs": top}
        return "/v1/chat/completions", body | {"messages": prompt} | scored
    return "/v1/completions", body | {"prompt": prompt} | ({} if top is None else {"logprobs": top})


def _routing(routing: Routing) -> Json:
    given = {name: getattr(routing, name) for name in ("mode", "top_k", "temperature", "vote")}
    experts = [{"name": name, "weight": weight} for name, weight in routing.experts.items()]
    return {name: value for name, value in given.items() if value is not None} | (
        {"trace": routing.trace} | ({"experts": experts} if experts else {})
    )


@contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise Failed(CallFailed(f"{error.request.url} cannot be reached: {error}"), again=True) from error
    except httpx.HTTPError as error:
        raise Failed(CallFailed(f"the connection failed: {error or type(error).__name__}")) from error
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise Failed(CallFailed(f"the answer has another shape than it must have: {error!r}")) from error


def _checked(response: httpx.Response) -> httpx.Response:
    if response.status_code != httpx.codes.OK:
        raise of_http(response)
    return response


async def _chunks(response: httpx.Response) -> AsyncGenerator[Json, None]:
    async for line in response.aiter_lines():
        data = line.removeprefix(_DATA)
        if data == _DONE:
            return
        if not line.startswith(_DATA):
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            raise of_error_object(chunk["error"], "in the middle of the stream")
        yield chunk
    raise Failed(CallFailed("the stream was cut off before its end"))


def _text(choice: Json, chat: str) -> str:
    text: str = choice["text"] if "text" in choice else choice[chat]["content"]
    return text


def _details(choice: Json) -> tuple[tuple[TokenLogprob, ...], RoutingTrace | None]:
    return _logprobs(choice["logprobs"]), _trace(choice.get("routing"))


def _logprobs(found: Json | None) -> tuple[TokenLogprob, ...]:
    if found is None:
        return ()
    if "content" in found:
        return tuple(
            TokenLogprob(
                one["token"], one["logprob"], tuple((top["token"], top["logprob"]) for top in one["top_logprobs"])
            )
            for one in found["content"]
        )
    columns = (found["tokens"], found["token_logprobs"], found["top_logprobs"])
    return tuple(TokenLogprob(text, value, tuple(top.items())) for text, value, top in zip(*columns, strict=True))


def _trace(found: Json | None) -> RoutingTrace | None:
    if found is None:
        return None
    tokens = tuple(_token(one) for one in found["tokens"])
    return RoutingTrace(tuple(found["experts"]), tokens, found["dominating"], tuple(found.get("votes", ())))


def _token(found: Json) -> TokenRouting:
    layers = (tuple(found.get(name, ())) for name in ("layer_experts", "layer_shares"))
    return TokenRouting(found["token"], found["id"], tuple(found["shares"]), *layers)


def _usage(found: Json) -> Usage:
    return Usage(found["prompt_tokens"], found["completion_tokens"])
