"""Memory of this process as Linux accounts for it, in bytes."""

from __future__ import annotations

import resource
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


def limit_growth(nbytes: int) -> None:
    """Lets the private writable memory of this process grow by ``nbytes`` from now; allocations beyond that fail."""
    allowed = _read("VmData") + nbytes
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))


def _read(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"{_STATUS} has no field {field}; these figures need Linux")
