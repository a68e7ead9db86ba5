"""Single tensors out of a safetensors file; the others are not read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from meteora_dist.errors import CheckpointError


def read_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]], error: type[CheckpointError]) -> list[Tensor]:
    """Reads the named tensors, and no others, into CPU memory.

    Args:
        path: The safetensors file, its header checked before.
        shapes: What to read, and the shape it had when the header was checked.
        error: Raised when the file can no longer be read or has changed shape.

    Returns:
        The tensors in the order of ``shapes``, in the file's dtypes.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = [file.get_tensor(name) for name in shapes]
    except (OSError, SafetensorError) as cause:
        raise error(path, f"cannot be read any more ({cause})") from cause
    for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
        if tuple(tensor.shape) != shape:
            raise error(
                path, f"tensor {name!r} changed from {list(shape)} to {list(tensor.shape)} since it was checked"
            )
    return tensors


def is_floating(dtype: str) -> bool:
    """Whether the safetensors dtype ``dtype`` is one that weights may have: F64, F32, F16 or BF16."""
    return dtype in ("F64", "F32", "F16", "BF16")
