"""Memory that is freed while a model is loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest

FREE = """
import sys
from contextlib import nullcontext

import torch

from meteora_dist.bench.memory import resident
from meteora_dist.model.freed import large_blocks_apart

# glibc keeps blocks of this size together from now on, as after any pass of a model
torch.ones(7_000_000)
with large_blocks_apart() if sys.argv[1] == "apart" else nullcontext():
    blocks = [torch.ones(200_000) for _ in range(100)]
    full = resident()
    del blocks[:-1]
    print(full - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_blocks_go_back_to_the_system() -> None:
    freed = {
        how: int(subprocess.run([sys.executable, "-c", FREE, how], check=True, capture_output=True).stdout)
        for how in ("apart", "as ever")
    }
    # 99 blocks of 0.8 MB; the last one is in the way of all of them
    assert freed["as ever"] < 8_000_000 < 78_000_000 < freed["apart"]
