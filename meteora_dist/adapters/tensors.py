"""Single tensors, or blocks of them, out of a safetensors file whose header was checked; the others are not read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from meteora_dist.adapters.header import Header
from meteora_dist.errors import CheckpointError

_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def is_floating(dtype: str) -> bool:
    """Whether the safetensors dtype ``dtype`` is one that weights may have: F64, F32, F16 or BF16."""
    return dtype in _DTYPES


class Block(NamedTuple):
    """A tensor of a file, or of a matrix some neighbouring rows and columns."""

    name: str
    rows: slice = slice(None)
    columns: slice = slice(None)


def read_tensors(path: Path, header: Header, names: Iterable[str], error: type[CheckpointError]) -> list[Tensor]:
    """Reads the named tensors whole, and no others; see ``read_blocks``."""
    return read_blocks(path, header, [Block(name) for name in names], error)


def read_blocks(path: Path, header: Header, blocks: Iterable[Block], error: type[CheckpointError]) -> list[Tensor]:
    """Reads blocks of tensors, and no others, into CPU memory.

    Rows outside a block are not read; columns outside are, and dropped at once, so that memory holds the blocks and the
    rows of one of them.

    Plain reads at the checked offsets: the safetensors library would parse the whole header again for every call, and
    its memory map kills the process when somebody truncates the file.

    Args:
        path: The safetensors file.
        header: What ``read_header`` found in it.
        blocks: Of tensors of ``header`` of a floating dtype.
        error: Raised when the file can no longer be read or has another header than it had.

    Returns:
        The blocks in their order, in the file's dtypes, contiguous.
    """
    try:
        with path.open("rb") as file:
            if hashlib.sha256(file.read(header.data_start)).hexdigest() != header.digest:
                raise error(path, "has changed since it was checked")
            return [_read(file, path, header, block, error) for block in blocks]
    except OSError as cause:
        raise error(path, f"cannot be read any more ({cause.strerror})") from cause


def _read(file: BufferedReader, path: Path, header: Header, block: Block, error: type[CheckpointError]) -> Tensor:
    info = header.tensors[block.name]
    begin, end, shape = info.begin, info.end, info.shape
    if block.rows != slice(None):
        first, last, _ = block.rows.indices(shape[0])
        row_bytes = (end - begin) // shape[0] if shape[0] else 0
        begin, end, shape = begin + first * row_bytes, begin + last * row_bytes, (last - first, *shape[1:])
    data = bytearray(end - begin)
    file.seek(header.data_start + begin)
    if file.readinto(data) < len(data):
        raise error(path, f"ends inside tensor {block.name!r}; it was longer when it was checked")
    if not data:
        return torch.empty(shape, dtype=_DTYPES[info.dtype])[..., block.columns]
    tensor = torch.frombuffer(data, dtype=_DTYPES[info.dtype]).reshape(shape)
    every = tensor.ndim < 2 or block.columns.indices(tensor.shape[1]) == (0, tensor.shape[1], 1)
    return tensor if every else tensor[:, block.columns].clone()
