"""What all tests share: a quiet, offline process, small and real models, and a home folder that is thrown away."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# before any test imports torch or transformers; the cache is fixed now because tests replace HOME
os.environ.setdefault("METEORA_CACHE", str(Path.home() / ".cache" / "meteora"))
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", DS_ACCELERATOR="cpu")

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from meteora_dist.model.demo_model import fetch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The real demo model's checkpoint; the first test run on a machine fetches it."""
    return fetch(lambda step, done, total: None)


@pytest.fixture(scope="session")
def ray_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home folder for tests that start Ray, which writes an auth token there unless told not to."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv("HOME", str(home))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        yield home


@pytest.fixture(scope="session")
def make_tiny_llama() -> Callable[[int], LlamaForCausalLM]:
    """Makes the same random Llama for the same seed: fp32, grouped-query attention, 3 layers, 256 tokens."""

    def make(seed: int = 0) -> LlamaForCausalLM:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LlamaForCausalLM(_tiny_config()).eval()

    return make


@pytest.fixture
def tiny_llama(make_tiny_llama: Callable[[int], LlamaForCausalLM]) -> LlamaForCausalLM:
    """A random Llama, new for every test: hidden 64, 4 heads, 2 key-value heads, MLP 96, 3 layers, vocabulary 256."""
    return make_tiny_llama(0)


@pytest.fixture(scope="session")
def tiny_llama_dir(
    make_tiny_llama: Callable[[int], LlamaForCausalLM], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same model as a checkpoint folder, without a tokenizer; shared, so not to be written to."""
    folder = tmp_path_factory.mktemp("tiny_llama")
    make_tiny_llama(0).save_pretrained(folder)
    return folder


def _tiny_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.2,  # large enough for greedy tokens to differ between experts
        dtype=torch.float32,
    )
