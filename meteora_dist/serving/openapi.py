"""The OpenAPI document: what FastAPI knows of the routes, and the bodies that it does not see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from meteora_dist.serving.documented import DocumentedSchema, own_text
from meteora_dist.serving.openai_objects import Error

_REF = "#/components/schemas/{model}"
_JSON = "application/json"
_RETRY_AFTER = {"Retry-After": {"description": "Seconds after which to try again.", "schema": {"type": "integer"}}}
_FAILURES = {
    400: "A field is missing, unknown or out of its range.",
    401: "The API key is missing or unknown.",
    403: "The API key may not use this model.",
    404: "There is no such model.",
    408: "The request was not done in time.",
    409: "The bank has changed since.",
    413: "The body is too large.",
    429: "The key's limits are reached, or too many calls wait already.",
    503: "The engine is starting or restarting.",
}
_TRANSIENT = (429, 503)
GUARDED = (401, 413, 429)
"""What every route behind the gate may answer."""
ADMIN = (*GUARDED, 400, 403, 404, 409, 503)
"""What a route of administrators may answer."""
GENERATION = (*GUARDED, 400, 403, 404, 408, 503)
"""What a route that generates may answer."""

Object = type[BaseModel]
Responses = dict[int | str, dict[str, Any]]


def body(model: type[BaseModel]) -> dict[str, Any]:
    """``openapi_extra`` of a route that reads its body itself."""
    return {"requestBody": {"required": True, "content": {_JSON: {"schema": _ref(model)}}}}


def answers(model: Object, *failures: int, chunk: Object | None = None, status: int = 200) -> Responses:
    """``responses`` of a route.

    Args:
        model: What it answers.
        failures: HTTP statuses of the errors it may answer instead.
        chunk: What the events have when it answers with a stream instead; None when it never does.
        status: HTTP status of success.
    """
    content: dict[str, Any] = {_JSON: {"schema": _ref(model)}}
    if chunk is not None:
        content["text/event-stream"] = {"itemSchema": _event(chunk)}
    responses: Responses = {status: {"description": own_text(model), "content": content}}
    return responses | {status: _failure(status) for status in failures}


def describe(api: FastAPI, read: Sequence[Object], written: Sequence[Object]) -> None:
    """Gives the application its document.

    Args:
        api: The application, its routes made with ``body`` and ``answers``.
        read: The bodies its routes take.
        written: What they answer, errors aside.
    """
    document = get_openapi(title=api.title, version=api.version, routes=api.routes)
    models: list[tuple[Object, JsonSchemaMode]] = [(model, "validation") for model in read]
    models += [(model, "serialization") for model in written] + [(Error, "serialization")]
    schemas = models_json_schema(models, ref_template=_REF, schema_generator=DocumentedSchema)[1]["$defs"]
    bearer = {"type": "http", "scheme": "bearer", "description": "An API key, unless the service has been opened."}
    document["components"] = {"schemas": schemas, "securitySchemes": {"key": bearer}}
    document["security"] = [{"key": []}, {}]
    for operation in (operation for path in document["paths"].values() for operation in path.values()):
        # FastAPI's own answer to a bad parameter: ours are texts, and no text is bad.
        operation["responses"].pop("422", None)
    api.openapi = lambda: document  # type: ignore[method-assign]


def _event(chunk: type[BaseModel]) -> dict[str, Any]:
    """A server-sent event: a chunk; the last one says [DONE], or what went wrong."""
    text = {"contentMediaType": _JSON, "contentSchema": {"anyOf": [_ref(chunk), _ref(Error)]}}
    data = {"type": "string", "anyOf": [{"const": "[DONE]"}, text]}
    return {"type": "object", "properties": {"data": data}, "required": ["data"]}


def _failure(status: int) -> dict[str, Any]:
    failure: dict[str, Any] = {"description": _FAILURES[status], "content": {_JSON: {"schema": _ref(Error)}}}
    return failure | ({"headers": _RETRY_AFTER} if status in _TRANSIENT else {})


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}
