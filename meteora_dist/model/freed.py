"""Memory that was freed, given back to the system."""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from typing import Any


def give_back_freed() -> None:
    """Lets the C library return what it keeps of freed blocks; does nothing where that library is not glibc.

    glibc keeps them for later. Matrices that are replaced one by one by others of nearly the same size never fit the
    holes they leave, so that all of them would be held twice.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@lru_cache(maxsize=1)
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
