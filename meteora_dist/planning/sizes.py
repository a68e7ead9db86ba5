"""Bytes as people write them."""

from __future__ import annotations

import re

from meteora_dist.errors import PlanError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_bytes(text: str) -> int:
    """Bytes in ``80GiB``, ``512 MB`` or ``1000000``.

    Raises:
        PlanError: It is no size.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise PlanError(f"{text!r} is no size in bytes; write one like 80GiB, 512MB or 1000000")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def show_bytes(count: float) -> str:
    """``count`` bytes with four figures at most, such as ``14.96 GiB``."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:.4g} B"
