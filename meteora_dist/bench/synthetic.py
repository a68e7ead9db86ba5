"""Banks of any size for measurements: random experts for a real base model.

Shapes: E experts, H input features, O output features, R rank.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from meteora_dist.adapters import AdapterReader
from meteora_dist.adapters.adapter import CONFIG_FILE, WEIGHTS_FILE
from meteora_dist.bank import Bank, RoutingDefaults, fingerprint
from meteora_dist.bank.write import Draft, place
from meteora_dist.planning.known import shape_of
from meteora_dist.planning.shapes import LinearShape

WEIGHT_FILES = 4
"""Different weight files behind all experts of a bank."""


def write_synthetic_bank(path: Path, base: Path, experts: int, rank: int) -> Bank:
    """Writes a bank of random experts that adapt all seven linears of every layer, and opens it.

    Every expert has a config, a digest and so a slot of its own, but its weights are a hard link to one of
    ``WEIGHT_FILES`` files, bfloat16: a bank of any size costs the disk little. In memory no expert shares anything with
    another.

    Args:
        path: Where it goes; nothing may be there yet. ``path`` with ``.parts`` added holds what is linked.
        base: Folder of the base model's checkpoint.
        experts: E.
        rank: R of each.
    """
    generator = torch.Generator().manual_seed(0)
    linears = list(_linears(base))
    parts = path.with_name(path.name + ".parts")
    weights = [parts / f"weights-{index}.safetensors" for index in range(min(WEIGHT_FILES, experts))]
    parts.mkdir(parents=True)
    for file in weights:
        save_file(dict(_adapter(linears, rank, generator)), file)
    folders = {f"expert-{index}": parts / f"expert-{index}" for index in range(experts)}
    for index, folder in enumerate(folders.values()):
        folder.mkdir()
        os.link(weights[index % len(weights)], folder / WEIGHTS_FILE)
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "revision": folder.name}
        (folder / CONFIG_FILE).write_text(json.dumps(config))
    reader = AdapterReader()
    draft = Draft(
        base_id="synthetic",
        base_fingerprint=fingerprint(base),
        experts={name: reader.read(folder) for name, folder in folders.items()},
        gates={name: _random((experts, linear.in_features), generator) for name, linear in linears},
        routing=RoutingDefaults(),
        generation=1,
        linked=frozenset(folders),
    )
    return place(path, draft)


def _linears(base: Path) -> Iterator[tuple[str, LinearShape]]:
    """(module path, shape) of every linear of a layer, in model order."""
    shape = shape_of(str(base))
    for layer in range(shape.layers):
        for block, groups in (("self_attn", shape.groups[:2]), ("mlp", shape.groups[2:])):
            for linear in (linear for group in groups for linear in group):
                yield f"model.layers.{layer}.{block}.{linear.name}", linear


def _adapter(
    linears: list[tuple[str, LinearShape]], rank: int, generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    for name, linear in linears:
        yield f"base_model.model.{name}.lora_A.weight", _random((rank, linear.in_features), generator)
        yield f"base_model.model.{name}.lora_B.weight", _random((linear.out_features, rank), generator)


def _random(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    return (0.02 * torch.randn(size, generator=generator)).to(torch.bfloat16)
