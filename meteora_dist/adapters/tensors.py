"""Single tensors, or blocks of them, out of a safetensors file whose header was checked; the others are not read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from io import BufferedReader
from mmap import mmap
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from meteora_dist.adapters.header import Header, TensorInfo
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
    """A tensor of a file, or of a matrix some neighbouring rows and columns.

    Attributes:
        name: Of the tensor.
        rows: Of the matrix.
        columns: Of the matrix.
        transposed: Whether the block, a matrix, is to lie in memory column by column, so that its transpose is
            contiguous.
    """

    name: str
    rows: slice = slice(None)
    columns: slice = slice(None)
    transposed: bool = False


def read_tensors(path: Path, header: Header, names: Iterable[str], error: type[CheckpointError]) -> list[Tensor]:
    """Reads the named tensors whole, and no others, in the file's dtypes; see ``read_blocks``."""
    return read_blocks(path, header, [Block(name) for name in names], error)


def read_blocks(
    path: Path,
    header: Header,
    blocks: Iterable[Block],
    error: type[CheckpointError],
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Reads blocks of tensors, and no others, into CPU memory.

    Rows outside a block are not read; columns outside are, and dropped at once, so that memory holds the blocks and the
    rows of one of them. They are read to pages outside the heap, and from there to tensors allocated as they will stay:
    short-lived buffers between long-lived tensors leave holes, up to a fifth of a bank of small experts.

    Plain reads at the checked offsets: the safetensors library would parse the whole header again for every call, and
    its memory map kills the process when somebody truncates the file.

    Args:
        path: The safetensors file.
        header: What ``read_header`` found in it.
        blocks: Of tensors of ``header`` of a floating dtype.
        error: Raised when the file can no longer be read or has another header than it had.
        dtype: What the blocks become; None keeps the file's.

    Returns:
        The blocks in their order, contiguous, or transposed views of contiguous memory.
    """
    try:
        with path.open("rb") as file:
            if hashlib.sha256(file.read(header.data_start)).hexdigest() != header.digest:
                raise error(path, "has changed since it was checked")
            parts = [_part(header.tensors[block.name], block) for block in blocks]
            scratch = mmap(-1, max((part.nbytes for part in parts), default=0) or 1)
            return [_read(file, header.data_start, part, scratch, dtype) for part in parts]
    except _Short as cut:
        raise error(path, f"ends inside tensor {cut.args[0]!r}; it was longer when it was checked") from None
    except OSError as cause:
        raise error(path, f"cannot be read any more ({cause.strerror})") from cause


class _Short(Exception):
    """The file ends inside the tensor of this name."""


class _Part(NamedTuple):
    """The rows of a block: where they are among the data, and what they are."""

    block: Block
    begin: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def _part(info: TensorInfo, block: Block) -> _Part:
    begin, nbytes, shape = info.begin, info.end - info.begin, info.shape
    if block.rows != slice(None) and shape[0]:
        first, last, _ = block.rows.indices(shape[0])
        row_bytes = nbytes // shape[0]
        begin, nbytes, shape = begin + first * row_bytes, (last - first) * row_bytes, (last - first, *shape[1:])
    return _Part(block, begin, nbytes, shape, _DTYPES[info.dtype])


def _read(file: BufferedReader, data_start: int, part: _Part, scratch: mmap, dtype: torch.dtype | None) -> Tensor:
    file.seek(data_start + part.begin)
    if file.readinto(memoryview(scratch)[: part.nbytes]) < part.nbytes:
        raise _Short(part.block.name)
    count = part.nbytes // part.dtype.itemsize
    # torch refuses to look at no bytes at all.
    flat = torch.frombuffer(scratch, dtype=part.dtype, count=count) if count else torch.empty(0, dtype=part.dtype)
    whole = flat.reshape(part.shape)
    found = whole if whole.ndim < 2 else whole[:, part.block.columns]
    if part.block.transposed:
        return torch.empty(found.T.shape, dtype=dtype or part.dtype).copy_(found.T).T
    return torch.empty(found.shape, dtype=dtype or part.dtype).copy_(found)
