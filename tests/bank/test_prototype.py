"""Prototype rows against the definition, and their length by hand."""

from __future__ import annotations

import pytest
import torch

from meteora_dist.adapters import LoraPair
from meteora_dist.bank.prototype import arrow_direction, prototype_row

NOBODY = torch.zeros(0, dtype=torch.bool)


def test_worked_direction() -> None:
    # B A maps (x, y) to (3 y, x): it stretches the second axis most, by 3.
    pair = LoraPair(a_RH=torch.eye(2), b_OR=torch.tensor([[0.0, -3.0], [1.0, 0.0]]), scale=0.5)
    torch.testing.assert_close(arrow_direction(pair), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize(("rank", "width", "out"), [(4, 32, 16), (1, 8, 8), (8, 6, 20), (8, 20, 6)])
def test_direction_is_the_top_right_singular_vector(rank: int, width: int, out: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    a_RH, b_OR = torch.randn(rank, width, generator=generator), torch.randn(out, rank, generator=generator)
    v_H = arrow_direction(LoraPair(a_RH, b_OR, 1.0))
    expected_H = torch.linalg.svd(b_OR @ a_RH)[2][0]
    torch.testing.assert_close((v_H @ expected_H).abs(), torch.tensor(1.0))
    assert v_H.norm() == pytest.approx(1.0, abs=1e-6)
    assert v_H[v_H.abs().argmax()] > 0


def test_direction_does_not_depend_on_how_the_product_is_split() -> None:
    a_RH, b_OR = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0))
    pair, other = LoraPair(a_RH, b_OR.T, 1.0), LoraPair(-7 * a_RH, b_OR.T, 1.0)
    torch.testing.assert_close(arrow_direction(pair), arrow_direction(other))


def test_length_is_the_mean_of_the_trained_rows() -> None:
    pair = LoraPair(torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0]]), 1.0)
    # Lengths 5, 1 and a zero row, which counts for nothing; the last row is a prototype and does not count either.
    gate_EH = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 0.0], [60.0, 80.0]])
    trained_E = torch.tensor([True, True, True, False])
    torch.testing.assert_close(prototype_row(pair, gate_EH, trained_E), torch.tensor([0.0, 3.0]))


def test_without_trained_rows_the_length_is_one() -> None:
    pair = LoraPair(torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0]]), 1.0)
    for gate_EH, trained_E in ((torch.zeros(0, 2), NOBODY), (torch.zeros(1, 2), torch.tensor([True]))):
        torch.testing.assert_close(prototype_row(pair, gate_EH, trained_E), torch.tensor([0.0, 1.0]))


def test_an_expert_that_adds_nothing_gets_zeros() -> None:
    idle = LoraPair(torch.ones(1, 2), torch.zeros(3, 1), 1.0)
    for pair in (None, idle):
        assert prototype_row(pair, torch.ones(1, 2), torch.tensor([True])).tolist() == [0.0, 0.0]
