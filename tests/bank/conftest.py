"""One tiny base model and three adapters that differ in every way, made once for the folder."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from meteora_dist.adapters import read_adapter
from meteora_dist.bank import Bank, write_bank
from tests.adapters.builders import peft_adapter, tiny_llama

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Parts(NamedTuple):
    """What a bank is made of."""

    base: Path
    adapters: dict[str, Path]
    gates: dict[str, Tensor]

    def write(self, path: Path) -> Bank:
        return write_bank(path, self.base, "tiny/llama", self.adapters, self.gates)


def random_gates(adapters: dict[str, Path], seed: int = 0) -> dict[str, Tensor]:
    """A gate for every linear any adapter targets, in no particular order."""
    torch.manual_seed(seed)
    widths = {
        name: shape.in_features for path in adapters.values() for name, shape in read_adapter(path).shapes.items()
    }
    return {linear: torch.randn(len(adapters), width) for linear, width in sorted(widths.items(), reverse=True)}


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    folder = tmp_path_factory.mktemp("parts")
    tiny_llama().save_pretrained(folder / "base")
    peft_adapter(folder / "plain", seed=1, r=4, lora_alpha=8, target_modules=ALL)
    peft_adapter(folder / "few", seed=2, r=2, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "down_proj"])
    ranks = {"v_proj": 1, "mlp.up_proj": 6}
    peft_adapter(folder / "upper", seed=3, r=8, target_modules=ALL, layers_to_transform=[1], rank_pattern=ranks)
    adapters = {name: folder / name for name in ("plain", "few", "upper")}
    return Parts(folder / "base", adapters, random_gates(adapters))
