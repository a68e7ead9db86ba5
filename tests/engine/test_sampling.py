"""Drawing one token: greedy, temperature, cuts, seeds, penalties; against transformers' own processors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from meteora_dist.engine.request import Sampling
from meteora_dist.engine.sampling import _cut, adjusted, draw_scores, logprobs_of

LOGITS_V = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))


def draws(sampling: Sampling, count: int = 4000) -> torch.Tensor:
    """Relative frequency of each token over ``count`` positions."""
    tokens = [int(draw_scores(LOGITS_V, sampling, position).argmax()) for position in range(count)]
    return torch.bincount(torch.tensor(tokens), minlength=4) / count


def test_temperature_zero_is_greedy() -> None:
    assert draw_scores(LOGITS_V, Sampling(temperature=0.0, seed=3), 5) is LOGITS_V


def test_draws_follow_the_distribution() -> None:
    torch.testing.assert_close(draws(Sampling(temperature=1.0, seed=1)), LOGITS_V.exp(), atol=0.03, rtol=0)


def test_temperature_flattens() -> None:
    expected = torch.softmax(LOGITS_V / 2, -1)
    torch.testing.assert_close(draws(Sampling(temperature=2.0, seed=1)), expected, atol=0.03, rtol=0)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    # 0.5 < 0.7 <= 0.5 + 0.3: two tokens stay, renormalised.
    expected = torch.tensor([0.625, 0.375, 0.0, 0.0])
    torch.testing.assert_close(draws(Sampling(temperature=1.0, top_p=0.7, seed=2)), expected, atol=0.03, rtol=0)
    assert draws(Sampling(temperature=1.0, top_p=1e-6, seed=2), 50).tolist() == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("cold", [{"temperature": 1e-40}, {"temperature": 5e-324}, {"top_p": 1e-50}, {"top_p": 5e-324}])
def test_what_is_nothing_in_fp32_leaves_the_most_probable_token(cold: dict[str, float]) -> None:
    reversed_V = LOGITS_V.flip(0)
    for position in range(20):
        assert int(draw_scores(reversed_V, Sampling(**{"temperature": 1.0} | cold), position).argmax()) == 3


def test_seed_and_position_decide_the_draw() -> None:
    once = draw_scores(LOGITS_V, Sampling(temperature=1.0, seed=9), 4)
    assert torch.equal(once, draw_scores(LOGITS_V, Sampling(temperature=1.0, seed=9), 4))
    assert not torch.equal(once, draw_scores(LOGITS_V, Sampling(temperature=1.0, seed=9), 5))
    assert not torch.equal(once, draw_scores(LOGITS_V, Sampling(temperature=1.0, seed=10), 4))


@pytest.mark.parametrize(
    ("fields", "warpers"),
    [
        ({"min_p": 0.3}, [MinPLogitsWarper(0.3)]),
        ({"top_k": 5}, [TopKLogitsWarper(5)]),
        ({"top_p": 0.6}, [TopPLogitsWarper(0.6)]),
        (
            {"min_p": 0.05, "top_k": 9, "top_p": 0.8},
            [MinPLogitsWarper(0.05), TopKLogitsWarper(9), TopPLogitsWarper(0.8)],
        ),
        ({"top_k": 99}, []),
    ],
    ids=["min_p", "top_k", "top_p", "all", "none"],
)
def test_cuts_keep_what_transformers_keeps(fields: dict[str, Any], warpers: list[Any]) -> None:
    for seed in range(20):
        logits_1V = 2 * torch.randn(1, 50, generator=torch.Generator().manual_seed(seed))
        ids = torch.zeros(1, 1, dtype=torch.long)
        wanted = LogitsProcessorList([TemperatureLogitsWarper(0.7), *warpers])(ids, logits_1V.clone())[0]
        torch.testing.assert_close(_cut(logits_1V[0] / 0.7, Sampling(0.7, **fields)), wanted)


def test_the_repetition_penalty_is_transformers() -> None:
    logits_V = torch.tensor([2.0, -1.0, 0.5, -3.0, 1.0])
    wanted = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[0, 1, 1, 3]]), logits_V[None].clone())[0]
    torch.testing.assert_close(adjusted(logits_V, Sampling(repetition_penalty=1.7), [0, 1], [1, 3]), wanted)


def test_penalties_count_the_answer_and_biases_are_added() -> None:
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((0, 3.0), (4, -1.0)))
    # Token 1 stands in the answer twice, 3 once; 2 stands in the prompt only.
    got = adjusted(torch.zeros(5), sampling, [2, 2, 1], [1, 1, 3])
    torch.testing.assert_close(got, torch.tensor([3.0, -1.0, 0.0, -0.75, -1.0]))


def test_logprobs_are_sorted_with_ties_by_id() -> None:
    got = logprobs_of(torch.log(torch.tensor([0.1, 0.4, 0.1, 0.4])), 2, 3)
    assert got.token == pytest.approx(-2.302585)
    assert [token for token, _ in got.top] == [1, 3, 0]
