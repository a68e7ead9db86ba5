"""What has been measured already: one small JSON file for every method, task and kind of measurement.

An interrupted evaluation goes on with the first missing cell, and another bank of the same adapters reuses what does
not depend on the gates.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from meteora_dist.adapters.files import read_json_object
from meteora_dist.errors import DatasetError

ROWS_AT_ONCE = 48
"""Rows measured from one writing of their cell to the next."""


def digest(value: Any) -> str:
    """sha256, in hex, of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Cells:
    """Cells in a folder, which is made when the first is written."""

    def __init__(self, folder: Path) -> None:
        """Nothing is read yet."""
        self._folder = folder

    def path(self, name: str, identity: Mapping[str, Any]) -> Path:
        """The file of a cell.

        Args:
            name: For people.
            identity: All that its value depends on, as JSON.
        """
        return self._folder / f"{re.sub('[^A-Za-z0-9.@_-]', '-', name)}-{digest(identity)[:16]}.json"

    def get(self, name: str, identity: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """The cell's value, a JSON value: read, or made and written.

        Raises:
            DatasetError: The file is damaged.
        """
        path = self.path(name, identity)
        if path.is_file():
            return self._read(path, identity)
        return self._write(path, identity, make())

    def rows(
        self, name: str, identity: Mapping[str, Any], keys: Sequence[str], make: Callable[[list[int]], Sequence[Any]]
    ) -> list[Any]:
        """Values of rows, in one cell that grows: written every few rows, so that little is lost with an interruption.

        Args:
            name: For people.
            identity: All that a row's value depends on beside its key, as JSON.
            keys: Of the rows; rows of one key have one value.
            make: Given places in ``keys``, the values of these rows.

        Raises:
            DatasetError: The file is damaged.
        """
        path = self.path(name, identity)
        known: dict[str, Any] = self._read(path, identity) if path.is_file() else {}
        missing = [place for key, place in {key: place for place, key in enumerate(keys)}.items() if key not in known]
        for start in range(0, len(missing), ROWS_AT_ONCE):
            block = missing[start : start + ROWS_AT_ONCE]
            made = {keys[place]: value for place, value in zip(block, make(block), strict=True)}
            known = self._write(path, identity, known | made)
        return [known[key] for key in keys]

    def _read(self, path: Path, identity: Mapping[str, Any]) -> Any:
        cell = read_json_object(path, DatasetError)
        if "value" not in cell or cell.get("identity") != json.loads(json.dumps(identity)):
            raise DatasetError(path, "is no cell of this evaluation; remove it, and it is measured again")
        return cell["value"]

    def _write(self, path: Path, identity: Mapping[str, Any], value: Any) -> Any:
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        text = json.dumps({"identity": identity, "value": value})
        partial.write_text(text + "\n")
        partial.replace(path)
        return json.loads(text)["value"]
