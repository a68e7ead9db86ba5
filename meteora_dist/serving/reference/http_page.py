"""The HTTP part of docs/api.md: a section for each route and a table for each object of the OpenAPI document."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, cast

from meteora_dist.serving.admin import AdminService
from meteora_dist.serving.http_api import create_api
from meteora_dist.serving.service import TextService

Schema = Mapping[str, Any]

_NONE_FOR = re.compile(r"[;.] None for ([^.]+)(?=\.)")
"""How a meaning says what the absence of its field stands for."""

_RANGES = (
    ("minimum", "at least {}"),
    ("exclusiveMinimum", "above {}"),
    ("maximum", "at most {}"),
    ("minLength", "at least {} characters"),
    ("maxLength", "at most {} characters"),
    ("minItems", "at least {} of them"),
    ("maxItems", "at most {} of them"),
    ("maxProperties", "at most {} of them"),
)


def openapi_document() -> dict[str, Any]:
    """What ``/openapi.json`` of a service with administrators says."""
    # Routes are described without a service behind them: nothing is asked here.
    nothing = SimpleNamespace(gate=None, limits=None, observer=None)
    return create_api(cast(TextService, nothing), cast(AdminService, nothing)).openapi()


def http_section(document: Schema) -> Iterator[str]:
    """The lines of the HTTP part."""
    schemas = document["components"]["schemas"]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            yield from _operation(f"{method.upper()} {path}", operation)
    yield from ("### HTTP objects", "")
    for name in schemas:
        yield from _object(name, schemas[name])


def _operation(title: str, operation: Schema) -> Iterator[str]:
    yield from (f"### {title}", "", markdown(operation["description"]), "")
    content = operation.get("requestBody", {}).get("content", {})
    for media in content.values():
        yield f"- **body**: {kind(media['schema'])}"
    for parameter in operation.get("parameters", ()):
        meaning = f": {parameter['description']}" if "description" in parameter else ""
        yield f"- **{parameter['in']}** `{parameter['name']}`, {kind(parameter['schema'])}{meaning}"
    failures = []
    for status, response in sorted(operation["responses"].items(), key=lambda item: int(item[0])):
        if int(status) >= 400:
            failures.append(str(status))
            continue
        for media in response.get("content", {}).values():
            if "schema" in media:
                yield f"- **{status}**: {kind(media['schema'])}"
            else:
                yield f"- **{status}** as a stream, each event's `data`: {_event(media['itemSchema'])}"
    if failures:
        yield f"- **errors**: {', '.join(failures)}"
    yield ""


def _event(schema: Schema) -> str:
    done, text = schema["properties"]["data"]["anyOf"]
    return f"{' or '.join(kind(one) for one in text['contentSchema']['anyOf'])}; the last is `{done['const']}`"


def _object(name: str, schema: Schema) -> Iterator[str]:
    yield from (f"#### {name}", "", markdown(schema.get("description", "")), "")
    yield from ("| field | type | range | default | meaning |", "|---|---|---|---|---|")
    required = schema.get("required", ())
    for field, described in schema["properties"].items():
        if "description" not in described:
            raise RuntimeError(f"{name}.{field} has no meaning in its model's docstring")
        text = markdown(described["description"])
        default = "required" if field in required else _default(described, text)
        cells = (f"`{field}`", kind(described), _range(described), default, _NONE_FOR.sub("", text))
        yield f"| {' | '.join(cells)} |"
    yield ""


def _default(schema: Schema, text: str) -> str:
    value = schema.get("default")
    if value is None and (match := _NONE_FOR.search(text)):
        return match[1]
    return "none" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def kind(schema: Schema) -> str:
    """A schema's type in words; objects are links to their tables."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        kinds = [kind(one) for one in schema["anyOf"] if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"] if value is not None)
    if schema.get("type") == "array":
        return f"list of {kind(schema['items'])}"
    if schema.get("type") == "object":
        inner = schema.get("additionalProperties")
        return f"object of {kind(inner)}" if isinstance(inner, dict) else "object"
    return str(schema.get("type", "any"))


def _range(schema: Schema) -> str:
    inner = [one for one in schema.get("anyOf", ()) if one.get("type") != "null"]
    if "enum" in schema and inner:
        return ", ".join(f"`{value}`" for value in schema["enum"] if value is not None)
    said = [words.format(_number(schema[key])) for key, words in _RANGES if key in schema]
    said += [words.format(_number(one[key])) for one in inner for key, words in _RANGES if key in one]
    return ", ".join(dict.fromkeys(said))


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def markdown(text: str) -> str:
    """A docstring's text in Markdown, fit for the cell of a table."""
    return " ".join(text.split()).replace("``", "`").replace("|", "\\|")
