"""One LoRA adapter in PEFT's format, checked from its config and header; matrices are read one module at a time.

Shapes: R rank, H input features, O output features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from meteora_dist.adapters.files import read_json_object, sha256_file
from meteora_dist.adapters.header import Header, TensorInfo, read_header
from meteora_dist.adapters.peft_config import LoraSettings, parse_settings
from meteora_dist.adapters.tensors import Block, is_floating, read_blocks, read_into, torch_dtype
from meteora_dist.errors import AdapterError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_A_SUFFIX = ".lora_A.weight"
_B_SUFFIX = ".lora_B.weight"
_NAMED = 8


@dataclass(frozen=True, slots=True)
class LoraPair:
    """The matrices of one linear: ``delta_TO = scale * (x_TH a_RH^T) b_OR^T``."""

    a_RH: Tensor
    b_OR: Tensor
    scale: float


class PairCut(NamedTuple):
    """Which part of a pair to read: rows of A are ranks and its columns inputs, rows of B are outputs.

    Attributes:
        inputs: Columns of A.
        outputs: Rows of B.
        ranks_a: Rows of A.
        ranks_b: Columns of B.
    """

    inputs: slice = slice(None)
    outputs: slice = slice(None)
    ranks_a: slice = slice(None)
    ranks_b: slice = slice(None)


WHOLE = PairCut()


class PairPlace(NamedTuple):
    """Where a part of a pair belongs.

    Attributes:
        module: Of the pair.
        cut: The part.
        a_RH: Takes the part of A.
        b_RO: Takes the part of B, transposed.
    """

    module: str
    cut: PairCut
    a_RH: Tensor
    b_RO: Tensor


@dataclass(frozen=True, slots=True)
class LoraShape:
    """What is known of one linear's pair without reading it.

    Attributes:
        rank: R.
        in_features: H.
        out_features: O.
        scale: s.
        dtype: Of both matrices in the file; where they differ, the one that holds the numbers of both.
    """

    rank: int
    in_features: int
    out_features: int
    scale: float
    dtype: torch.dtype

    @property
    def parameters(self) -> int:
        """Numbers in both matrices."""
        return self.rank * (self.in_features + self.out_features)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter on disk, fully checked except for the values of its matrices.

    Attributes:
        path: Its folder.
        digest: sha256, in hex, of its config and its weights file.
        rank: r of its config; single modules may differ.
        alpha: lora_alpha of its config; single modules may differ.
        rslora: Whether scales are ``alpha / sqrt(rank)`` instead of ``alpha / rank``.
        shapes: By base-model module path, such as ``model.layers.0.self_attn.q_proj``.
        header: Of its weights file.
    """

    path: Path
    digest: str
    rank: int
    alpha: float
    rslora: bool
    shapes: Mapping[str, LoraShape]
    header: Header = field(repr=False)

    @property
    def parameters(self) -> int:
        """Numbers in its matrices."""
        return sum(shape.parameters for shape in self.shapes.values())

    def load(
        self,
        module: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = torch.float32,
        cut: PairCut = WHOLE,
    ) -> LoraPair:
        """Reads the pair of one linear, or a part of it.

        Args:
            module: A key of ``shapes``.
            device: Where the matrices go.
            dtype: What they become; None keeps the file's.
            cut: The part to read.

        Raises:
            AdapterError: When the adapter does not adapt ``module`` or its file can no longer be read.
        """
        if module not in self.shapes:
            raise AdapterError(self.path, f"does not adapt the module {module!r}")
        read = read_blocks(self.path / WEIGHTS_FILE, self.header, _blocks(module, cut), AdapterError, dtype)
        a_RH, b_OR = (tensor.to(device) for tensor in read)
        return LoraPair(a_RH, b_OR, self.shapes[module].scale)

    def read_into(self, places: Iterable[PairPlace]) -> None:
        """Reads parts of the pairs of several linears to where they belong, in one go.

        Raises:
            AdapterError: When its file can no longer be read.
        """
        targets = []
        for module, cut, a_RH, b_RO in places:
            block_a, block_b = _blocks(module, cut)
            targets += [(block_a, a_RH), (block_b, b_RO.T)]
        read_into(self.path / WEIGHTS_FILE, self.header, targets, AdapterError)

    def verify(self) -> None:
        """Hashes config and weights once more.

        Raises:
            AdapterError: When they are not those of the digest.
        """
        found = _digest(self.path / WEIGHTS_FILE, read_json_object(self.path / CONFIG_FILE, AdapterError))
        if found != self.digest:
            raise AdapterError(self.path, f"its digest is {found}; the bank it belongs to was made with {self.digest}")


