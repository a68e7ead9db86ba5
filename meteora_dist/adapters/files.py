"""Files we did not write: small ones read with a bound, JSON without duplicate keys or NaN, and digests."""

from __future__ import annotations

import hashlib
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
    return parse_json_object(read_bytes(path, error), path, "the file", error)


def read_bytes(path: Path, error: type[CheckpointError]) -> bytes:
    """The content of a small file; ``error`` when it is missing, unreadable or larger than 16 MiB."""
    try:
        if not path.is_file():
            raise error(path, "there is no such file")
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise error(path, f"the file has {size} bytes; at most {MAX_JSON_BYTES} are read")
        return path.read_bytes()
    except OSError as cause:
        raise error(path, f"cannot be read ({cause.strerror})") from cause


def sha256_file(path: Path, error: type[CheckpointError]) -> str:
    """sha256, in hex, of the file's bytes; ``error`` when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as cause:
        raise error(path, f"cannot be read ({cause.strerror})") from cause


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key!r} occurs twice")
        result[key] = value
    return result


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")
