"""routers.safetensors: one router per decoder layer, which together pick one expert for a whole sequence.

Mixture-of-LoRAs (Feng et al., arXiv 2403.03432). A router is linear, without bias; its rows are tied to the experts in
their order, as those of gates are. An expert that has no row yet is marked, its row is zero, and it is never chosen.

Shapes: L decoder layers, E experts, H width of the hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from meteora_dist.adapters.files import sha256_file
from meteora_dist.adapters.header import Header, read_header
from meteora_dist.adapters.tensors import is_floating, read_tensors
from meteora_dist.bank.gates import check_dtypes, check_rows, model_order
from meteora_dist.bank.manifest import BankManifest, Pooling
from meteora_dist.errors import BankError

ROUTERS_FILE = "routers.safetensors"
ROUTER_ROWS_FILE = "router_rows.safetensors"
"""The rows of one expert, beside the adapter's own files, for the bank it is to join."""
UNTRAINED = "untrained"
"""Mark of rows that stand for nothing yet."""


@dataclass(frozen=True, slots=True)
class Routers:
    """Routers of a bank that is to be written.

    Attributes:
        weights: [E, H] for every decoder layer, by its path in the base model, in any floating dtype.
        pooling: What of a prompt they read.
        untrained: Names of the experts without rows of their own.
    """

    weights: Mapping[str, Tensor]
    pooling: Pooling = "last"
    untrained: frozenset[str] = frozenset()


def open_routers(folder: Path, manifest: BankManifest) -> Header | None:
    """Checks the routers of a bank, without reading them; returns their header, or None when it has none.

    Raises:
        BankError: The file is damaged, does not belong to the experts of bank.json, or is there when it should not be.
    """
    path = folder / ROUTERS_FILE
    marked = [entry.name for entry in manifest.experts if entry.router == "none"]
    if manifest.routers is None:
        if path.exists():
            raise BankError(path, "is there, but bank.json has no routers")
        if len(marked) < len(manifest.experts):
            raise BankError(folder, "bank.json has experts with router rows, but no routers")
        return None
    header = read_header(path, BankError)
    check_rows(path, header, {entry.name: entry.digest for entry in manifest.experts}, marked, UNTRAINED)
    check_dtypes(path, header, "router")
    check_router_shapes(path, {name: info.shape for name, info in header.tensors.items()}, len(manifest.experts))
    if len(marked) == len(manifest.experts):
        raise BankError(path, "none of its rows is trained; a bank with routers needs at least one expert that has one")
    digest = sha256_file(path, BankError)
    if digest != manifest.routers.digest:
        raise BankError(path, f"its sha256 is {digest}; bank.json gives {manifest.routers.digest}")
    return header


def check_router_shapes(path: Path, shapes: Mapping[str, tuple[int, ...]], experts: int) -> None:
    """Checks that routers are those of layers 0 to L - 1 of one model, each [E, H]; BankError otherwise."""
    layers = model_order(shapes)
    prefix = layers[0].rpartition(".")[0] if layers else ""
    wanted = [f"{prefix}.{number}" for number in range(len(layers))]
    if not layers or list(layers) != wanted:
        raise BankError(
            path,
            f"has routers for {', '.join(layers) or 'no layer'}; they must be for the layers 0 to L - 1 of a model",
        )
    widths = {shape[-1] for shape in shapes.values() if len(shape) == 2}
    for layer in layers:
        if len(widths) != 1 or shapes[layer] != (experts, *widths):
            raise BankError(
                path,
                f"the router of {layer} is {list(shapes[layer])}; for {experts} experts all must be [{experts}, H] "
                "with the same H",
            )


def read_router_rows(path: Path, layers: Sequence[str], width: int) -> Tensor:
    """Reads the rows of one expert: a tensor [H] or [1, H] for each layer of the bank's routers, and no others.

    Args:
        path: The file.
        layers: The layers that the bank has routers for.
        width: H.

    Returns:
        [L, H], fp32.

    Raises:
        BankError: It is damaged, lacks a layer or has another, has a tensor of another shape or dtype, or NaN or
            infinity.
    """
    header = read_header(path, BankError)
    if differing := model_order(header.tensors.keys() ^ set(layers)):
        verb = "has a row" if differing[0] in header.tensors else "has no row"
        raise BankError(path, f"{verb} for {differing[0]}; the bank has routers for {layers[0]} to {layers[-1]}")
    for layer, info in header.tensors.items():
        if info.shape not in ((width,), (1, width)) or not is_floating(info.dtype):
            raise BankError(
                path,
                f"the row of {layer} is {info.dtype} {list(info.shape)}; it must be floating-point [{width}] or "
                f"[1, {width}]",
            )
    rows_LH = torch.stack([row.flatten().float() for row in read_tensors(path, header, layers, BankError)])
    if not bool(torch.isfinite(rows_LH).all()):
        raise BankError(path, "holds NaN or infinity")
    return rows_LH
