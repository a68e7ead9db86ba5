"""The folder in which the replicas of a service keep the generations of its bank: one bank for all, and for restarts.

    generation-7-HOST-3f0c9a1e/         a whole bank, written by ``edit_bank``; who wrote it is part of its name
    published-7/record.json             makes that folder generation 7, following from a configured bank
    replica-HOST-3f0c9a1e.json          which generations this replica uses, see ``serving.replicas``
    rebalanced-2/record.json            calls upon all replicas to rebalance their ranks

A replica writes a folder, gives it to its own ranks, and then publishes it, which is one step (``serving.records``) and
the only thing that decides among replicas: the generation is everybody's, or another replica was first. A replica that
ends before that step leaves a folder that nothing points to.
"""

from __future__ import annotations

import re
import secrets
import shutil
import socket
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path

from meteora_dist.adapters.files import sha256_file
from meteora_dist.bank import Bank
from meteora_dist.bank.bank import MANIFEST_FILE
from meteora_dist.errors import BankError, StaleGeneration
from meteora_dist.serving.records import Records
from meteora_dist.serving.replicas import GONE_AFTER_LOOKS, ReplicaState

_PUBLISHED = "published"
_REBALANCED = "rebalanced"
_MADE = re.compile(rf"(?:generation|\.(?:generation|{_PUBLISHED}|{_REBALANCED}))-(\d+)-([a-z0-9-]+)(?:\..*)?")
"""Folders that a replica has made: of a generation, and what becomes one or a record."""


class Generations:
    """What the replicas of a service have made of the configured bank. All methods read or write files.

    Attributes:
        folder: Where.
        replica: What this replica is called there; no other one ever is.
    """

    def __init__(self, configured: Path, folder: Path) -> None:
        """Only takes note; the folder is made when it is needed.

        Args:
            configured: Folder of the bank that the service is configured with; never written to.
            folder: Where its later generations are kept, for all replicas.
        """
        host = re.sub(r"[^a-z0-9]+", "-", socket.gethostname().lower()).strip("-") or "replica"
        self.folder = folder
        self.replica = f"{host}-{secrets.token_hex(4)}"
        self._configured = configured
        self._published = Records(folder, _PUBLISHED)
        self._rebalances = Records(folder, _REBALANCED)
        self._rebalanced: int | None = None
        self._unwanted: Counter[Path] = Counter()

    def make_folder(self) -> None:
        """Makes it, for a service that is meant to change its bank; raises BankError when that is not possible."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as cause:
            raise BankError(
                self.folder, f"cannot be made ({cause.strerror}): name another folder with `generations`"
            ) from cause

    def newest(self) -> int:
        """The newest generation that was published; 0 when it is the configured bank's."""
        return self._published.newest()

    def open(self, number: int | None = None) -> Bank:
        """A generation that was published: the newest, or the one of this number. For 0, the configured bank.

        Raises:
            BankError: It is damaged, or follows from another bank than the configured one.
            AdapterError: An expert of it is damaged.
        """
        number = self.newest() if number is None else number
        if number == 0:
            return Bank.open(self._configured)
        kept, origin = self._record(number), self._origin()
        if kept["follows"] != origin:
            raise BankError(
                self.folder,
                f"generation {number} follows from a bank whose {MANIFEST_FILE} has sha256 {kept['follows']}, but that "
                f"of the configured bank {self._configured} has {origin}: configure the bank it follows from, or "
                f"remove {self.folder} to start from the configured one",
            )
        bank = Bank.open(self.folder / kept["folder"])
        if bank.manifest.generation != number:
            raise BankError(bank.path, f"was published as generation {number}, but is {bank.manifest.generation}")
        return bank

    def place(self, number: int) -> Path:
        """Folder for a generation that this replica makes."""
        return self.folder / f"generation-{number}-{self.replica}"

    def publish(self, bank: Bank) -> None:
        """Makes a bank that lies in its ``place`` the newest generation, for all replicas.

        Raises:
            StaleGeneration: Another replica was first, and its own is the newest.
            BankError: It cannot be published; nothing has changed.
        """
        number, content = bank.manifest.generation, {"folder": bank.path.name, "follows": self._origin()}
        if self.newest() >= number or not self._published.write(number, content, self.replica):
            raise StaleGeneration(
                f"another replica was first: generation {self.newest()} of the bank is the newest now: "
                "look at it, and try again",
                "generation",
            )

    def remove(self, folder: Path) -> None:
        """Removes the folder of a generation; one that was not made here stays."""
        if folder.parent == self.folder:
            shutil.rmtree(folder, ignore_errors=True)

    def call_rebalance(self) -> None:
        """Calls upon the other replicas to rebalance, where there can be any; raises BankError."""
        if not self.folder.is_dir():
            return
        number = self._rebalances.newest() + 1
        # Another replica's call is as good: it reaches all the others, and this one as well.
        if self._rebalances.write(number, {"replica": self.replica}, self.replica):
            self._rebalanced = number

    def rebalance_called(self) -> bool:
        """Whether a replica has called upon the others since the last time, or the start; raises BankError."""
        before, self._rebalanced = self._rebalanced, self._rebalances.newest()
        return before is not None and self._rebalanced > before

    def tidy(self, replicas: Iterable[ReplicaState]) -> None:
        """Removes what has been of no use for ``GONE_AFTER_LOOKS`` calls of this method.

        That is each generation but the newest that no replica uses, and what replicas that are gone have not finished.

        Args:
            replicas: Those that are not gone, with this one.

        Raises:
            BankError: A record cannot be read.
        """
        known = tuple(replicas)
        used = {self.newest(), *(number for replica in known for number in replica.live)}
        present = {replica.replica for replica in known}
        unwanted = [path for path in self.folder.iterdir() if not self._wanted(path, used, present)]
        self._unwanted = Counter({path: self._unwanted[path] + 1 for path in unwanted})
        for path, looks in self._unwanted.items():
            if looks >= GONE_AFTER_LOOKS:
                self.remove(path)
        self._published.prune()
        self._rebalances.prune()

    def _wanted(self, path: Path, used: Collection[int], present: Collection[str]) -> bool:
        made = _MADE.fullmatch(path.name)
        if made is None:
            return True
        number = int(made[1])
        if (self.folder / f"{_PUBLISHED}-{number}").exists() and self._record(number)["folder"] == path.name:
            return number in used
        return made[2] in present

    def _record(self, number: int) -> dict[str, str]:
        record = self._published.read(number)
        if record.keys() != {"folder", "follows"} or Path(str(record["folder"])).name != record["folder"]:
            raise BankError(
                self.folder / f"{_PUBLISHED}-{number}", "must have `folder`, a name, and `follows`, and nothing else"
            )
        return record

    def _origin(self) -> str:
        return sha256_file(self._configured / MANIFEST_FILE, BankError)