class AdapterReader:
    """Reads adapters. Those with equal headers, as PEFT writes them for one base model, share what is known of them."""

    def __init__(self) -> None:
        """Knows nothing yet."""
        self._headers: dict[tuple[str, int], Header] = {}
        self._shapes: dict[tuple[str, str], Mapping[str, LoraShape]] = {}

    def read(self, folder: Path, digest: str | None = None) -> Adapter:
        """See ``read_adapter``.

        Args:
            folder: Of the adapter.
            digest: What its digest is taken to be, so that the weights are not hashed now: whoever reads them calls
                ``Adapter.verify`` first. None to hash them.
        """
        if not folder.is_dir():
            raise AdapterError(folder, "there is no such folder")
        weights = folder / WEIGHTS_FILE
        config = read_json_object(folder / CONFIG_FILE, AdapterError)
        settings = parse_settings(folder / CONFIG_FILE, config)
        if not weights.exists() and (folder / "adapter_model.bin").exists():
            raise AdapterError(
                folder, f"has adapter_model.bin, a pickle, which is never read; save it as {WEIGHTS_FILE}"
            )
        header = read_header(weights, known=self._headers)
        key = (header.digest, repr(settings))
        if key not in self._shapes:
            self._shapes[key] = _shapes(weights, header, settings)
        return Adapter(
            path=folder,
            digest=digest or _digest(weights, config),
            rank=settings.rank,
            alpha=settings.alpha,
            rslora=settings.rslora,
            shapes=self._shapes[key],
            header=header,
        )


def read_adapter(folder: Path) -> Adapter:
    """Reads and checks an adapter's config and the header of its weights; no matrix is read.

    Args:
        folder: Holds ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT writes them.

    Raises:
        AdapterError: When a file is missing or damaged, a field asks for something unsupported, or a tensor has no
            place in a plain LoRA adapter of that config.
    """
    return AdapterReader().read(folder)


def pair_names(module: str) -> tuple[str, str]:
    """Names that A and B of a linear have in a weights file."""
    return f"{_PREFIX}{module}{_A_SUFFIX}", f"{_PREFIX}{module}{_B_SUFFIX}"


def _blocks(module: str, cut: PairCut) -> tuple[Block, Block]:
    """Of A and of B."""
    name_a, name_b = pair_names(module)
    return Block(name_a, cut.ranks_a, cut.inputs), Block(name_b, cut.outputs, cut.ranks_b)


def _digest(weights: Path, config: Mapping[str, Any]) -> str:
    # The order of keys stays: it decides which of two matching rank patterns counts.
    text = json.dumps(config, separators=(",", ":"))
    return hashlib.sha256(f"{text}\n{sha256_file(weights, AdapterError)}".encode()).hexdigest()


def _shapes(path: Path, header: Header, settings: LoraSettings) -> dict[str, LoraShape]:
    a_infos = _modules(header, _A_SUFFIX)
    b_infos = _modules(header, _B_SUFFIX)
    used = {pair_names(module)[0] for module in a_infos} | {pair_names(module)[1] for module in b_infos}
    if foreign := [name for name in header.tensors if name not in used]:
        raise AdapterError(path, f"holds tensors that plain LoRA on linears has no place for: {_listed(foreign)}")
    if not used:
        raise AdapterError(path, "holds no tensors; it must hold a lora_A and a lora_B per adapted linear")
    for have, lack, missing in (
        ("lora_A", "lora_B", a_infos.keys() - b_infos),
        ("lora_B", "lora_A", b_infos.keys() - a_infos),
    ):
        if missing:
            raise AdapterError(path, f"has {have} but no {lack} for {_listed(sorted(missing))}")
    return {module: _shape(path, module, a_infos[module], b_infos[module], settings) for module in a_infos}


def _modules(header: Header, suffix: str) -> dict[str, TensorInfo]:
    start, stop = len(_PREFIX), -len(suffix)
    return {
        name[start:stop]: info
        for name, info in header.tensors.items()
        if name.startswith(_PREFIX) and name.endswith(suffix) and len(name) > start - stop
    }


def _shape(path: Path, module: str, a: TensorInfo, b: TensorInfo, settings: LoraSettings) -> LoraShape:
    for label, info in (("lora_A", a), ("lora_B", b)):
        if not is_floating(info.dtype):
            raise AdapterError(path, f"{label} of {module} is {info.dtype}; it must be F32, F16, BF16 or F64")
        if len(info.shape) != 2 or 0 in info.shape:
            raise AdapterError(
                path, f"{label} of {module} is {list(info.shape)}; it must be a matrix with no size zero"
            )
    rank = settings.rank_of(module)
    if a.shape[0] != rank:
        raise AdapterError(path, f"lora_A of {module} has rank {a.shape[0]}; {CONFIG_FILE} gives it rank {rank}")
    if b.shape[1] != rank:
        raise AdapterError(path, f"lora_B of {module} has rank {b.shape[1]}; {CONFIG_FILE} gives it rank {rank}")
    dtype = torch.promote_types(torch_dtype(a.dtype), torch_dtype(b.dtype))
    return LoraShape(rank, a.shape[1], b.shape[0], settings.scale_of(module), dtype)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(repr(name) for name in names[:_NAMED]) + more
