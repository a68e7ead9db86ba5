"""The grammar of answers that must be JSON, in llguidance's notation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from llguidance import LLMatcher

from meteora_dist.errors import InvalidRequest

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_SCHEMA = 65_536
"""Most characters of a JSON schema."""
_OPTIONS: JsonCompileOptions = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,8}"}
"""A model that is unsure likes to go on with white space; eight in a row are enough."""


def json_grammar(schema: Mapping[str, object] | None, param: str = "response_format") -> str:
    """The grammar of any JSON object, or of what fits a JSON schema.

    Raises:
        InvalidRequest: The schema is none, is too large, or uses what llguidance cannot follow; it says what.
    """
    text = json.dumps({"type": "object"} if schema is None else schema)
    if len(text) > MAX_SCHEMA:
        raise InvalidRequest(f"{param}: the schema has {len(text)} characters; at most {MAX_SCHEMA} are taken", param)
    grammar = LLMatcher.grammar_from_json_schema(text, overrides=_OPTIONS)
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if failed:
        raise InvalidRequest(f"{param}: the JSON schema cannot be used: {messages[0]}", param)
    return grammar
