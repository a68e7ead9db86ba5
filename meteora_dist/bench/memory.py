"""Memory of this process as Linux accounts for it, in bytes."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STATUS = Path("/proc/self/status")


def resident() -> int:
    """Resident set now: what was touched and is not swapped out, mapped files included."""
    return _read("VmRSS")


def peak_resident() -> int:
    """Largest resident set since the process began or ``reset_peak``."""
    return _read("VmHWM")


def reset_peak() -> None:
    """Makes ``peak_resident`` count from now."""
    Path("/proc/self/clear_refs").write_text("5")


@contextmanager
def limited_growth(nbytes: int | None) -> Iterator[None]:
    """Lets the private writable memory of this process grow by ``nbytes`` at most; allocations beyond that fail.

    None sets no limit. The one that was there before is put back in the end.
    """
    before = resource.getrlimit(resource.RLIMIT_DATA)
    if nbytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (_read("VmData") + nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _read(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"{_STATUS} has no field {field}; these figures need Linux")
