"""Writes a bank: complete at its place, or not there at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
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
    if path.exists():
        raise BankError(path, "exists already; remove it or write the bank elsewhere")
    for name in adapters:
        try:
            check_expert_name(name)
        except ValueError as cause:
            raise BankError(path, str(cause)) from cause
    if not adapters or generation < 1 or not base_id:
        raise BankError(path, "a bank needs at least one expert, a generation of at least 1 and the base model's name")
    experts = {name: read_adapter(folder) for name, folder in adapters.items()}
    gate_bytes = _serialise(path, gates, experts)
    manifest = BankManifest(
        base_model=base_id,
        base_fingerprint=fingerprint(base),
        experts=tuple(describe(name, adapter) for name, adapter in experts.items()),
        gate_digest=hashlib.sha256(gate_bytes).hexdigest(),
        generation=generation,
        routing=routing or RoutingDefaults(),
    )
    _place(path, manifest, experts, gate_bytes)
    return Bank.open(path)


def _serialise(path: Path, gates: Mapping[str, Tensor], experts: Mapping[str, Adapter]) -> bytes:
    check_shapes(path / GATES_FILE, {linear: tuple(gate.shape) for linear, gate in gates.items()}, experts)
    for linear, gate_EH in gates.items():
        if gate_EH.dtype not in _GATE_DTYPES:
            raise BankError(path, f"the gate of {linear} is {gate_EH.dtype}; it must be float32, float16 or bfloat16")
        if not bool(torch.isfinite(gate_EH).all()):
            raise BankError(path, f"the gate of {linear} holds NaN or infinity")
    tensors = {linear: gates[linear].detach().cpu().clone().contiguous() for linear in model_order(gates)}
    return save(tensors, gates_metadata({name: adapter.digest for name, adapter in experts.items()}))


def _place(path: Path, manifest: BankManifest, experts: Mapping[str, Adapter], gate_bytes: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as workshop:
            bank = Path(workshop) / "bank"
            for name, adapter in experts.items():
                folder = bank / EXPERTS_FOLDER / name
                folder.mkdir(parents=True)
                for file in (CONFIG_FILE, WEIGHTS_FILE):
                    shutil.copyfile(adapter.path / file, folder / file)
            (bank / GATES_FILE).write_bytes(gate_bytes)
            (bank / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
            os.rename(bank, path)
    except OSError as cause:
        raise BankError(path, f"cannot be written ({cause})") from cause
