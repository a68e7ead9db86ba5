"""A bank on disk: several LoRA experts of one base model and the gates that choose among them.

Shapes: E experts, H input features, O output features, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from meteora_dist.adapters import Adapter, AdapterReader, LoraPair
from meteora_dist.adapters.files import sha256_file
from meteora_dist.adapters.header import Header, read_header
from meteora_dist.adapters.tensors import Block, read_blocks
from meteora_dist.bank.fingerprint import fingerprint
from meteora_dist.bank.gates import GATES_FILE, check_dtypes, check_rows, check_shapes, model_order
from meteora_dist.bank.manifest import BankManifest, ExpertEntry, GateOrigin, RouterRow, read_manifest
from meteora_dist.bank.routers import ROUTERS_FILE, open_routers
from meteora_dist.errors import BankError

MANIFEST_FILE = "bank.json"
EXPERTS_FOLDER = "experts"


@dataclass(frozen=True, slots=True)
class Bank:
    """An opened bank: consistent with its digests and in itself; matrices are read when they are asked for.

    Attributes:
        path: Its folder.
        manifest: Its bank.json.
        adapters: In expert order.
        linears: Base-model module paths of the linears that at least one expert adapts, in model order.
        gate_header: Of gates.safetensors: one [E, H] tensor for each of ``linears``.
        router_header: Of routers.safetensors: one [E, H] tensor for each decoder layer; None without routers.
    """

    path: Path
    manifest: BankManifest
    adapters: tuple[Adapter, ...]
    linears: tuple[str, ...]
    gate_header: Header = field(repr=False)
    router_header: Header | None = field(default=None, repr=False)

    @classmethod
    def open(cls, path: Path, hashing: bool = True) -> Bank:
        """Opens and checks a bank: every file is hashed once, no tensor is loaded.

        Args:
            path: The bank's folder.
            hashing: Whether the experts' weights are hashed as well. Without, each adapter is taken for the one
                bank.json lists, and whoever reads its matrices calls ``Adapter.verify`` first.

        Raises:
            BankError: When bank.json or the gates are damaged or do not belong to the experts.
            AdapterError: When an expert is damaged or asks for something unsupported.
        """
        if not path.is_dir():
            raise BankError(path, "there is no such folder")
        manifest = read_manifest(path / MANIFEST_FILE)
        experts = _open_experts(path, manifest, hashing)
        header = open_gates(path, manifest, experts)
        routers = open_routers(path, manifest)
        return cls(path, manifest, tuple(experts.values()), model_order(header.tensors), header, routers)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the E experts, in the order of the gates' rows."""
        return tuple(expert.name for expert in self.manifest.experts)

    @property
    def digests(self) -> tuple[str, ...]:
        """Digests of the E experts' adapters, in the order of the gates' rows."""
        return tuple(expert.digest for expert in self.manifest.experts)

    @property
    def prototypes(self) -> tuple[bool, ...]:
        """For each expert, whether its gate rows are prototypes, which score an input x by |g . x|."""
        return tuple(expert.gate == "prototype" for expert in self.manifest.experts)

    @property
    def router_layers(self) -> tuple[str, ...]:
        """Paths of the decoder layers that have a router, in model order; empty for a bank without routers."""
        return () if self.router_header is None else model_order(self.router_header.tensors)

    def routers(self) -> Tensor:
        """Reads the routers of all layers: [L, E, H], fp32, on the CPU; an expert without rows has zeros.

        Raises:
            BankError: The bank has none, or the file can no longer be read.
        """
        if self.router_header is None:
            raise BankError(self.path, "has no routers")
        blocks = [Block(layer) for layer in self.router_layers]
        path = self.path / ROUTERS_FILE
        return torch.stack(read_blocks(path, self.router_header, blocks, BankError, torch.float32))

    def gate(self, linear: str, inputs: slice = slice(None)) -> Tensor:
        """Reads the gate of ``linear``, or the columns ``inputs`` of it: [E, H], fp32, on the CPU.

        Raises:
            BankError: When no expert adapts ``linear`` or the file can no longer be read.
        """
        self._check_linear(linear)
        block = Block(linear, columns=inputs)
        return read_blocks(self.path / GATES_FILE, self.gate_header, [block], BankError, torch.float32)[0]

    def pair(
        self,
        linear: str,
        expert: int,
        dtype: torch.dtype | None = torch.float32,
        device: torch.device | str = "cpu",
    ) -> LoraPair | None:
        """Reads the matrices of one expert at one linear, and nothing of the other experts.

        Args:
            linear: One of ``linears``.
            expert: Index into ``names``.
            dtype: What the matrices become; None keeps the file's.
            device: Where they go.

        Returns:
            a_RH, b_OR and their scale, or None when the expert does not adapt this linear.

        Raises:
            BankError: When no expert adapts ``linear``.
            AdapterError: When the expert's file can no longer be read.
        """
        self._check_linear(linear)
        adapter = self.adapters[expert]
        return adapter.load(linear, device, dtype) if linear in adapter.shapes else None

    def moved_to(self, path: Path) -> Bank:
        """This bank after its folder was moved to ``path``."""
        adapters = tuple(
            replace(adapter, path=path / EXPERTS_FOLDER / name)
            for name, adapter in zip(self.names, self.adapters, strict=True)
        )
        return replace(self, path=path, adapters=adapters)

    def check_base(self, model_folder: Path) -> None:
        """Checks that ``model_folder`` holds the base model the bank was made for.

        Raises:
            BankError: When it is another one; names both fingerprints.
            ModelError: When its files are missing or damaged.
        """
        found = fingerprint(model_folder)
        if found != self.manifest.base_fingerprint:
            raise BankError(
                self.path,
                f"was made for the base model {self.manifest.base_model} with fingerprint "
                f"{self.manifest.base_fingerprint}; {model_folder} has fingerprint {found}",
            )

    def _check_linear(self, linear: str) -> None:
        if linear not in self.gate_header.tensors:
            raise BankError(self.path, f"no expert adapts the linear {linear!r}")


