"""Plain passes: likelihoods are the model's own, choices of gates are those that routing makes, LoraHub searches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from meteora_dist.bank import Bank
from meteora_dist.errors import EvaluationError
from meteora_dist.evaluation.banks import named_bank, prototype_bank
from meteora_dist.evaluation.forced import Passage, answer_nll, watched_gates
from meteora_dist.evaluation.gates import GateCount, add_counts, layer_choices, watch_gates
from meteora_dist.evaluation.lorahub import LIMIT, PENALTY, HubSearch, search_weights
from meteora_dist.moe.inject import inject
from meteora_dist.moe.routed_model import RoutedModel
from meteora_dist.moe.routing import BASE, RoutingChoice, named, plan_pass
from tests.support.tiny import ALL_LINEARS, LAYERS, load_tiny_llama

PASSAGE = Passage((10, 20, 30, 40), (50, 60, 259))


@pytest.fixture(scope="module")
def routed(tiny_base: Path, tiny_bank: Bank) -> RoutedModel:
    return inject(load_tiny_llama(tiny_base), tiny_bank, torch.float32)


@torch.no_grad()
def plain_nll(model: torch.nn.Module, passage: Passage) -> float:
    """By the log-probabilities of the whole sequence."""
    log_TV = model(torch.tensor([passage.ids])).logits[0].log_softmax(-1)
    start = len(passage.prompt)
    return -sum(float(log_TV[start + i - 1, token]) for i, token in enumerate(passage.answer))


def test_likelihoods_are_those_of_the_base_and_of_peft(tiny_base: Path, tiny_bank: Bank, routed: RoutedModel) -> None:
    assert answer_nll(routed, PASSAGE, BASE) == pytest.approx(plain_nll(load_tiny_llama(tiny_base), PASSAGE), rel=1e-4)
    for expert, adapter in enumerate(tiny_bank.adapters):
        model = PeftModel.from_pretrained(load_tiny_llama(tiny_base), adapter.path).eval()
        assert answer_nll(routed, PASSAGE, named(expert)) == pytest.approx(plain_nll(model, PASSAGE), rel=1e-3)


@pytest.mark.parametrize("prototypes", [False, True], ids=["trained", "prototypes"])
def test_choices_are_those_that_routing_makes(
    tiny_base: Path, tiny_bank: Bank, tmp_path: Path, prototypes: bool
) -> None:
    bank = prototype_bank(tiny_bank, tmp_path / "arrow") if prototypes else tiny_bank
    routed = inject(load_tiny_llama(tiny_base), bank, torch.float32)
    newest = routed.holdings.residency.roster.newest
    choice = RoutingChoice(top_k=1)
    step = plan_pass([choice], [len(PASSAGE.ids)], [newest], routed.live, 1, trace=True)
    with torch.no_grad(), routed.context.routed(step):
        routed.model(torch.tensor([PASSAGE.ids]))
    with watched_gates(routed) as picks:
        answer_nll(routed, PASSAGE, choice)
    assert len(picks) == LAYERS * len(ALL_LINEARS)
    counts_TE = sum(torch.nn.functional.one_hot(picks_T, 4) for picks_T in picks.values())
    shares_TE = step.shares_of(0), step.shares_of(len(PASSAGE.ids) - 1)
    for row, shares_E in zip((0, -1), shares_TE, strict=True):
        torch.testing.assert_close(counts_TE[row].float(), shares_E)


def test_choices_are_counted_against_the_expert_of_the_next_token() -> None:
    count = GateCount()
    # Five tokens, three of them the prompt's; the choice at the last one does not count.
    picks = {
        "model.layers.0.self_attn.q_proj": torch.tensor([1, 0, 1, 1, 0]),
        "model.layers.3.mlp.up_proj": torch.tensor([1, 1, 0, 1, 1]),
    }
    count.add(picks, expert=1, prompt_tokens=3)
    assert count.counts() == {
        "layer": {"0": (3, 4), "3": (3, 4)},
        "module": {"q_proj": (3, 4), "up_proj": (3, 4)},
        "part": {"prompt": (3, 4), "answer": (3, 4)},
        "position": {"0": (2, 2), "1": (1, 2), "2-3": (3, 4)},
    }
    assert add_counts([count.counts(), count.counts()])["part"]["answer"] == (6, 8)


def test_counts_and_maps_of_a_bank(routed: RoutedModel) -> None:
    counts = [watch_gates(routed, [PASSAGE], expert, RoutingChoice()).counts["part"] for expert in range(4)]
    # Every choice names one of the four experts.
    assert sum(part["prompt"][0] for part in counts) == counts[0]["prompt"][1] == 3 * LAYERS * len(ALL_LINEARS)
    drawn = layer_choices(routed, PASSAGE.ids, RoutingChoice())
    assert [len(row) for row in drawn] == [len(PASSAGE.ids)] * LAYERS
    with watched_gates(routed) as picks:
        answer_nll(routed, PASSAGE, RoutingChoice())
    first = torch.stack([picks_T[0] for linear, picks_T in picks.items() if ".layers.1." in linear])
    assert drawn[1][0] == int(torch.bincount(first).argmax())


def test_lorahub_lowers_its_loss_and_is_repeatable(routed: RoutedModel) -> None:
    passages = [PASSAGE, Passage((7, 8), (90, 91, 92))]
    search = HubSearch(evaluations=30, seed=3)
    weights = search_weights(routed, passages, search)
    assert weights == search_weights(routed, passages, search)
    assert max(map(abs, weights)) <= LIMIT

    def loss(weights: tuple[float, ...]) -> float:
        choice = RoutingChoice(mode="fixed", experts=tuple(enumerate(weights)))
        nll = sum(answer_nll(routed, passage, choice) for passage in passages)
        return nll / 6 + PENALTY * sum(map(abs, weights)) / 4

    assert loss(weights) < loss((0.0,) * 4) - 0.1


def test_lorahub_needs_a_choice(tiny_base: Path, tiny_bank: Bank, tmp_path: Path) -> None:
    bank = named_bank(tiny_bank, tiny_base, {"one": tiny_bank.adapters[0].path}, tmp_path / "one")
    routed = inject(load_tiny_llama(tiny_base), bank, torch.float32)
    with pytest.raises(EvaluationError, match="has only one"):
        search_weights(routed, [PASSAGE], HubSearch())
