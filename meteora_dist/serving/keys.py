"""Who calls, and what that caller may do: API keys and the file that holds their digests."""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, PositiveInt, TypeAdapter, ValidationError, field_validator

from meteora_dist.config import StrictModel, faults
from meteora_dist.errors import Forbidden, KeysError

logger = logging.getLogger(__name__)

Clock = Callable[[], float]

_KEY_BYTES = 32
_REREAD_S = 1.0


class Caller(StrictModel):
    """Who calls.

    Attributes:
        name: In logs, metrics and messages; the limits and the fair share of the service are counted by it.
        role: ``user`` may ask models; ``admin`` may change the experts as well.
        models: What requests may name: experts, and ``auto``, ``auto-sequence`` and ``base``. A blend needs each of
            its experts. ``auto`` and ``auto-sequence`` pick among all experts, so they are allowed only where they are
            listed. None allows everything.
        requests_per_minute: Calls of any kind; that many may come at once, then one every 60 / n seconds. None for any
            number.
        max_live_requests: Calls under way at once. None for any number.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    role: Literal["user", "admin"] = "user"
    models: tuple[str, ...] | None = None
    requests_per_minute: PositiveInt | None = None
    max_live_requests: PositiveInt | None = None

    def may_use(self, model: str) -> bool:
        """Whether a request may name this model."""
        return self.models is None or model in self.models

    def sees(self, expert: str) -> bool:
        """Whether the expert's name and shares may be shown: who lets the gates choose must be told what they chose."""
        return self.may_use(expert) or self.may_use("auto") or self.may_use("auto-sequence")

    def demand(self, *models: str) -> None:
        """Raises Forbidden unless a request may name all of these models."""
        for model in models:
            if not self.may_use(model):
                raise Forbidden(f"this API key may not use the model {model!r}")

    def demand_admin(self) -> None:
        """Raises Forbidden unless the caller may change the service."""
        if self.role != "admin":
            raise Forbidden("this needs the API key of an administrator")


ANONYMOUS = Caller(name="anonymous")
"""Whoever calls an open service without a key: every model, no limit of its own, no administration."""


class KeyEntry(Caller):
    """One caller in the keys file.

    Attributes:
        sha256: Hex digests of its keys; more than one while a key is being replaced.
    """

    sha256: tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")], ...] = Field(min_length=1)

    @field_validator("sha256", mode="before")
    @classmethod
    def _one_or_more(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


_ENTRIES = TypeAdapter(tuple[KeyEntry, ...])


def new_key() -> str:
    """A random key of 256 bits."""
    return f"mk-{secrets.token_urlsafe(_KEY_BYTES)}"


def key_digest(key: str) -> str:
    """What the keys file holds in a key's place. Keys are random and long: nothing slower than SHA-256 is needed."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(path: Path) -> tuple[KeyEntry, ...]:
    """Reads a keys file: a list of entries, in YAML or JSON.

    Raises:
        KeysError: It cannot be read, an entry is wrong, or two share a name or a key.
    """
    try:
        entries = _ENTRIES.validate_python(yaml.safe_load(path.read_text()))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise KeysError(path, f"this keys file cannot be read: {error}") from None
    except ValidationError as error:
        raise KeysError(path, f"this keys file is wrong: {faults(error)}") from None
    _refuse_twins(path, "name", [entry.name for entry in entries])
    _refuse_twins(path, "key", [digest for entry in entries for digest in entry.sha256])
    return entries


def _refuse_twins(path: Path, what: str, values: Sequence[str]) -> None:
    twins = [value for value, count in Counter(values).items() if count > 1]
    if twins:
        raise KeysError(path, f"the {what} {twins[0]} is there more than once")


class Keyring:
    """The keys of a file, read again when it changes. A new version that is broken changes nothing."""

    def __init__(self, path: Path, clock: Clock = time.monotonic) -> None:
        """Reads the file.

        Args:
            path: The keys file.
            clock: Seconds.

        Raises:
            KeysError: It cannot be used.
        """
        self._path = path
        self._clock = clock
        self._version = self._stamp()
        self._entries = read_keys(path)
        self._looked = clock()

    def find(self, key: str) -> KeyEntry | None:
        """The entry of a key. Takes the same time for every key, known or not."""
        self._reread()
        digest, found = key_digest(key), None
        for entry in self._entries:
            for known in entry.sha256:
                if hmac.compare_digest(known, digest):
                    found = entry
        return found

    def _reread(self) -> None:
        now = self._clock()
        if now - self._looked < _REREAD_S:
            return
        self._looked = now
        version = self._stamp()
        if version == self._version:
            return
        # Noted whatever comes of it: a broken file is complained of once.
        self._version = version
        try:
            self._entries = read_keys(self._path)
            logger.info("%d callers have keys now", len(self._entries))
        except KeysError as error:
            logger.error("the keys stay as they were: %s", error)

    def _stamp(self) -> tuple[int, ...] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino
