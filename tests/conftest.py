"""What all tests share: an offline process of one thread, the models, and a home folder that is thrown away."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# before any test imports torch or transformers; the cache is fixed now because tests replace HOME
os.environ.setdefault("METEORA_CACHE", str(Path.home() / ".cache" / "meteora"))
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", DS_ACCELERATOR="cpu")
# Triton reads it when it is imported, wherever that happens; with a GPU, TRITON_INTERPRET=0 compiles the kernels.
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

from meteora_dist.model.demo_model import fetch

torch.set_num_threads(1)

pytest_plugins = ["tests.support.fixtures"]


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The real demo model's checkpoint; the first test run on a machine fetches it."""
    return fetch(lambda step, done, total: None)


@pytest.fixture(scope="module")
def ray_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home folder for tests that start Ray, which writes an auth token there unless told not to."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv("HOME", str(home))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        yield home
