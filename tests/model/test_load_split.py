"""A tp rank loads its part of a model, whether weights are split by rows or by columns, and keeps no file mapped."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from meteora_dist.model.load import load_base
from tests.support.ranks import run_ranks


def memory(key: str) -> int:
    """A counter of this process in bytes: VmRSS now, VmHWM the most since its last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(f"{key}:"))
    return 1024 * int(kilobytes)


def _load(rank: int, warm_up: Path, folder: Path) -> tuple[int, int, int]:
    """Bytes of this rank's part and of the whole model, and the most the process took to load it."""
    load_base(warm_up, torch.float32, tp=2)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    model = load_base(folder, torch.float32, tp=2)
    loading = memory("VmHWM") - before
    local = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in model.parameters()]
    assert all(weight.isfinite().all() for weight in local)
    return sum(part.nbytes for part in local), sum(weight.nbytes for weight in model.parameters()), loading


@pytest.mark.slow
def test_no_rank_holds_the_whole_model(tiny_base: Path, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=16384,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    for part, whole, loading in run_ranks(2, _load, tiny_base, tmp_path):
        assert part < 0.51 * whole
        assert 0.98 * part < loading < 1.15 * part
