"""The command line in this process, as the shell would run it."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest

from meteora_dist.cli.main import main


@dataclass(frozen=True)
class Said:
    """What a command left.

    Attributes:
        code: Its exit code.
        out: Its stdout.
        err: Its stderr.
    """

    code: int
    out: str
    err: str

    @property
    def flat(self) -> str:
        """Both, on one line and without the frames of messages."""
        return " ".join((self.out + self.err).replace("│", " ").split())


class Shell:
    """Runs command lines; an exception that leaves ``main`` fails the test, as a traceback would a user."""

    def __init__(self, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self._patch = patch
        self._capture = capture

    def __call__(self, *words: object) -> Said:
        self._patch.setattr(sys, "argv", ["meteora", *map(str, words)])
        self._patch.setenv("COLUMNS", "160")
        self._capture.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = self._capture.readouterr()
        return Said(code, out, err)
