"""The header of a safetensors file, checked completely before any data is read.

Layout of the file: 8 bytes little-endian length N, N bytes of JSON, then the data. The JSON maps every tensor to its
dtype, shape and byte range in the data; the ranges must cover the data exactly, without gap or overlap.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meteora_dist.adapters.files import parse_json_object
from meteora_dist.errors import AdapterError, CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

_MAX_DIMENSIONS = 16
_MAX_BYTES = 2**63 - 1

_DTYPE_BITS: Mapping[str, int] = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}

_FOREIGN_STARTS: Mapping[bytes, str] = {
    b"PK\x03\x04": "a PyTorch archive (pickle), which is never read",
    b"\x80\x02": "a pickle, which is never read",
    b"\x80\x03": "a pickle, which is never read",
    b"\x80\x04": "a pickle, which is never read",
    b"\x80\x05": "a pickle, which is never read",
    b"GGUF": "a GGUF file",
    b"version ": "a Git LFS pointer (`git lfs pull` fetches the file)",
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a safetensors file.

    Attributes:
        dtype: As the format spells it: ``F32``, ``BF16``, ...
        shape: Sizes of its dimensions.
        begin: First byte, counted from the start of the data.
        end: One past the last byte, counted from the start of the data.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says it holds; consistent with itself and with the file's size.

    Attributes:
        tensors: By name, in the order of the file.
        metadata: Free text of the writer.
        data_start: Bytes before the data.
        digest: sha256, in hex, of those bytes.
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int
    digest: str


def read_header(
    path: Path,
    error: type[CheckpointError] = AdapterError,
    known: MutableMapping[tuple[str, int], Header] | None = None,
) -> Header:
    """Reads and checks the header of the safetensors file ``path``; reads no tensor data.

    Args:
        path: The file.
        error: Raised, with the reason, when the file is missing, truncated, no safetensors file or inconsistent.
        known: Headers that were found to be right, by their digest and the size of their file. One of them is returned
            when the file has the same; a new one is added.
    """
    try:
        if not path.is_file():
            raise error(path, "there is no such file")
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            start = file.read(8)
            length = _header_length(start, size, path, error)
            text = file.read(length)
    except OSError as cause:
        raise error(path, f"cannot be read ({cause.strerror})") from cause
    if not text.startswith(b"{"):
        raise error(path, "not a safetensors file: its header does not start with '{'")
    digest = hashlib.sha256(start + text).hexdigest()
    if known is not None and (header := known.get((digest, size))):
        return header
    fields = parse_json_object(text, path, "not a safetensors file: its header", error)
    metadata = _metadata(fields.pop("__metadata__", None), path, error)
    tensors = {name: _tensor_info(name, entry, path, error) for name, entry in fields.items()}
    _check_ranges(tensors, size - 8 - length, path, error)
    header = Header(tensors, metadata, data_start=8 + length, digest=digest)
    if known is not None:
        known[digest, size] = header
    return header


def _header_length(start: bytes, size: int, path: Path, error: type[CheckpointError]) -> int:
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > MAX_HEADER_BYTES:
        # Only here: the length of a real header may begin with the same bytes.
        what = next((f" but {what}" for prefix, what in _FOREIGN_STARTS.items() if start.startswith(prefix)), "")
        short = f"it has {size} bytes, fewer than the 8 of the header's length"
        long = f"its first 8 bytes announce a header of {length} bytes, over {MAX_HEADER_BYTES}"
        raise error(path, f"not a safetensors file{what}: {short if len(start) < 8 else long}")
    if 8 + length > size:
        raise error(path, f"truncated: the header needs {8 + length} bytes, the file has {size}")
    return length


def _metadata(value: Any, path: Path, error: type[CheckpointError]) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise error(path, "__metadata__ of the header must map text to text")
    return value


def _tensor_info(name: str, entry: Any, path: Path, error: type[CheckpointError]) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise error(path, f"tensor {name!r} must have dtype, shape and data_offsets, nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise error(path, f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not _sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise error(path, f"tensor {name!r} has no valid shape (up to {_MAX_DIMENSIONS} sizes, none negative)")
    if not _sizes(offsets) or len(offsets) != 2:
        raise error(path, f"tensor {name!r} has no valid data_offsets [begin, end]")
    begin, end = offsets
    bits = math.prod(shape) * _DTYPE_BITS[dtype]
    if (end - begin) * 8 != bits:
        raise error(
            path,
            f"tensor {name!r} is {dtype} {shape}, which takes {bits // 8} bytes, but its "
            f"data_offsets {offsets} hold {end - begin}",
        )
    return TensorInfo(dtype, tuple(shape), begin, end)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= _MAX_BYTES for size in value)


def _check_ranges(tensors: Mapping[str, TensorInfo], data_bytes: int, path: Path, error: type[CheckpointError]) -> None:
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            fault = "overlaps the tensor before it" if info.begin < position else "leaves a gap before it"
            raise error(path, f"tensor {name!r} starts at byte {info.begin} instead of {position}: it {fault}")
        position = info.end
    if position > data_bytes:
        raise error(path, f"truncated: the tensors need {position} bytes of data, the file has {data_bytes}")
    if position < data_bytes:
        raise error(path, f"{data_bytes - position} bytes at its end belong to no tensor")
