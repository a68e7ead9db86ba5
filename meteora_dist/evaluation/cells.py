"""What has been measured already: one small JSON file for every method, task and kind of measurement.

An interrupted evaluation goes on with the first missing cell, and another bank of the same adapters reuses what does
not depend on the gates.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from meteora_dist.adapters.files import read_json_object
from meteora_dist.errors import DatasetError


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
            cell = read_json_object(path, DatasetError)
            if "value" not in cell or cell.get("identity") != json.loads(json.dumps(identity)):
                raise DatasetError(path, "is no cell of this evaluation; remove it, and it is measured again")
            return cell["value"]
        value = make()
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({"identity": identity, "value": value}) + "\n")
        partial.replace(path)
        return json.loads(json.dumps(value))
