"""Writes a bank: complete at its place, or not there at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from meteora_dist.adapters import Adapter, read_adapter
from meteora_dist.adapters.adapter import CONFIG_FILE, WEIGHTS_FILE
from meteora_dist.bank.bank import EXPERTS_FOLDER, MANIFEST_FILE, Bank, describe
from meteora_dist.bank.fingerprint import fingerprint
from meteora_dist.bank.gates import GATES_FILE, check_shapes, model_order, rows_metadata
from meteora_dist.bank.manifest import (
    BankManifest,
    ExpertEntry,
    GateOrigin,
    RouterSettings,
    RoutingDefaults,
    check_expert_name,
)
from meteora_dist.bank.routers import ROUTERS_FILE, UNTRAINED, Routers, check_router_shapes
from meteora_dist.errors import BankError

_ROW_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Draft:
    """A bank that is to be written.

    Attributes:
        base_id: Name of the base model, for people.
        base_fingerprint: Of the base model.
        experts: Adapter of every expert by name, in the order of the gates' rows.
        gates: [E, H] for every linear any expert adapts, in any floating dtype.
        routing: Defaults of requests.
        generation: Its number, at least 1.
        routers: Of its layers; None for none.
        prototypes: Names of the experts whose rows are prototypes.
        linked: Names of the experts whose files lie in another bank and may be shared with it by hard links.
    """

    base_id: str
    base_fingerprint: str
    experts: Mapping[str, Adapter]
    gates: Mapping[str, Tensor]
    routing: RoutingDefaults
    generation: int
    routers: Routers | None = None
    prototypes: frozenset[str] = frozenset()
    linked: frozenset[str] = frozenset()


def write_bank(
    path: Path,
    base: Path,
    base_id: str,
    adapters: Mapping[str, Path],
    gates: Mapping[str, Tensor],
    routing: RoutingDefaults | None = None,
    generation: int = 1,
    routers: Routers | None = None,
    prototypes: frozenset[str] = frozenset(),
) -> Bank:
    """Writes a bank and opens it. It is built beside its place and moved there when it is complete.

    Args:
        path: Where it goes; nothing may be there yet.
        base: Folder of the base model's checkpoint.
        base_id: Name of the base model, for people.
        adapters: Folder of every expert's adapter by the expert's name, in the order of the gates' rows. Config and
            weights are copied byte for byte.
        gates: [E, H] for every linear any expert adapts, in any floating dtype; kept in that dtype.
        routing: Defaults of requests; None for top-2 ``auto``.
        generation: The bank's generation number, at least 1.
        routers: Of its layers; None for none.
        prototypes: Names of the experts whose gate rows are prototypes.

    Raises:
        BankError: When ``path`` exists, a name is not allowed, or gates, routers and adapters do not fit each other.
        AdapterError: When an adapter is damaged or asks for something unsupported.
        ModelError: When the base model's files are missing or damaged.
    """
    check_new(path, adapters)
    if not adapters or generation < 1 or not base_id:
        raise BankError(path, "a bank needs at least one expert, a generation of at least 1 and the base model's name")
    experts = {name: read_adapter(folder) for name, folder in adapters.items()}
    defaults = routing or RoutingDefaults()
    return place(path, Draft(base_id, fingerprint(base), experts, gates, defaults, generation, routers, prototypes))


def check_new(path: Path, names: Iterable[str]) -> None:
    """Raises BankError when something is at ``path`` already, nothing can be, or an expert may not be called so."""
    if path.exists():
        raise BankError(path, "exists already; remove it or write the bank elsewhere")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        raise BankError(path, f"cannot be written: {above} is no folder that may be written to")
    for name in names:
        try:
            check_expert_name(name)
        except ValueError as cause:
            raise BankError(path, str(cause)) from cause


def place(path: Path, draft: Draft) -> Bank:
    """Writes ``draft`` beside ``path``, opens it, and moves it to ``path``, where nothing may be, when all is well.

    Raises:
        BankError: When gates and adapters do not fit each other, an adapter is no longer the one in ``draft``, or
            files cannot be written.
        AdapterError: When an adapter has been damaged since it was read.
    """
    gate_bytes, router_bytes = _gate_bytes(path, draft), _router_bytes(path, draft)
    manifest = BankManifest(
        base_model=draft.base_id,
        base_fingerprint=draft.base_fingerprint,
        experts=tuple(_entry(draft, name) for name in draft.experts),
        gate_digest=_sha256(gate_bytes),
        generation=draft.generation,
        routing=draft.routing,
        routers=None
        if draft.routers is None
        else RouterSettings(digest=_sha256(router_bytes), pooling=draft.routers.pooling),
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as workshop:
            folder = Path(workshop) / "bank"
            for name, adapter in draft.experts.items():
                _bring(adapter, folder / EXPERTS_FOLDER / name, name in draft.linked)
            (folder / GATES_FILE).write_bytes(gate_bytes)
            if draft.routers is not None:
                (folder / ROUTERS_FILE).write_bytes(router_bytes)
            (folder / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
            bank = Bank.open(folder)
            os.rename(folder, path)
    except OSError as cause:
        raise BankError(path, f"cannot be written ({cause})") from cause
    return bank.moved_to(path)


def _entry(draft: Draft, name: str) -> ExpertEntry:
    routable = draft.routers is not None and name not in draft.routers.untrained
    gate: GateOrigin = "prototype" if name in draft.prototypes else "trained"
    return describe(name, draft.experts[name], gate, "trained" if routable else "none")


def _gate_bytes(path: Path, draft: Draft) -> bytes:
    gates = draft.gates
    check_shapes(path / GATES_FILE, {linear: tuple(gate.shape) for linear, gate in gates.items()}, draft.experts)
    return _serialise(path, "gate", gates, rows_metadata(_digests(draft), draft.prototypes))


def _router_bytes(path: Path, draft: Draft) -> bytes:
    """Of routers.safetensors; empty when there are no routers."""
    if draft.routers is None:
        return b""
    weights = draft.routers.weights
    shapes = {layer: tuple(router.shape) for layer, router in weights.items()}
    check_router_shapes(path / ROUTERS_FILE, shapes, len(draft.experts))
    return _serialise(path, "router", weights, rows_metadata(_digests(draft), draft.routers.untrained, UNTRAINED))


def _digests(draft: Draft) -> dict[str, str]:
    return {name: adapter.digest for name, adapter in draft.experts.items()}


def _serialise(path: Path, what: str, rows: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    for name, rows_EH in rows.items():
        if rows_EH.dtype not in _ROW_DTYPES:
            raise BankError(path, f"the {what} of {name} is {rows_EH.dtype}; it must be float32, float16 or bfloat16")
        if not bool(torch.isfinite(rows_EH).all()):
            raise BankError(path, f"the {what} of {name} holds NaN or infinity")
    return save({name: rows[name].detach().cpu().clone().contiguous() for name in model_order(rows)}, metadata)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _bring(adapter: Adapter, folder: Path, link: bool) -> None:
    folder.mkdir(parents=True)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if link:
            with contextlib.suppress(OSError):
                os.link(adapter.path / file, folder / file)
                continue
        # Also where the file system has no hard links, or the place is on another one.
        shutil.copyfile(adapter.path / file, folder / file)
