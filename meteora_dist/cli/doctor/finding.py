"""What a check finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "failure"]


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check.

    Attributes:
        check: What was looked at.
        status: ``failure`` for what will not work, ``warning`` for what may not.
        what: What was found, in a line.
        fix: What the user can do about it; empty when it is well.
    """

    check: str
    status: Status
    what: str
    fix: str = ""
