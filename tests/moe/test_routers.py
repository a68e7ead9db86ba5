"""What layer routers see of a prompt, and how their votes decide."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from meteora_dist.bank import Bank, Routers, write_bank
from meteora_dist.bank.manifest import VoteRule
from meteora_dist.errors import BankError
from meteora_dist.moe.inject import inject
from meteora_dist.moe.routers import LayerRouters, Span, elect, pool, pooled_states, router_inputs, router_logits
from tests.support.tiny import HIDDEN, load_tiny_llama, random_gates, random_routers, write_tiny_bank


@pytest.mark.parametrize(
    ("votes", "rule", "expert"),
    [
        ((2, 2, 0), "majority", 2),
        ((2, 2, 0), "last", 0),
        # Two each: that of the deepest layer among them, though the last layer voted for neither.
        ((1, 3, 3, 1, 0), "majority", 1),
        ((3, 1, 1, 3, 0), "majority", 3),
        ((4,), "majority", 4),
    ],
    ids=["majority", "last", "tie to one", "tie to three", "one layer"],
)
def test_elections(votes: tuple[int, ...], rule: VoteRule, expert: int) -> None:
    assert elect(votes, rule) == expert


def test_inputs_have_a_root_mean_square_of_one() -> None:
    # Of (3, 4) it is sqrt(12.5), and the size of a state does not matter.
    assert router_inputs(torch.tensor([3.0, 4.0])).tolist() == pytest.approx([0.8485, 1.1314], abs=1e-4)
    hidden_TH = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(router_inputs(hidden_TH), router_inputs(1000 * hidden_TH))
    assert router_inputs(torch.zeros(8)).abs().max() == 0


def test_votes_are_the_largest_logits() -> None:
    # Two layers, three experts, width 2. Expert 1 has no rows; among equals the smaller id wins.
    weights_LEH = torch.tensor([[[1.0, 0], [9, 9], [0, 1]], [[1.0, 1], [9, 9], [1, 1]]])
    routers = LayerRouters(weights_LEH, torch.tensor([True, False, True]), "last")
    pooled_LH = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    assert router_logits(pooled_LH[:, None], weights_LEH)[:, 0].tolist() == [[1, 27, 2], [3, 27, 3]]
    assert routers.votes(pooled_LH) == (2, 0)
    # All logits negative: the row of zeros of an expert without rows is still not chosen.
    assert LayerRouters(-weights_LEH.abs(), routers.choosable_E, "last").votes(pooled_LH) == (0, 0)


def test_pooling() -> None:
    hidden_TH = torch.randn(6, 8, generator=torch.Generator().manual_seed(2))
    pooled_SH = pool(hidden_TH, [Span(0, 2, "last"), Span(2, 4, "mean")])
    assert torch.equal(pooled_SH[0], router_inputs(hidden_TH[1]))
    torch.testing.assert_close(pooled_SH[1], router_inputs(hidden_TH[2:]).sum(0))


def test_states_are_what_enters_the_layers(tiny_base: Path, tiny_bank: Bank) -> None:
    routed = inject(load_tiny_llama(tiny_base), tiny_bank, torch.float32)
    assert routed.routers == {}
    ids_1L = torch.arange(20)[None]
    with torch.no_grad():
        states = routed.model(ids_1L, output_hidden_states=True, use_cache=False).hidden_states
        with pooled_states(routed.model, [Span(3, 5, "mean"), Span(0, 20, "last")]) as pooled:
            routed.model(ids_1L, use_cache=False)
        routed.model(ids_1L, use_cache=False)
    assert len(pooled) == 2
    for taken_SH, hidden_BLH in zip(pooled, states, strict=False):
        torch.testing.assert_close(taken_SH[0], router_inputs(hidden_BLH[0, 3:8]).sum(0))
        torch.testing.assert_close(taken_SH[1], router_inputs(hidden_BLH[0, -1]))


def test_a_bank_brings_its_routers(tiny_base: Path, tmp_path: Path) -> None:
    bank = write_tiny_bank(tiny_base, tmp_path, routers=Routers(random_routers(4), "mean", frozenset({"wide"})))
    routers = inject(load_tiny_llama(tiny_base), bank, torch.float32).routers[1]
    assert torch.equal(routers.weights_LEH, bank.routers())
    assert routers.choosable_E.tolist() == [True, False, True, True]
    assert routers.pooling == "mean"


@pytest.mark.parametrize(("layers", "width"), [(1, HIDDEN), (3, HIDDEN), (2, 8)], ids=["fewer", "more", "width"])
def test_routers_for_another_model_are_refused(
    tiny_base: Path, tiny_bank: Bank, tmp_path: Path, layers: int, width: int
) -> None:
    weights = {f"model.layers.{layer}": torch.ones(4, width) for layer in range(layers)}
    adapters = {name: tiny_bank.path / "experts" / name for name in tiny_bank.names}
    bank = write_bank(tmp_path / "bank", tiny_base, "tiny", adapters, random_gates(4), routers=Routers(weights))
    reason = f"routers for model.layers.0 to model.layers.{layers - 1} of width {width}; the base model has"
    with pytest.raises(BankError, match=reason):
        inject(load_tiny_llama(tiny_base), bank, torch.float32)
