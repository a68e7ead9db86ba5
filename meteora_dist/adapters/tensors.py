"""Single tensors out of a safetensors file whose header was checked; the others are not read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

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


def read_tensors(path: Path, header: Header, names: Iterable[str], error: type[CheckpointError]) -> list[Tensor]:
    """Reads the named tensors, and no others, into CPU memory.

    Plain reads at the checked offsets: the safetensors library would parse the whole header again for every call, and
    its memory map kills the process when somebody truncates the file.

    Args:
        path: The safetensors file.
        header: What ``read_header`` found in it.
        names: Tensors of ``header`` of a floating dtype.
        error: Raised when the file can no longer be read or has another header than it had.

    Returns:
        The tensors in the order of ``names``, in the file's dtypes.
    """
    try:
        with path.open("rb") as file:
            if hashlib.sha256(file.read(header.data_start)).hexdigest() != header.digest:
                raise error(path, "has changed since it was checked")
            tensors = []
            for name in names:
                info = header.tensors[name]
                data = bytearray(info.end - info.begin)
                file.seek(header.data_start + info.begin)
                if file.readinto(data) < len(data):
                    raise error(path, f"ends inside tensor {name!r}; it was longer when it was checked")
                tensors.append(torch.frombuffer(data, dtype=_DTYPES[info.dtype]).reshape(info.shape))
    except OSError as cause:
        raise error(path, f"cannot be read any more ({cause.strerror})") from cause
    return tensors
