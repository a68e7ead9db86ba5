"""docs/api.md as a whole."""

from __future__ import annotations

from collections.abc import Iterator

from meteora_dist.serving.reference.grpc_page import grpc_section, read_protos
from meteora_dist.serving.reference.http_page import http_section, markdown, openapi_document
from meteora_dist.serving.status import INTERNAL, METHOD_NOT_ALLOWED, NO_SUCH_ROUTE, STATUS_OF, Status

_HEAD = """\
# API reference

Made from the service's own schemas by `make reference`: change those, not this page. [README](../README.md#requests)
has the short table, [concepts](concepts.md) the words, [security](security.md) keys and limits, and
[client](client.md) the Python client. A running service has the OpenAPI document at `/openapi.json`.

- Every call but the probes carries `Authorization: Bearer KEY` (gRPC: metadata `authorization`), unless the service is
  open. `X-Request-ID` and `traceparent` are taken from the caller, and the former is answered
  ([observability](observability.md)).
- A field that is unknown, missing, of another type or outside its range is refused, never ignored: 400
  `invalid_value` with the field's path in `param`, INVALID_ARGUMENT over gRPC. What else a field may be refused for
  stands beside its meaning.
- A field that is null counts as absent. `none` as a default: nothing happens without it.
"""


def api_page() -> str:
    """The page, with a line break at its end."""
    lines = [*_HEAD.splitlines(), "", "## Errors", "", *_errors(), "", "## HTTP", ""]
    lines += http_section(openapi_document())
    lines += ["## gRPC", "", *grpc_section(read_protos())]
    return "\n".join(lines).rstrip() + "\n"


def _errors() -> Iterator[str]:
    yield "Every failure over HTTP is an [Error](#error); its `code` says which, `param` names the field."
    yield from ("", "| HTTP | `error.code` | `error.type` | gRPC | retry after | when |", "|---|---|---|---|---|---|")
    for error, status in STATUS_OF.items():
        if status is not INTERNAL:
            yield _row(status, markdown((error.__doc__ or "").partition("\n\n")[0]))
    yield _row(NO_SUCH_ROUTE, "There is no such URL.")
    yield _row(METHOD_NOT_ALLOWED, "The URL does not take this method.")
    yield _row(INTERNAL, "Our fault; the service's log says why.")


def _row(status: Status, when: str) -> str:
    after = "never" if status.retry_after_s is None else f"{status.retry_after_s} s or what it says"
    return f"| {status.http} | `{status.code}` | `{status.type}` | {status.grpc.name} | {after} | {when} |"
