"""gates.safetensors: one gate per targeted linear, its rows tied to the experts in their order.

Shapes: E experts, H input features of the linear.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from meteora_dist.adapters import Adapter, LoraShape
from meteora_dist.adapters.files import parse_json_object
from meteora_dist.adapters.header import Header
from meteora_dist.adapters.tensors import is_floating
from meteora_dist.bank.manifest import experts_digest
from meteora_dist.errors import BankError

GATES_FILE = "gates.safetensors"
PROTOTYPES = "prototypes"
"""Mark of rows that are made from the adapter itself."""

_METADATA_KEY = "experts"
_KNOWN_ORDER = (
    *("self_attn", "mlp"),
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)


def rows_metadata(experts: Mapping[str, str], marked: Collection[str] = (), mark: str = PROTOTYPES) -> dict[str, str]:
    """Metadata of a file with one row for every expert.

    Args:
        experts: Adapter digest by name, in the order of the rows.
        marked: Names of those whose rows are special.
        mark: What they are.
    """
    # One key only: the safetensors library writes several in random order, and the file's digest would vary.
    content: dict[str, object] = {"names": list(experts), "digest": experts_digest(experts.items())}
    if marked:
        content[mark] = [name for name in experts if name in marked]
    return {_METADATA_KEY: json.dumps(content, separators=(",", ":"))}


def check_rows(
    path: Path, header: Header, experts: Mapping[str, str], marked: Collection[str] = (), mark: str = PROTOTYPES
) -> None:
    """Checks that the rows of a file belong to these experts; arguments as for ``rows_metadata``.

    Raises:
        BankError: When they were made for other experts, another order or other adapters, or others are marked.
    """
    text = header.metadata.get(_METADATA_KEY)
    if text is None:
        raise BankError(path, f"its metadata lacks {_METADATA_KEY!r}, which says whose rows it holds")
    written = parse_json_object(text.encode(errors="replace"), path, f"metadata {_METADATA_KEY!r}", BankError)
    if written.get("names") != list(experts):
        raise BankError(path, f"its rows belong to the experts {written.get('names')}; bank.json lists {list(experts)}")
    if written.get("digest") != experts_digest(experts.items()):
        raise BankError(path, "its rows were made for other adapters under the same names; bank.json has other digests")
    listed = [name for name in experts if name in marked]
    if written.get(mark, []) != listed:
        raise BankError(path, f"its rows of {written.get(mark, [])} are {mark}; bank.json lists {listed}")


def check_shapes(path: Path, gates: Mapping[str, tuple[int, ...]], experts: Mapping[str, Adapter]) -> None:
    """Checks gates and adapters against each other.

    Args:
        path: Of the gates file, for messages.
        gates: Shape of every gate, by linear.
        experts: Adapters by name, in order.

    Raises:
        BankError: When experts disagree on a linear's features, a targeted linear lacks a gate, a gate is not
            [experts, input features], or no expert adapts its linear.
    """
    linears = _targeted(path, experts)
    if missing := model_order(linears.keys() - gates.keys()):
        raise BankError(path, f"has no gate for {missing[0]} ({len(missing)} of {len(linears)} linears lack one)")
    if unused := model_order(gates.keys() - linears.keys()):
        raise BankError(path, f"has a gate for {unused[0]}, which no expert adapts ({len(unused)} such gates)")
    for linear, (shape, _) in linears.items():
        expected = (len(experts), shape.in_features)
        if gates[linear] != expected:
            raise BankError(
                path,
                f"the gate of {linear} is {list(gates[linear])}; for {expected[0]} experts and {expected[1]} input "
                f"features it must be {list(expected)}",
            )


def check_dtypes(path: Path, header: Header, what: str = "gate") -> None:
    """Checks that every gate, or whatever ``what`` says, holds floating-point numbers; BankError otherwise."""
    for name, info in header.tensors.items():
        if not is_floating(info.dtype):
            raise BankError(path, f"the {what} of {name} is {info.dtype}; it must be F32, F16, BF16 or F64")


def model_order(linears: Iterable[str]) -> tuple[str, ...]:
    """Linears by layer number, then in the order in which a Llama-like layer uses them, then by name."""

    def key(linear: str) -> list[tuple[int, str]]:
        return [_part_key(part) for part in linear.split(".")]

    return tuple(sorted(linears, key=key))


def _part_key(part: str) -> tuple[int, str]:
    if re.fullmatch(r"[0-9]{1,9}", part):
        return int(part), part
    return (_KNOWN_ORDER.index(part), "") if part in _KNOWN_ORDER else (len(_KNOWN_ORDER), part)


def _targeted(path: Path, experts: Mapping[str, Adapter]) -> dict[str, tuple[LoraShape, str]]:
    linears: dict[str, tuple[LoraShape, str]] = {}
    for name, adapter in experts.items():
        for linear, shape in adapter.shapes.items():
            first, owner = linears.setdefault(linear, (shape, name))
            if (first.in_features, first.out_features) != (shape.in_features, shape.out_features):
                raise BankError(
                    path.parent,
                    f"expert {owner} maps {first.in_features} to {first.out_features} features at {linear}, "
                    f"expert {name} {shape.in_features} to {shape.out_features}; they must be for the same base model",
                )
    return linears
