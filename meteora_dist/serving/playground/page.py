"""The playground's files and the routes that serve them: read once, sent as they are, without a key.

They hold nothing but themselves: what the page shows it asks the API for, with the key its reader types in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import PurePosixPath

from fastapi import APIRouter, Request
from fastapi.responses import Response

_INDEX = "index.html"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
}
_CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
_HEADERS = {
    "Content-Security-Policy": _CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Kept by browsers, but asked for again: after an upgrade no old file may meet a new one.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class Asset:
    """One file.

    Attributes:
        body: Its bytes.
        media_type: What they are.
        etag: Changes when they do.
    """

    body: bytes
    media_type: str
    etag: str


def read_assets() -> dict[str, Asset]:
    """All files by the path they are served at, the page itself at ``/``."""
    folder = files(__package__) / "static"
    return {
        "/" if file.name == _INDEX else f"/playground/{file.name}": _asset(file.name, file.read_bytes())
        for file in folder.iterdir()
    }


def page_routes(assets: Mapping[str, Asset]) -> APIRouter:
    """Serves each of ``assets`` at its path."""
    router = APIRouter()
    for path, asset in assets.items():
        router.add_api_route(path, _serving(asset), methods=["GET", "HEAD"], include_in_schema=False)
    return router


def _serving(asset: Asset) -> Callable[[Request], Awaitable[Response]]:
    async def serve(request: Request) -> Response:
        headers = {**_HEADERS, "ETag": asset.etag}
        if asset.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(asset.body, media_type=asset.media_type, headers=headers)

    return serve


def _asset(name: str, body: bytes) -> Asset:
    return Asset(body, _TYPES[PurePosixPath(name).suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"')
