"""The weights of a checkpoint, read tensor by tensor, and of each no more than is asked for.

transformers would map the files into memory: what a rank reads of them counts as its own until the last tensor is
made, whole rows of weights that are split by columns included, and half precision stays a view of the map for good. A
file that somebody truncates then kills the process.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType

import torch
from torch import Tensor

from meteora_dist.adapters.header import Header, read_header
from meteora_dist.adapters.tensors import Block, is_floating, read_blocks, torch_dtype
from meteora_dist.bank.fingerprint import weight_files
from meteora_dist.errors import ModelError


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that is read when it is indexed: to transformers, a slice of a safetensors file.

    Attributes:
        path: The file.
        header: Of the file.
        name: Of the tensor.
        dtype: What it is read as, unless that would lose precision: transformers' copy of a wider tensor would leave
            holes in the heap.
    """

    path: Path
    header: Header
    name: str
    dtype: torch.dtype

    def get_shape(self) -> list[int]:
        """Its sizes."""
        return list(self.header.tensors[self.name].shape)

    def __getitem__(self, index: EllipsisType | tuple[slice, ...]) -> Tensor:
        """Reads the whole of it, or the slices that are given of its first dimensions; contiguous.

        Raises:
            ModelError: It is not floating-point, or the file can no longer be read.
        """
        info = self.header.tensors[self.name]
        if not is_floating(info.dtype):
            raise ModelError(self.path, f"tensor {self.name} is {info.dtype}; weights must be F32, F16, BF16 or F64")
        cuts = () if isinstance(index, EllipsisType) else index
        dtype = torch.promote_types(torch_dtype(info.dtype), self.dtype)
        (found,) = read_blocks(self.path, self.header, [Block(self.name, *cuts[:2])], ModelError, dtype)
        return found[:, :, *cuts[2:]].contiguous() if cuts[2:] else found


def stored_tensors(folder: Path, dtype: torch.dtype) -> dict[str, StoredTensor]:
    """All tensors of the checkpoint in ``folder``, to become ``dtype``; none of them is read.

    Raises:
        ModelError: A file is missing or damaged.
    """
    headers = {path: read_header(path, ModelError) for path in weight_files(folder)}
    return {
        name: StoredTensor(path, header, name, dtype) for path, header in headers.items() for name in header.tensors
    }
