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
from meteora_dist.bank.gates import GATES_FILE, check_shapes, gates_metadata, model_order
from meteora_dist.bank.manifest import BankManifest, RoutingDefaults, check_expert_name
from meteora_dist.errors import BankError

_GATE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


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
        prototypes: Names of the experts whose rows are prototypes.
        linked: Names of the experts whose files lie in another bank and may be shared with it by hard links.
    """

    base_id: str
    base_fingerprint: str
    experts: Mapping[str, Adapter]
    gates: Mapping[str, Tensor]
    routing: RoutingDefaults
    generation: int
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

    Raises:
        BankError: When ``path`` exists, a name is not allowed, or gates and adapters do not fit each other.
        AdapterError: When an adapter is damaged or asks for something unsupported.
        ModelError: When the base model's files are missing or damaged.
    """
    check_new(path, adapters)
    if not adapters or generation < 1 or not base_id:
        raise BankError(path, "a bank needs at least one expert, a generation of at least 1 and the base model's name")
    experts = {name: read_adapter(folder) for name, folder in adapters.items()}
    return place(path, Draft(base_id, fingerprint(base), experts, gates, routing or RoutingDefaults(), generation))


def check_new(path: Path, names: Iterable[str]) -> None:
    """Raises BankError when something is at ``path`` already or an expert may not be called so."""
    if path.exists():
        raise BankError(path, "exists already; remove it or write the bank elsewhere")
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
    gate_bytes = _serialise(path, draft)
    manifest = BankManifest(
        base_model=draft.base_id,
        base_fingerprint=draft.base_fingerprint,
        experts=tuple(
            describe(name, adapter, "prototype" if name in draft.prototypes else "trained")
            for name, adapter in draft.experts.items()
        ),
        gate_digest=hashlib.sha256(gate_bytes).hexdigest(),
        generation=draft.generation,
        routing=draft.routing,
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as workshop:
            folder = Path(workshop) / "bank"
            for name, adapter in draft.experts.items():
                _bring(adapter, folder / EXPERTS_FOLDER / name, name in draft.linked)
            (folder / GATES_FILE).write_bytes(gate_bytes)
            (folder / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
            bank = Bank.open(folder)
            os.rename(folder, path)
    except OSError as cause:
        raise BankError(path, f"cannot be written ({cause})") from cause
    return bank.moved_to(path)


def _serialise(path: Path, draft: Draft) -> bytes:
    gates = draft.gates
    check_shapes(path / GATES_FILE, {linear: tuple(gate.shape) for linear, gate in gates.items()}, draft.experts)
    for linear, gate_EH in gates.items():
        if gate_EH.dtype not in _GATE_DTYPES:
            raise BankError(path, f"the gate of {linear} is {gate_EH.dtype}; it must be float32, float16 or bfloat16")
        if not bool(torch.isfinite(gate_EH).all()):
            raise BankError(path, f"the gate of {linear} holds NaN or infinity")
    tensors = {linear: gates[linear].detach().cpu().clone().contiguous() for linear in model_order(gates)}
    digests = {name: adapter.digest for name, adapter in draft.experts.items()}
    return save(tensors, gates_metadata(digests, draft.prototypes))


def _bring(adapter: Adapter, folder: Path, link: bool) -> None:
    folder.mkdir(parents=True)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if link:
            with contextlib.suppress(OSError):
                os.link(adapter.path / file, folder / file)
                continue
        # Also where the file system has no hard links, or the place is on another one.
        shutil.copyfile(adapter.path / file, folder / file)
