"""Routed LoRA: worked example, then loop = dense = grouped over sizes and routings (oracle 3)."""

from __future__ import annotations

import pytest
import torch

from meteora_kernels.routed_lora.dense import routed_lora_dense
from meteora_kernels.routed_lora.grouped import routed_lora_grouped
from meteora_kernels.routed_lora.plan import DENSE_COLUMNS, RoutedLora, plan
from meteora_kernels.routed_lora.reference import routed_lora_reference
from meteora_kernels.routed_lora.stack import LoraStack, Pair, pack

FAST = [routed_lora_dense, routed_lora_grouped]
ALL = [routed_lora_reference, *FAST]


def random_stack(
    generator: torch.Generator, experts: int = 5, in_features: int = 12, widths: tuple[int, ...] = (8, 4)
) -> LoraStack:
    """Mixed ranks 1 to 4; expert 1 lacks the last linear, and no expert's scale equals another's."""

    def pair(n: int, e: int) -> Pair | None:
        if e == 1 and n == len(widths) - 1:
            return None
        rank = 1 + (e + n) % 4
        a_RH = torch.randn(rank, in_features, generator=generator)
        return a_RH, torch.randn(widths[n], rank, generator=generator), 0.5 + 0.25 * e

    rows = [[pair(n, e) for e in range(experts)] for n in range(len(widths))]
    return pack(rows, in_features, widths, torch.float32)


def routing(name: str, tokens: int, linears: int, slots: int, experts: int, g: torch.Generator) -> torch.Tensor:
    """Expert ids of one kind of traffic; a token's slots never name an expert twice."""
    shape = (tokens, linears, experts)
    distinct = torch.rand(shape, generator=g).argsort(-1)[..., :slots]
    if name == "uniform":
        return distinct
    if name == "identical":
        return torch.arange(slots).expand(tokens, linears, slots).clone()
    if name == "empty":
        return torch.full((tokens, linears, slots), -1)
    holes = torch.rand(distinct.shape, generator=g) < 0.5
    return distinct.masked_fill(holes, -1)


@pytest.mark.parametrize("operator", ALL)
def test_worked_example(operator: RoutedLora) -> None:
    # One linear, 2 -> 2. Expert 0: rank 1, picks x0, writes it to y1, scale 2. Expert 1: identity of rank 2, scale 1.
    first = (torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0], [1.0]]), 2.0)
    second = (torch.eye(2), torch.eye(2), 1.0)
    stack = pack([[first, second]], 2, [2], torch.float32)
    x_TH = torch.tensor([[3.0, 5.0], [3.0, 5.0], [3.0, 5.0]])
    ids_TNK = torch.tensor([[[0, 1]], [[1, -1]], [[-1, -1]]])
    weights_TNK = torch.tensor([[[0.25, 0.75]], [[1.0, 0.0]], [[0.0, 0.0]]])
    (delta_TO,) = operator(x_TH, stack, ids_TNK, weights_TNK)
    assert delta_TO.tolist() == [[2.25, 0.25 * 2 * 3 + 3.75], [3.0, 5.0], [0.0, 0.0]]


@pytest.mark.parametrize("operator", FAST)
@pytest.mark.parametrize("traffic", ["uniform", "identical", "empty", "holes"])
@pytest.mark.parametrize("tokens", [0, 1, 8, 64, 1024])
@pytest.mark.parametrize("slots", [1, 2, 5])
def test_fast_operators_equal_the_loop(operator: RoutedLora, traffic: str, tokens: int, slots: int) -> None:
    g = torch.Generator().manual_seed(tokens * 10 + slots)
    stack = random_stack(g)
    ids_TNK = routing(traffic, tokens, 2, slots, 5, g)
    weights_TNK = torch.rand(ids_TNK.shape, generator=g).masked_fill(ids_TNK < 0, 0.0)
    x_TH = torch.randn(tokens, 12, generator=g)
    expected = routed_lora_reference(x_TH, stack, ids_TNK, weights_TNK)
    actual = operator(x_TH, stack, ids_TNK, weights_TNK)
    for delta_TO, expected_TO in zip(actual, expected, strict=True):
        torch.testing.assert_close(delta_TO, expected_TO, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("operator", ALL)
def test_a_stack_without_any_pair_adds_nothing(operator: RoutedLora) -> None:
    stack = pack([[None, None]], 3, [4], torch.float32)
    (delta_TO,) = operator(torch.ones(2, 3), stack, torch.tensor([[[0]], [[1]]]), torch.ones(2, 1, 1))
    assert delta_TO.tolist() == [[0.0] * 4] * 2


@pytest.mark.parametrize("operator", ALL)
def test_gradients_reach_input_and_weights(operator: RoutedLora) -> None:
    g = torch.Generator().manual_seed(3)
    stack = random_stack(g)
    ids_TNK = routing("uniform", 6, 2, 2, 5, g)
    grads = []
    for op in (operator, routed_lora_reference):
        x_TH = torch.randn(6, 12, generator=torch.Generator().manual_seed(4)).requires_grad_()
        weights_TNK = torch.rand(6, 2, 2, generator=torch.Generator().manual_seed(5)).requires_grad_()
        sum(delta.square().sum() for delta in op(x_TH, stack, ids_TNK, weights_TNK)).backward()
        grads.append((x_TH.grad, weights_TNK.grad))
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_plan_reads_few_columns_densely() -> None:
    assert plan(DENSE_COLUMNS) is routed_lora_dense
    assert plan(DENSE_COLUMNS + 1) is routed_lora_grouped
