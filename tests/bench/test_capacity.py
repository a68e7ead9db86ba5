"""What ranks hold, small: a base model whose experts are larger than it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from meteora_dist.bench.capacity import PEAK_SLACK
from meteora_dist.bench.synthetic import WEIGHT_FILES, write_synthetic_bank
from meteora_dist.cli.main import main
from meteora_dist.engine.mesh import Mesh
from meteora_dist.planning.known import shape_of
from meteora_dist.planning.memory import Demand, bank_bytes, rank_memory

EXPERTS, RANK = 256, 64


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, 5 million parameters; an expert of rank 64 has 1 million."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=128,
        bos_token_id=258,
        eos_token_id=259,
    )
    folder = tmp_path_factory.mktemp("wide-base")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_synthetic_bank_is_small_on_disk_and_not_in_memory(wide_base: Path, tmp_path: Path) -> None:
    bank = write_synthetic_bank(tmp_path / "bank", wide_base, experts=6, rank=4)
    files = [adapter.path / "adapter_model.safetensors" for adapter in bank.adapters]
    assert len({file.stat().st_ino for file in files}) == WEIGHT_FILES
    # Six experts, so six slots.
    assert len(set(bank.digests)) == 6
    demand = Demand(experts=6, rank=4)
    held = [bank.pair(linear, expert, dtype=None) for linear in bank.linears for expert in range(6)]
    assert sum(p.a_RH.nbytes + p.b_OR.nbytes for p in held if p) == bank_bytes(shape_of(str(wide_base)), demand)


def run(*options: str) -> None:
    with patch.object(sys, "argv", ["meteora", "bench", "capacity", *options]), pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0


@pytest.fixture(scope="module")
def found(wide_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], dict[str, Any]]:
    """The rows of the run under a limit, by measure and ep: four processes in all."""
    file = tmp_path_factory.mktemp("rows") / "capacity.json"
    sizes = ("--rank", str(RANK), "--experts", "0", "--limit-experts", str(EXPERTS))
    run("--model", str(wide_base), *sizes, "--json", str(file))
    rows = json.loads(file.read_text())
    assert len(rows) == 3
    return {(row["measure"], row.get("ep", 0)): row for row in rows}


@pytest.mark.parametrize("ep", [1, 2])
def test_a_rank_holds_its_share_and_needs_little_more_to_load_it(
    wide_base: Path, found: dict[tuple[str, int], dict[str, Any]], ep: int
) -> None:
    row = found["capacity", ep]
    planned = rank_memory(shape_of(str(wide_base)), Demand(EXPERTS, RANK, "float32", expert_dtype="bfloat16"), Mesh(ep))
    assert (row["bank"], row["gates"], row["base"]) == (planned.bank, planned.gates, planned.base)
    assert row["bank_of_even_share"] == 1
    # Beside a shard of 310 MB, some 15 MB of libraries and headers count too.
    assert 0.98 < row["peak_of_shard"] <= PEAK_SLACK


def test_two_ranks_serve_what_does_not_fit_one(found: dict[tuple[str, int], dict[str, Any]]) -> None:
    row = found["limit", 0]
    assert row["one_rank"].startswith("out of memory")
    assert row["two_ranks"] == "served"
    assert row["same_tokens"]


def test_the_limit_is_one_and_ends() -> None:
    code = (
        "from meteora_dist.bench.memory import limited_growth\n"
        "with limited_growth(64 * 2**20):\n"
        "  bytearray(16 * 2**20)\n"
        "  try: bytearray(128 * 2**20)\n"
        "  except MemoryError: print('refused')\n"
        "bytearray(128 * 2**20)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "refused\n"


@pytest.mark.slow
def test_every_size_on_every_mesh(wide_base: Path, tmp_path: Path) -> None:
    file = tmp_path / "capacity.json"
    meshes = ("--mesh", "1x1", "--mesh", "1x2", "--mesh", "2x1")
    sizes = ("--experts", str(EXPERTS), "--experts", str(2 * EXPERTS), "--rank", str(RANK), "--limit-experts", "0")
    run("--model", str(wide_base), *sizes, *meshes, "--json", str(file))
    rows = json.loads(file.read_text())
    assert [(row["experts"], row["ep"], row["tp"]) for row in rows] == [
        (experts, *mesh) for experts in (EXPERTS, 2 * EXPERTS) for mesh in ((1, 1), (1, 2), (2, 1))
    ]
    assert all(row["bank_of_even_share"] <= 1.05 for row in rows)
    assert all(0.98 < row["peak_of_shard"] <= PEAK_SLACK for row in rows)
