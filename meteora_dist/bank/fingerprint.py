"""Tells base models apart, cheaply: by their architecture's numbers and the first bytes of every tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from meteora_dist.adapters.files import read_json_object
from meteora_dist.adapters.header import read_header
from meteora_dist.errors import ModelError

_SAMPLE_BYTES = 1024
_NUMBERS = (
    *("hidden_size", "intermediate_size", "vocab_size"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
)


def fingerprint(model_folder: Path) -> str:
    """sha256, in hex, that differs between base models and not between copies of one.

    It covers model type and architecture numbers of ``config.json``, and of every tensor, sorted by name, its name,
    dtype, shape and first 1 KiB. Reads little: about 0.1 s whatever the model's size.

    Args:
        model_folder: A checkpoint: config.json and model.safetensors, or shards with their index.

    Raises:
        ModelError: When a file is missing or damaged.
    """
    config = read_json_object(model_folder / "config.json", ModelError)
    # rope_theta has moved between versions of the library that writes the file.
    rope = config.get("rope_parameters") or config
    numbers = {name: config.get(name) for name in ("model_type", *_NUMBERS)}
    numbers["rope_theta"] = rope.get("rope_theta") if isinstance(rope, dict) else None
    digest = hashlib.sha256(json.dumps(numbers, sort_keys=True).encode())
    for line in sorted(line for shard in weight_files(model_folder) for line in _tensor_lines(shard)):
        digest.update(line.encode())
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: model.safetensors, or those its index names.

    Raises:
        ModelError: The index is damaged, or names a file elsewhere.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    weight_map = read_json_object(index, ModelError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(index, "lacks the map weight_map from tensors to files")
    names = sorted({str(name) for name in weight_map.values()})
    if strange := [name for name in names if Path(name).name != name]:
        raise ModelError(index, f"names the shard {strange[0]!r}, which is not a file beside it")
    return [folder / name for name in names]


def _tensor_lines(path: Path) -> Iterator[str]:
    header = read_header(path, ModelError)
    try:
        with path.open("rb") as file:
            for name, info in header.tensors.items():
                file.seek(header.data_start + info.begin)
                sample = file.read(min(_SAMPLE_BYTES, info.end - info.begin))
                yield json.dumps([name, info.dtype, info.shape, hashlib.sha256(sample).hexdigest()])
    except OSError as cause:
        raise ModelError(path, f"cannot be read ({cause.strerror})") from cause
