"""JSON objects from files we did not write: bounded, without duplicate keys, NaN or Infinity."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from meteora_dist.errors import CheckpointError

MAX_JSON_BYTES = 16 * 2**20
"""No config or manifest comes near this size; larger files are not read."""


def parse_json_object(text: bytes, path: Path, what: str, error: type[CheckpointError]) -> dict[str, Any]:
    """The JSON object in ``text``, keys in the order they are written.

    Args:
        text: UTF-8 encoded JSON.
        path: The file it came from, for the message.
        what: What ``text`` is, for the message.
        error: Raised when it is no JSON object, repeats a key, or holds NaN or Infinity.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as cause:
        raise error(path, f"{what} is not valid JSON ({cause})") from cause
    if not isinstance(value, dict):
        raise error(path, f"{what} is a JSON {type(value).__name__}; it must be an object")
    return value


def read_json_object(path: Path, error: type[CheckpointError]) -> dict[str, Any]:
    """The JSON object in the file ``path``; ``error`` when it is missing, too large or no JSON object."""
    try:
        if not path.is_file():
            raise error(path, "there is no such file")
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise error(path, f"the file has {size} bytes; at most {MAX_JSON_BYTES} are read")
        text = path.read_bytes()
    except OSError as cause:
        raise error(path, f"cannot be read ({cause.strerror})") from cause
    return parse_json_object(text, path, "the file", error)


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key!r} occurs twice")
        result[key] = value
    return result


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")
