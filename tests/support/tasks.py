"""Data sets of tiny tasks that a tiny model can tell apart, and the runs over them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meteora_dist.training.gate_run import GateRequest
from meteora_dist.training.settings import GateSettings, LoopSettings
from tests.support.tiny import SPECS


def write_tasks(folder: Path, names: tuple[str, ...] = tuple(SPECS), rows: int = 20) -> Path:
    """One data set a name; each uses letters of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        letters = [chr(65 + 6 * index + offset) for offset in range(6)]
        lines = [
            json.dumps({"input": letters[row % 5] * (20 + row % 4), "target": letters[5] * 4}) for row in range(rows)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_texts(path: Path, rows: int = 20) -> Path:
    """Texts that belong to no task."""
    path.write_text("".join(json.dumps({"text": f"{row} of many" + "." * (row % 3)}) + "\n" for row in range(rows)))
    return path


def request(
    base: Path, adapters: Path, folder: Path, options: Mapping[str, Any] | None = None, **more: Any
) -> GateRequest:
    """A short run in fp32 over all tasks, with its data, its folder and its bank below ``folder``."""
    given = {"steps": 6, "dtype": "float32", "log_every": 1, "checkpoint_every": 2, "threads": 1} | dict(options or {})
    loop = LoopSettings(**{name: value for name, value in given.items() if name in LoopSettings.model_fields})
    gates = GateSettings(**{name: value for name, value in given.items() if name in GateSettings.model_fields})
    data = folder / "data"
    if not data.exists():
        write_tasks(data)
    paths = {"base": base, "adapters": adapters, "data": data, "out": folder / "bank", "folder": folder / "run"}
    return GateRequest(**paths | {"loop": loop, "gates": gates} | more)
