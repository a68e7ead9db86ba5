"""Memory that goes back to the system when it is freed."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_MMAP_THRESHOLD = -3
"""glibc's M_MMAP_THRESHOLD."""
_APART = 128 * 1024
_TOGETHER = 32 * 1024 * 1024
"""The highest glibc itself sets when large blocks come and go, as those of every pass do."""


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Blocks made inside, from 128 KiB on, are mapped one by one; does nothing where the C library is not glibc.

    Those that are freed leave no holes then. Matrices that are replaced one by one by others of nearly the same size
    never fit such holes, so that all of them would be held twice.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_THRESHOLD, _APART)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, _TOGETHER)
