"""How kernels are launched: a table of tile sizes by device, and the row of it that a pass takes.

Only ``rows``, ``planes`` and ``project_rows`` follow the number of tokens; they say who computes what, not in which
order it is added up. All else is fixed by the device, so that a token's result never depends on its batch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from typing import Any

TABLE = "launch.json"
DEFAULT = "default"
FEW_ROWS, MANY_ROWS = 1, 16
EXACT = {"enable_fp_fusion": False}
"""Products are rounded before they are added, or two variants of a kernel could differ in the last bit."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """A device's row of the table.

    Attributes:
        dense_columns: Columns (experts times rank) a linear may have to be served densely.
        few_tokens: Up to so many tokens, each has programs of its own, and parts of sums run side by side.
        splits: Parts of the input width that are summed apart and then added, a power of two.
        inputs: Input features a program multiplies at once.
        project_columns: Columns of a projection's tile.
        outputs: Output features of an expand's tile.
        pairs: (token, slot) pairs a weight gradient adds up at once.
        warps: Of a program.
        stages: Of its software pipeline.
    """

    dense_columns: int
    few_tokens: int
    splits: int
    inputs: int
    project_columns: int
    outputs: int
    pairs: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Launch:
    """How the kernels of one pass are launched.

    Attributes:
        rows: Tokens of a program that groups them by expert.
        project_rows: Tokens of a projection's tile.
        planes: Programs that share the splits of one sum; each leaves a plane.
        splits: See ``Tiles``, as are the others.
    """

    rows: int
    project_rows: int
    planes: int
    splits: int
    inputs: int
    project_columns: int
    outputs: int
    pairs: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int | bool]:
        """What triton's launcher takes beside a kernel's own arguments."""
        return {"num_warps": self.warps, "num_stages": self.stages, **EXACT}


def launch_of(tokens: int, tiles: Tiles) -> Launch:
    """The launch parameters of a pass of ``tokens`` tokens."""
    few = tokens <= tiles.few_tokens
    return Launch(
        rows=FEW_ROWS if few else MANY_ROWS,
        project_rows=16 if few else 32,
        planes=tiles.splits if few else 1,
        splits=tiles.splits,
        inputs=tiles.inputs,
        project_columns=tiles.project_columns,
        outputs=tiles.outputs,
        pairs=tiles.pairs,
        warps=tiles.warps,
        stages=tiles.stages,
    )


def tiles_of(device: str) -> Tiles:
    """The table's row for a device by name, as ``torch.cuda.get_device_name`` has it, or its default."""
    table = _table()
    return table.get(device, table[DEFAULT])


@cache
def _table() -> Mapping[str, Tiles]:
    return parse_table(json.loads(files(__package__).joinpath(TABLE).read_text()))


def parse_table(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Tiles]:
    """The table from its JSON.

    Raises:
        ValueError: A row lacks a field, has one too many, or a size no kernel can take.
    """
    names = {field.name for field in fields(Tiles)}
    for device, row in rows.items():
        if set(row) != names:
            raise ValueError(f"{TABLE}: {device} must have {sorted(names)}; it has {sorted(row)}")
        for name, value in row.items():
            free = name in {"dense_columns", "few_tokens", "stages"}
            least = 0 if free else 1 if name in {"splits", "warps"} else 16
            if not isinstance(value, int) or value < least or (not free and value & (value - 1)):
                raise ValueError(f"{TABLE}: {name} of {device} is {value}; it must be a power of two, at least {least}")
    if DEFAULT not in rows:
        raise ValueError(f"{TABLE}: has no row {DEFAULT!r}, which devices without one of their own take")
    return {device: Tiles(**row) for device, row in rows.items()}
