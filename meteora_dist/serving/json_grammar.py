"""The grammar of answers that must be JSON, in llguidance's notation."""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Mapping
from hashlib import sha256
from typing import TYPE_CHECKING

from llguidance import LLMatcher

from meteora_dist.engine.grammar_trial import refusal
from meteora_dist.errors import InvalidRequest

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_SCHEMA = 65_536
"""Most characters of a JSON schema."""
_PARAM = "response_format"
_TRIALS_AT_ONCE = 2
_REMEMBERED = 1024
_OPTIONS: JsonCompileOptions = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,8}"}
"""A model that is unsure likes to go on with white space; eight in a row are enough."""


def json_grammar(schema: Mapping[str, object] | None) -> str:
    """The grammar of any JSON object, or of what fits a JSON schema; whether it can be used, ``GrammarCheck`` says.

    Raises:
        InvalidRequest: The schema is too large, too deep or no JSON.
    """
    try:
        text = json.dumps({"type": "object"} if schema is None else schema, allow_nan=False)
    except (RecursionError, ValueError):
        raise InvalidRequest(f"{_PARAM}: the JSON schema is nested too deeply, or is no JSON", _PARAM) from None
    if len(text) > MAX_SCHEMA:
        raise InvalidRequest(f"{_PARAM}: the schema has {len(text)} characters; at most {MAX_SCHEMA} are taken", _PARAM)
    try:
        return LLMatcher.grammar_from_json_schema(text, overrides=_OPTIONS)
    except ValueError as error:
        raise InvalidRequest(f"{_PARAM}: the JSON schema cannot be read: {error}", _PARAM) from None


class GrammarCheck:
    """Tries every grammar once, before the engine compiles it where a crash would take all requests along."""

    def __init__(self) -> None:
        """Starts with nothing tried."""
        self._refusals: OrderedDict[bytes, str | None] = OrderedDict()
        self._free = asyncio.Semaphore(_TRIALS_AT_ONCE)

    async def check(self, grammar: str) -> None:
        """Raises InvalidRequest when a grammar is none, uses what llguidance cannot follow, or takes too much of it."""
        key = sha256(grammar.encode()).digest()
        if key not in self._refusals:
            async with self._free:
                self._refusals[key] = await asyncio.to_thread(refusal, grammar)
            if len(self._refusals) > _REMEMBERED:
                self._refusals.popitem(last=False)
        if wrong := self._refusals[key]:
            raise InvalidRequest(f"{_PARAM}: the JSON schema cannot be used: {wrong}", _PARAM)
