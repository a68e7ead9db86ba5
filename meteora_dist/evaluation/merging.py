"""Merged adapters, made by PEFT's own ``add_weighted_adapter`` and saved in its format.

PEFT gives a merged adapter the config of the first one, rsLoRA included, and merges A and B of one rank only. So
adapters are first written anew with one rank, scale 1 and no rsLoRA: rows and columns of zeros fill up the rank, and
the square root of the old scale goes into either matrix. That leaves every delta what it was, and every merge what PEFT
makes of the originals where it takes them.

TIES and DARE run on the deltas (PEFT's ``*_svd``), not on A and B apart: filling up with zeros would change which
entries TIES keeps, and signs of A's and B's entries mean nothing alone. The result is cut to ``rank`` by an SVD.

Shapes: R rank, H input features, O output features.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from meteora_dist.adapters import Adapter
from meteora_dist.adapters.adapter import CONFIG_FILE, WEIGHTS_FILE
from meteora_dist.model.load import load_base

MergeKind = Literal["linear", "ties", "dare-ties"]

_PEFT_KINDS = {"linear": "linear", "ties": "ties_svd", "dare-ties": "dare_ties_svd"}


@dataclass(frozen=True, slots=True)
class MergeRecipe:
    """How adapters are merged.

    Attributes:
        kind: Which merge. ``linear`` weighs each of n adapters by 1/n; TIES takes the mean of those that agree.
        density: Share of entries that TIES (the largest) and DARE (at random) keep.
        rank: Of what TIES and DARE leave.
        seed: Of DARE.
    """

    kind: MergeKind
    density: float = 0.2
    rank: int = 64
    seed: int = 0

    def identity(self) -> dict[str, object]:
        """All that the result depends on, beside the adapters."""
        return {"kind": self.kind} if self.kind == "linear" else asdict(self)


def merge(base: Path, adapters: Mapping[str, Adapter], recipe: MergeRecipe, folder: Path) -> Path:
    """Merges adapters of one base model and writes the result, whole or not at all, to ``folder``.

    Args:
        base: Folder of the base model's checkpoint.
        adapters: By name; order counts for DARE's draws only.
        recipe: How.
        folder: Nothing may be there yet.
    """
    from peft import PeftModel

    rank = max(shape.rank for adapter in adapters.values() for shape in adapter.shapes.values())
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as workshop:
        # PEFT makes modules of these names, and an expert's name may hold dots.
        homes = {
            f"expert{index}": write_uniform(adapter, Path(workshop) / f"expert{index}", rank)
            for index, adapter in enumerate(adapters.values())
        }
        (first, first_home), *others = homes.items()
        model = PeftModel.from_pretrained(load_base(base, torch.float32), first_home, adapter_name=first)
        for name, home in others:
            model.load_adapter(home, adapter_name=name)
        weight = 1 / len(homes) if recipe.kind == "linear" else 1.0
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(recipe.seed)
            model.add_weighted_adapter(
                list(homes),
                [weight] * len(homes),
                "merged",
                combination_type=_PEFT_KINDS[recipe.kind],
                svd_rank=recipe.rank,
                svd_full_matrices=False,
                density=recipe.density,
            )
        model.save_pretrained(workshop, selected_adapters=["merged"])
        shutil.move(Path(workshop) / "merged", folder)
    return folder


def write_uniform(adapter: Adapter, folder: Path, rank: int) -> Path:
    """Writes the same deltas as an adapter of rank ``rank`` at every linear, with scale 1, in fp32.

    Args:
        adapter: None of its ranks may be above ``rank``.
        folder: Where it goes.
        rank: Of the result.
    """
    folder.mkdir(parents=True)
    source = json.loads((adapter.path / CONFIG_FILE).read_text(encoding="utf-8"))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source.get("base_model_name_or_path"),
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(adapter.shapes),
        "inference_mode": True,
    }
    tensors: dict[str, Tensor] = {}
    for module in adapter.shapes:
        pair = adapter.load(module)
        root, missing = abs(pair.scale) ** 0.5, rank - pair.a_RH.shape[0]
        sign = -1.0 if pair.scale < 0 else 1.0
        tensors[f"base_model.model.{module}.lora_A.weight"] = pad(pair.a_RH * root, (0, 0, 0, missing)).contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = pad(pair.b_OR * sign * root, (0, missing)).contiguous()
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
    return folder
