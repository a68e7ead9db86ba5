"""Adapters written by us, read back by us and by PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from meteora_dist.adapters import read_adapter
from meteora_dist.adapters.write import write_changed, write_null
from meteora_dist.bank import Bank
from tests.support.tiny import load_tiny_llama


@pytest.mark.parametrize("name", ["rooted", "partial"])
def test_changed_matrices_come_back_under_the_same_config(tiny_bank: Bank, tmp_path: Path, name: str) -> None:
    adapter = read_adapter(tiny_bank.path / "experts" / name)
    pairs = {linear: (2 * adapter.load(linear).a_RH, 3 * adapter.load(linear).b_OR) for linear in adapter.shapes}
    changed = read_adapter(write_changed(adapter, tmp_path / name, pairs))
    assert changed.shapes == adapter.shapes
    assert changed.digest != adapter.digest
    for linear in adapter.shapes:
        assert torch.equal(changed.load(linear).a_RH, pairs[linear][0])
        assert torch.equal(changed.load(linear).b_OR, pairs[linear][1])


def test_the_null_adapter_adds_nothing_for_peft_either(tiny_base: Path, tmp_path: Path) -> None:
    folder = write_null(tmp_path / "null", "model.layers.0.self_attn.q_proj", 32, 32)
    assert list(read_adapter(folder).shapes) == ["model.layers.0.self_attn.q_proj"]
    ids_BL = torch.arange(8)[None]
    with torch.no_grad():
        expected = load_tiny_llama(tiny_base)(ids_BL).logits
        found = PeftModel.from_pretrained(load_tiny_llama(tiny_base), folder)(ids_BL).logits
    assert torch.equal(found, expected)
