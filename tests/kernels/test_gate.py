"""The gate: worked examples, ties, and the two weight formulas (oracle 2)."""

from __future__ import annotations

import math

import torch

from meteora_kernels.gate.reference import topk_softmax


def test_worked_example() -> None:
    # Token 0 prefers expert 2 over 0 by ln 3, so the weights are 3/4 and 1/4.
    logits_TE = torch.tensor([[0.0, -5.0, math.log(3)]])
    ids_TK, weights_TK = topk_softmax(logits_TE, 2)
    assert ids_TK.tolist() == [[2, 0]]
    torch.testing.assert_close(weights_TK, torch.tensor([[0.75, 0.25]]))


def test_ties_go_to_the_smaller_id() -> None:
    ids_TK, weights_TK = topk_softmax(torch.zeros(3, 40), 4)
    assert ids_TK.tolist() == [[0, 1, 2, 3]] * 3
    assert weights_TK.tolist() == [[0.25] * 4] * 3
    assert topk_softmax(torch.tensor([[1.0, 2.0, 0.0, 2.0] * 10]), 1)[0].tolist() == [[1]]


def test_one_expert_has_weight_one_at_any_temperature() -> None:
    logits_TE = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    for temperature in (0.1, 1.0, 30.0):
        ids_TK, weights_TK = topk_softmax(logits_TE, 1, torch.full((7, 1), temperature))
        assert ids_TK[:, 0].tolist() == logits_TE.argmax(-1).tolist()
        assert weights_TK.tolist() == [[1.0]] * 7


def test_softmax_then_topk_then_renormalise_is_the_same() -> None:
    logits_TE = torch.randn(64, 28, generator=torch.Generator().manual_seed(1))
    for top_k in (1, 2, 28):
        ids_TK, weights_TK = topk_softmax(logits_TE, top_k)
        kept_TK = torch.softmax(logits_TE, -1).gather(1, ids_TK)
        torch.testing.assert_close(weights_TK, kept_TK / kept_TK.sum(-1, keepdim=True))


def test_endless_temperature_weighs_all_alike() -> None:
    logits_TE = torch.randn(9, 6, generator=torch.Generator().manual_seed(2))
    _, weights_TK = topk_softmax(logits_TE, 3, torch.full((9, 1), 1e9))
    torch.testing.assert_close(weights_TK, torch.full((9, 3), 1 / 3))