def describe(name: str, adapter: Adapter, gate: GateOrigin = "trained", router: RouterRow = "none") -> ExpertEntry:
    """The entry of bank.json for ``adapter`` under ``name``, with gate rows from ``gate`` and these router rows."""
    return ExpertEntry(
        name=name,
        digest=adapter.digest,
        rank=adapter.rank,
        alpha=adapter.alpha,
        rslora=adapter.rslora,
        targets=tuple(sorted({linear.rpartition(".")[2] for linear in adapter.shapes})),
        gate=gate,
        router=router,
    )


def open_gates(path: Path, manifest: BankManifest, experts: Mapping[str, Adapter]) -> Header:
    """Checks the gates of a bank against bank.json and the experts' adapters, in order; returns their header.

    Raises:
        BankError: The file is damaged, or does not belong to these experts.
    """
    gates = path / GATES_FILE
    header = read_header(gates, BankError)
    digests = {entry.name: entry.digest for entry in manifest.experts}
    check_rows(gates, header, digests, [entry.name for entry in manifest.experts if entry.gate == "prototype"])
    check_dtypes(gates, header)
    check_shapes(gates, {name: info.shape for name, info in header.tensors.items()}, experts)
    digest = sha256_file(gates, BankError)
    if digest != manifest.gate_digest:
        raise BankError(gates, f"its sha256 is {digest}; bank.json gives gate_digest {manifest.gate_digest}")
    return header


def open_expert(
    path: Path, manifest: BankManifest, entry: ExpertEntry, reader: AdapterReader, hashing: bool = True
) -> Adapter:
    """Checks the adapter of one expert against its entry of bank.json; arguments as for ``Bank.open``.

    Raises:
        BankError: It is not the adapter that bank.json lists.
        AdapterError: It is damaged or asks for something unsupported.
    """
    folder = path / EXPERTS_FOLDER / entry.name
    adapter = reader.read(folder, None if hashing else entry.digest)
    if adapter.digest != entry.digest:
        owner = next((other.name for other in manifest.experts if other.digest == adapter.digest), None)
        whose = f" (it is the adapter bank.json lists as {owner})" if owner else ""
        raise BankError(
            folder, f"the adapter's digest is {adapter.digest}{whose}; bank.json gives {entry.name} {entry.digest}"
        )
    found = describe(entry.name, adapter, entry.gate, entry.router)
    if found != entry:
        differing = [field for field in ExpertEntry.model_fields if getattr(found, field) != getattr(entry, field)]
        raise BankError(
            path / MANIFEST_FILE,
            f"gives expert {entry.name} "
            + ", ".join(
                f"{field} {getattr(entry, field)}; its adapter has {getattr(found, field)}" for field in differing
            ),
        )
    return adapter


def _open_experts(path: Path, manifest: BankManifest, hashing: bool) -> dict[str, Adapter]:
    reader = AdapterReader()
    return {entry.name: open_expert(path, manifest, entry, reader, hashing) for entry in manifest.experts}
