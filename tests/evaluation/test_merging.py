"""Merged adapters: what is filled up with zeros, and what is merged alone, keeps its delta."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from meteora_dist.adapters import Adapter, read_adapter
from meteora_dist.bank import Bank
from meteora_dist.evaluation.banks import named_bank, prototype_bank
from meteora_dist.evaluation.merging import MergeRecipe, merge, write_uniform
from tests.support.tiny import Spec, load_tiny_llama, write_adapter


def deltas(adapter: Adapter) -> dict[str, Tensor]:
    """The update [O, H] of every linear."""
    pairs = {module: adapter.load(module) for module in adapter.shapes}
    return {module: pair.scale * pair.b_OR @ pair.a_RH for module, pair in pairs.items()}


def assert_same(found: Adapter, expected: Adapter) -> None:
    want = deltas(expected)
    got = deltas(found)
    assert got.keys() == want.keys()
    for module, delta_OH in want.items():
        torch.testing.assert_close(got[module], delta_OH, rtol=1e-4, atol=1e-5)


def test_filling_up_with_zeros_changes_no_delta(tiny_bank: Bank, tmp_path: Path) -> None:
    for name, adapter in zip(tiny_bank.names, tiny_bank.adapters, strict=True):
        uniform = read_adapter(write_uniform(adapter, tmp_path / name, rank=11))
        assert {shape.rank for shape in uniform.shapes.values()} == {11}
        assert {shape.scale for shape in uniform.shapes.values()} == {1.0}
        assert_same(uniform, adapter)


@pytest.mark.parametrize("name", ["rooted", "partial"])
def test_a_linear_merge_of_one_adapter_is_itself(tiny_base: Path, tiny_bank: Bank, tmp_path: Path, name: str) -> None:
    adapter = tiny_bank.adapters[tiny_bank.names.index(name)]
    assert_same(read_adapter(merge(tiny_base, {name: adapter}, MergeRecipe("linear"), tmp_path / "m")), adapter)


def test_ties_that_prunes_nothing_keeps_a_single_adapter(tiny_base: Path, tiny_bank: Bank, tmp_path: Path) -> None:
    adapter = tiny_bank.adapters[0]
    recipe = MergeRecipe("ties", density=0.99999, rank=4)
    assert_same(read_adapter(merge(tiny_base, {"plain": adapter}, recipe, tmp_path / "m")), adapter)


def test_linear_is_pefts_own_where_it_takes_the_adapters(tiny_base: Path, tmp_path: Path) -> None:
    folders = [write_adapter(tiny_base, tmp_path / name, Spec(4, 8), seed) for seed, name in enumerate(("x", "y"))]
    model = PeftModel.from_pretrained(load_tiny_llama(tiny_base), folders[0], adapter_name="x")
    model.load_adapter(folders[1], adapter_name="y")
    model.add_weighted_adapter(["x", "y"], [0.5, 0.5], "both", combination_type="linear")
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    adapters = {name: read_adapter(tmp_path / name) for name in ("x", "y")}
    found = read_adapter(merge(tiny_base, adapters, MergeRecipe("linear"), tmp_path / "m"))
    assert_same(found, read_adapter(tmp_path / "both"))


def test_mixed_ranks_merge_to_the_rank_that_is_asked_for_and_the_seed_is_dares(
    tiny_base: Path, tiny_bank: Bank, tmp_path: Path
) -> None:
    adapters = dict(zip(tiny_bank.names, tiny_bank.adapters, strict=True))
    made = {
        name: read_adapter(merge(tiny_base, adapters, MergeRecipe(kind, rank=6, seed=seed), tmp_path / name))
        for name, kind, seed in (
            ("t", "ties", 0),
            ("d0", "dare-ties", 0),
            ("again", "dare-ties", 0),
            ("d1", "dare-ties", 1),
        )
    }
    assert {shape.rank for adapter in made.values() for shape in adapter.shapes.values()} == {6}
    assert_same(made["again"], made["d0"])
    linear = "model.layers.0.mlp.up_proj"
    assert not torch.allclose(deltas(made["d1"])[linear], deltas(made["d0"])[linear])
    assert not torch.allclose(deltas(made["t"])[linear], deltas(made["d0"])[linear])


def test_the_prototype_bank_scores_by_the_experts_own_directions(tiny_bank: Bank, tmp_path: Path) -> None:
    made = prototype_bank(tiny_bank, tmp_path / "arrow")
    assert (made.names, made.digests) == (tiny_bank.names, tiny_bank.digests)
    assert all(made.prototypes)
    for linear in made.linears:
        for expert, row_H in enumerate(made.gate(linear)):
            pair = tiny_bank.pair(linear, expert)
            if pair is None:
                assert not row_H.any()
                continue
            delta_OH = pair.b_OR @ pair.a_RH
            right_H = torch.linalg.svd(delta_OH).Vh[0]
            assert abs(float(right_H @ row_H)) == pytest.approx(1, abs=1e-4)


def test_a_bank_of_named_adapters(tiny_base: Path, tiny_bank: Bank, tmp_path: Path) -> None:
    made = named_bank(tiny_bank, tiny_base, {"one": tiny_bank.adapters[3].path}, tmp_path / "named")
    assert (made.names, made.digests) == (("one",), (tiny_bank.digests[3],))
    made.check_base(tiny_base)
