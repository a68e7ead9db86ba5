"""Drawing one token: greedy, temperature, top-p, seeds."""

from __future__ import annotations

import torch

from meteora_dist.engine.request import Sampling
from meteora_dist.engine.sampling import draw_scores

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


def test_seed_and_position_decide_the_draw() -> None:
    once = draw_scores(LOGITS_V, Sampling(temperature=1.0, seed=9), 4)
    assert torch.equal(once, draw_scores(LOGITS_V, Sampling(temperature=1.0, seed=9), 4))
    assert not torch.equal(once, draw_scores(LOGITS_V, Sampling(temperature=1.0, seed=9), 5))
    assert not torch.equal(once, draw_scores(LOGITS_V, Sampling(temperature=1.0, seed=10), 4))
