"""The kernels compile for GPUs that this machine need not have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ("choose", "choose_backward", "expand_dense", "expand", "outer", "pair_order", "permute", "project",
           "route_scale", "route_shrink", "scale", "shrink", "unpermute")  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles(capability: int, tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.kernels.compiled", str(capability)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    compiled = [line.split()[1].rstrip(":") for line in run.stdout.splitlines()]
    assert compiled == sorted(f"{kernel}_kernel" for kernel in KERNELS)
    # What an SM of either has for a program, in bytes.
    assert all(int(line.split()[-5]) <= 99 * 1024 for line in run.stdout.splitlines())
