"""The folder in which a service keeps the generations of its bank: they are there again after a restart.

    generation-7/   a whole bank, written by ``edit_bank``
    newest.json     which of them is served, and which configured bank all of them follow from

``newest.json`` is replaced at once or not at all, after the ranks have the generation and before anybody is told so.
A crash in between leaves a folder that nothing points to; the next start removes it.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from meteora_dist.adapters.files import read_json_object, sha256_file
from meteora_dist.bank import Bank
from meteora_dist.bank.bank import MANIFEST_FILE
from meteora_dist.errors import BankError

NEWEST_FILE = "newest.json"

_PREFIX = "generation-"


class Generations:
    """What a service has made of the configured bank; for one replica at a time. All methods read or write files."""

    def __init__(self, configured: Path, folder: Path) -> None:
        """Only takes note; the folder is made when it is needed.

        Args:
            configured: Folder of the bank that the service is configured with; never written to.
            folder: Where its later generations are kept.
        """
        self._configured = configured
        self._folder = folder

    def open(self) -> Bank:
        """The bank to serve: the newest generation that was kept, or the configured bank when there is none.

        Raises:
            BankError: It is damaged, or what is kept follows from another bank than the configured one.
            AdapterError: An expert of it is damaged.
        """
        pointer = self._folder / NEWEST_FILE
        if not pointer.exists():
            return Bank.open(self._configured)
        kept = read_json_object(pointer, BankError)
        generation, follows, origin = kept.get("generation"), kept.get("follows"), self._origin()
        if type(generation) is not int or kept.keys() != {"generation", "follows"}:
            raise BankError(pointer, "must have two fields, an integer `generation` and `follows`, and no other")
        if follows != origin:
            raise BankError(
                pointer,
                f"generation {generation} follows from a bank whose {MANIFEST_FILE} has sha256 {follows}, but that of "
                f"the configured bank {self._configured} has {origin}: configure the bank it follows from, or remove "
                f"{self._folder} to start from the configured one",
            )
        return Bank.open(self.place(generation))

    def tidy(self) -> None:
        """Removes all generations but the newest: what a replica that has ended without notice left behind."""
        pointer = self._folder / NEWEST_FILE
        kept = self.place(read_json_object(pointer, BankError)["generation"]) if pointer.exists() else None
        for folder in (*self._folder.glob(f"{_PREFIX}*"), *self._folder.glob(f".{_PREFIX}*")):
            if folder != kept:
                self.remove(folder)

    def place(self, generation: int) -> Path:
        """Folder of a generation."""
        return self._folder / f"{_PREFIX}{generation}"

    def keep(self, bank: Bank) -> None:
        """Makes a bank that lies in its ``place`` the one to be served after a restart.

        Raises:
            BankError: The file cannot be written; it is as it was.
        """
        pointer = self._folder / NEWEST_FILE
        draft = pointer.with_suffix(".partial")
        content = json.dumps({"generation": bank.manifest.generation, "follows": self._origin()}) + "\n"
        try:
            with draft.open("w", encoding="utf-8") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, pointer)
        except OSError as cause:
            raise BankError(pointer, f"cannot be written ({cause})") from cause

    def remove(self, folder: Path) -> None:
        """Removes the folder of a generation; one that was not made here stays."""
        if folder.parent == self._folder:
            shutil.rmtree(folder, ignore_errors=True)

    def _origin(self) -> str:
        return sha256_file(self._configured / MANIFEST_FILE, BankError)
