"""Zeros that take up memory only where they are written."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch

from meteora_dist.engine.zeros import ZerosOnDemand

SIZE = 256 << 20


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_a_buffer_takes_memory_only_where_it_is_written() -> None:
    before = resident()
    with ZerosOnDemand():
        buffer = torch.zeros(SIZE, dtype=torch.uint8, device=torch.device("cpu"))
    floats = buffer.view(torch.float32)
    floats[1000:2000] = 1.5
    assert resident() - before < SIZE // 8
    assert (buffer.shape, buffer.dtype) == ((SIZE,), torch.uint8)
    assert floats[:4096].sum() == 1500
    assert floats[-1] == 0


def test_every_other_tensor_is_made_as_usual() -> None:
    with ZerosOnDemand():
        assert torch.zeros(2, 3).shape == (2, 3)
        assert torch.zeros(5, dtype=torch.uint8).tolist() == [0] * 5
        assert torch.zeros(8192, dtype=torch.float32).dtype == torch.float32
        assert torch.ones(8192, dtype=torch.uint8).sum() == 8192
