"""Which replicas share a folder of generations, and what each of them uses there.

Every replica writes a file over and over, with a beat that goes on. Others count it as gone when they have looked
``GONE_AFTER_LOOKS`` times and found the same beat: no clock has to agree with another, and while the folder itself does
not answer, nobody looks and nobody goes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from meteora_dist.adapters.files import read_bytes
from meteora_dist.config import faults
from meteora_dist.errors import BankError

GONE_AFTER_LOOKS = 30
"""Looks without a sign of life after which a replica counts as gone, and without a use after which a file does."""

_PREFIX = "replica-"


class ReplicaState(BaseModel):
    """What one replica says of itself. A later version may say more.

    Attributes:
        replica: Its name: of its machine, and a part of its own.
        beat: Grows with every word.
        generation: The bank generation that its new requests use; the one it loads, while it starts.
        live: Generations whose files it needs.
        state: ``behind`` when it has tried to load a newer generation, and could not.
    """

    model_config = ConfigDict(frozen=True)

    replica: str
    beat: int
    generation: int
    live: tuple[int, ...]
    state: Literal["starting", "serving", "behind"]


class Replicas:
    """Those who share a folder, as one of them sees it. All methods read or write files."""

    def __init__(self, folder: Path) -> None:
        """Has seen none yet.

        Args:
            folder: The shared folder.
        """
        self._folder = folder
        self._seen: dict[str, tuple[int, int]] = {}

    def tell(self, state: ReplicaState) -> None:
        """Says how this replica is.

        It changes the folder on purpose: an NFS client that has just done so asks the server for what is in there,
        instead of answering from what it remembers.

        Raises:
            BankError: The folder cannot be written.
        """
        place = self._folder / f"{_PREFIX}{state.replica}.json"
        draft = place.with_name(f".{place.name}")
        try:
            draft.write_text(state.model_dump_json() + "\n", encoding="utf-8")
            os.replace(draft, place)
        except OSError as cause:
            raise BankError(place, f"cannot be written ({cause})") from cause

    def others(self, me: str) -> tuple[ReplicaState, ...]:
        """One look at the other replicas: those that are not gone, by name.

        Args:
            me: Name of the one that looks.

        Raises:
            BankError: What one of them says cannot be understood, so that nobody knows what it uses.
        """
        present, seen = [], {}
        for place in sorted(self._folder.glob(f"{_PREFIX}*.json")):
            state = _read(place)
            if state is None or state.replica == me:
                continue
            beat, looks = self._seen.get(state.replica, (state.beat, 0))
            looks = looks + 1 if beat == state.beat else 0
            if looks >= GONE_AFTER_LOOKS:
                place.unlink(missing_ok=True)
                continue
            seen[state.replica] = (state.beat, looks)
            present.append(state)
        self._seen = seen
        return tuple(present)


def _read(place: Path) -> ReplicaState | None:
    """None for a replica that has just been found gone by another one."""
    try:
        return ReplicaState.model_validate_json(read_bytes(place, BankError))
    except ValidationError as error:
        raise BankError(place, f"is not what a replica says of itself: {faults(error)}") from None
    except BankError:
        if place.exists():
            raise
        return None
