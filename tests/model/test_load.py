"""Loading a base model: what is refused before a weight is read. How parts are loaded is in tests/engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from meteora_dist.errors import ModelError
from meteora_dist.model.load import load_base


def test_tp_has_to_divide_the_heads(tiny_base: Path) -> None:
    with pytest.raises(ModelError, match=r"tp is 4, but .* divide the model's 4 attention heads and 2 KV heads: 1, 2"):
        load_base(tiny_base, torch.float32, tp=4)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json here"):
        load_base(tmp_path, torch.float32)
