"""Numbered records in a folder that processes of several machines share: each number is written once.

A record is a folder ``NAME-7`` with one file in it, moved to its place when it is complete. No file system moves a
folder onto one that is not empty, NFS included: of several who write one number, exactly one succeeds, and nobody sees
half a record. That takes no lock, no clock, and nobody who is in charge.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meteora_dist.adapters.files import read_json_object
from meteora_dist.errors import BankError

RECORD_FILE = "record.json"

_KEPT = 1000
"""Old records that stay: who is held up between a look at the newest and writing the next one must still find it."""


class Records:
    """The records of one name. All methods read or write files."""

    def __init__(self, folder: Path, name: str) -> None:
        """Only takes note; the folder is made when it is needed.

        Args:
            folder: Where they are, beside whatever else there may be.
            name: What their folders are called, before the number.
        """
        self._folder = folder
        self._name = name

    def newest(self) -> int:
        """The highest number; 0 when there is none.

        Raises:
            BankError: The folder cannot be read.
        """
        return max(self._numbers(), default=0)

    def read(self, number: int) -> dict[str, Any]:
        """What was written under a number; raises BankError when nothing was, or it is damaged."""
        return read_json_object(self._place(number) / RECORD_FILE, BankError)

    def write(self, number: int, content: Mapping[str, str], author: str) -> bool:
        """Writes a record unless there is one of that number; whether it is this one that is there now.

        Args:
            number: At least 1.
            content: Says of itself who has written it.
            author: Part of the name of what is there for a moment before the record.

        Raises:
            BankError: It cannot be written.
        """
        place = self._place(number)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{place.name}-{author}.", dir=self._folder) as workshop:
                draft = Path(workshop) / "record"
                draft.mkdir()
                with (draft / RECORD_FILE).open("w", encoding="utf-8") as file:
                    file.write(json.dumps(content) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                os.rename(draft, place)
        except OSError as cause:
            # Where an answer of the file server was lost, the record may be ours all the same.
            if not place.exists():
                raise BankError(place, f"cannot be written ({cause})") from cause
        return self.read(number) == content

    def prune(self) -> None:
        """Removes records that nobody can be waiting to write any more."""
        numbers = self._numbers()
        for number in numbers:
            if number <= max(numbers) - _KEPT:
                shutil.rmtree(self._place(number), ignore_errors=True)

    def _place(self, number: int) -> Path:
        return self._folder / f"{self._name}-{number}"

    def _numbers(self) -> list[int]:
        prefix = f"{self._name}-"
        try:
            names = [entry for entry in os.listdir(self._folder) if entry.startswith(prefix)]
        except FileNotFoundError:
            return []
        except OSError as cause:
            raise BankError(self._folder, f"cannot be read ({cause.strerror})") from cause
        return [int(number) for name in names if (number := name.removeprefix(prefix)).isdecimal()]
