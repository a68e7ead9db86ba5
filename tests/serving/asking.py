"""Callers with keys, who ask over HTTP or gRPC."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import yaml

from meteora_dist.serving.gate import Gate
from meteora_dist.serving.grpc_api import CallFailed, GrpcMethods
from meteora_dist.serving.http_api import create_api
from meteora_dist.serving.keys import Keyring, key_digest
from meteora_dist.serving.proto.meteora.v1 import inference_pb2 as pb
from meteora_dist.serving.service import TextService

P = "/v1/completions"
ENTRIES: list[dict[str, Any]] = [
    {"name": "all"},
    {"name": "wide", "models": ["wide", "base"]},
    {"name": "root", "role": "admin"},
    {"name": "slow", "requests_per_minute": 2},
    {"name": "single", "max_live_requests": 1},
]

Ask = Callable[..., Awaitable[tuple[str, str]]]
"""Asks with a key and fields; the error's code, or the text, and the message."""


@dataclass
class Context:
    """Remembers the status; has an API key, or none."""

    key: str | None = None
    code: grpc.StatusCode | None = None
    details: str = ""
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    trailers: tuple[tuple[str, str | bytes], ...] = (("request_id", "serve-1"),)

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return self.trailers

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def invocation_metadata(self) -> list[tuple[str, str | bytes]]:
        return [*self.metadata, *([] if self.key is None else [("authorization", f"Bearer {self.key}")])]


def gate_of(folder: Path) -> Gate:
    """A gate for the callers of ENTRIES; the key of each is its name."""
    path = folder / "keys.yaml"
    path.write_text(yaml.safe_dump([entry | {"sha256": key_digest(entry["name"])} for entry in ENTRIES]))
    return Gate(Keyring(path))


def http_of(service: TextService) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(create_api(service), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test", timeout=20)


def bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def ask_http(service: TextService) -> Ask:
    async def ask(key: str | None, **fields: Any) -> tuple[str, str]:
        got = (await http_of(service).post(P, headers=bearer(key), json={"prompt": "Hi"} | fields)).json()
        return (got["error"]["code"], got["error"]["message"]) if "error" in got else (got["choices"][0]["text"], "")

    return ask


CODES = {
    grpc.StatusCode.UNAUTHENTICATED: "invalid_api_key",
    grpc.StatusCode.PERMISSION_DENIED: "permission_denied",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "rate_limit_exceeded",
    grpc.StatusCode.NOT_FOUND: "model_not_found",
    grpc.StatusCode.INVALID_ARGUMENT: "invalid_value",
    grpc.StatusCode.DEADLINE_EXCEEDED: "request_timeout",
    grpc.StatusCode.INTERNAL: "internal_error",
}


def grpc_of(service: TextService) -> GrpcMethods:
    methods = GrpcMethods()
    methods.service = service
    return methods


def ask_grpc(service: TextService) -> Ask:
    async def ask(key: str | None, **fields: Any) -> tuple[str, str]:
        context = Context(key)
        try:
            request = pb.GenerateRequest(**{"prompt": "Hi"} | fields)
            return (await grpc_of(service).Generate(request, context)).choices[0].text, ""
        except CallFailed:
            assert context.code is not None
            return CODES[context.code], context.details

    return ask


both = pytest.mark.parametrize("over", [ask_http, ask_grpc], ids=["http", "grpc"])
