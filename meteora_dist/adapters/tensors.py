"""Single tensors, or blocks of them, out of a safetensors file whose header was checked; the others are not read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
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


SCRATCH_BYTES = 2**20
"""What is read at a time; a longer row is read whole."""


def is_floating(dtype: str) -> bool:
    """Whether the safetensors dtype ``dtype`` is one that weights may have: F64, F32, F16 or BF16."""
    return dtype in _DTYPES


def torch_dtype(dtype: str) -> torch.dtype:
    """The torch type of a floating safetensors dtype."""
    return _DTYPES[dtype]


class Block(NamedTuple):
    """A tensor of a file, or of a matrix some neighbouring rows and columns.

    Attributes:
        name: Of the tensor.
        rows: Of the matrix.
        columns: Of the matrix.
    """

    name: str
    rows: slice = slice(None)
    columns: slice = slice(None)


def read_tensors(path: Path, header: Header, names: Iterable[str], error: type[CheckpointError]) -> list[Tensor]:
    """Reads the named tensors whole, and no others, in the file's dtypes; see ``read_into``."""
    return read_blocks(path, header, [Block(name) for name in names], error)


def read_blocks(
    path: Path,
    header: Header,
    blocks: Iterable[Block],
    error: type[CheckpointError],
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Reads blocks into new contiguous CPU tensors of ``dtype``, None for the file's; see ``read_into``."""
    targets = [(block, _room(header.tensors[block.name], block, dtype)) for block in blocks]
    read_into(path, header, targets, error)
    return [tensor for _, tensor in targets]


def read_into(
    path: Path, header: Header, targets: Iterable[tuple[Block, Tensor]], error: type[CheckpointError]
) -> None:
    """Reads blocks of tensors, and no others, to where they belong.

    Rows outside a block are not read; columns outside are, and dropped at once, so that memory holds no more than the
    targets and ``SCRATCH_BYTES``, or a single row. They are read to pages outside the heap: short-lived buffers between
    long-lived tensors leave holes, up to a fifth of a bank of small experts.

    Plain reads at the checked offsets: the safetensors library would parse the whole header again for every call, and
    its memory map kills the process when somebody truncates the file.

    Args:
        path: The safetensors file.
        header: What ``read_header`` found in it.
        targets: Blocks of tensors of ``header`` of a floating dtype, each with the tensor it goes to: of its shape, of
            any floating dtype, layout and device.
        error: Raised when the file can no longer be read or has another header than it had; targets may then hold
            anything.
    """
    targets = list(targets)
    try:
        with path.open("rb", buffering=0) as file:
            if hashlib.sha256(file.read(header.data_start)).hexdigest() != header.digest:
                raise error(path, "has changed since it was checked")
            largest = max((_row_bytes(header.tensors[block.name]) for block, _ in targets), default=0)
            scratch = memoryview(mmap(-1, max(SCRATCH_BYTES, largest)))
            for block, target in targets:
                _fill(file.fileno(), header, block, target, scratch)
    except _Short as cut:
        raise error(path, f"ends inside tensor {cut.args[0]!r}; it was longer when it was checked") from None
    except OSError as cause:
        raise error(path, f"cannot be read any more ({cause.strerror})") from cause


class _Short(Exception):
    """The file ends inside the tensor of this name."""


def _room(info: TensorInfo, block: Block, dtype: torch.dtype | None) -> Tensor:
    cuts = (block.rows, block.columns, *[slice(None)] * len(info.shape))
    shape = [len(range(size)[cut]) for size, cut in zip(info.shape, cuts, strict=False)]
    return torch.empty(shape, dtype=dtype or _DTYPES[info.dtype])


def _row_bytes(info: TensorInfo) -> int:
    """Bytes of a row, that is of all that has the same first index."""
    rows = info.shape[0] if info.shape else 1
    return (info.end - info.begin) // rows if rows else 0


def _fill(file: int, header: Header, block: Block, target: Tensor, scratch: memoryview) -> None:
    info = header.tensors[block.name]
    dtype, row_bytes = _DTYPES[info.dtype], _row_bytes(info)
    wanted = range(info.shape[0] if info.shape else 1)[block.rows]
    if not row_bytes or not wanted:
        return
    at_once = max(1, len(scratch) // row_bytes)
    for first in range(wanted.start, wanted.stop, at_once):
        rows = min(at_once, wanted.stop - first)
        nbytes = rows * row_bytes
        if os.preadv(file, [scratch[:nbytes]], header.data_start + info.begin + first * row_bytes) < nbytes:
            raise _Short(block.name)
        found = torch.frombuffer(scratch, dtype=dtype, count=nbytes // dtype.itemsize)
        if len(info.shape) > 1:
            found = found.view(rows, *info.shape[1:])[:, block.columns]
        place = target if info.shape else target.reshape(1)
        (place if rows == len(wanted) else place[first - wanted.start :][:rows]).copy_(found)
