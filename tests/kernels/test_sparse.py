"""Deltas added in place on the CPU, of few experts and of many, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from meteora_kernels.routed_lora.dense import add_routed_lora_dense, pack, row_weights
from meteora_kernels.routed_lora.reference import routed_lora_reference
from meteora_kernels.routed_lora.sparse import add_expert, add_routed_lora_sparse, pair_rows, worthwhile
from meteora_kernels.routed_lora.stack import LoraStack, stack, whole_part

INPUTS, OUTPUTS = 24, (16, 8, 8)
RANKS = ((4, 4, 2), (8, None, 1), (None, 3, 3), (2, 2, None))


def outputs_of(y_TY: Tensor) -> list[Tensor]:
    return [y_TY[:, :16], y_TY[:, 16:24], y_TY[:, 24:32]]


def a_stack(ranks: tuple[tuple[int | None, ...], ...] = RANKS) -> LoraStack:
    generator = torch.Generator().manual_seed(0)

    def pair(rank: int, width: int) -> tuple[Tensor, Tensor, float]:
        return torch.randn(rank, INPUTS, generator=generator), torch.randn(width, rank, generator=generator), 16 / rank

    experts = [
        tuple(
            None if rank is None else whole_part(pair(rank, width), torch.float32)
            for rank, width in zip(row, OUTPUTS, strict=True)
        )
        for row in ranks
    ]
    return pack(stack(experts, INPUTS, OUTPUTS, torch.float32))


def test_where_the_rows_of_a_small_stack_are() -> None:
    # Rows of A: linear 0 has experts 0 0 1, linear 1 has 1, linear 2 has none.
    where = pair_rows(a_stack(((2, None, None), (1, 1, None))))
    assert where.rows_PR.tolist() == [[0, 1], [2, 0], [3, 3], [3, 3], [3, 3], [3, 3]]
    assert where.scales_PR.tolist() == [[8, 8], [16, 0], [0, 0], [16, 0], [0, 0], [0, 0]]
    assert where.first_N1.flatten().tolist() == [0, 3, 4]


@pytest.mark.parametrize("copies", [8, 25])
@pytest.mark.parametrize("slots", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_it_adds_what_the_reference_computes(tokens: int, slots: int, copies: int) -> None:
    held, generator = a_stack(RANKS * copies), torch.Generator().manual_seed(tokens)
    x_TH = torch.randn(tokens, INPUTS, generator=generator)
    order = torch.rand(tokens, 3, held.num_experts, generator=generator).argsort(-1)[..., :slots]
    empty = torch.rand(tokens, 3, slots, generator=generator) < 0.3
    ids_TNK = order.masked_fill(empty, -1)
    weights_TNK = torch.rand(tokens, 3, slots, generator=generator).masked_fill(empty, 0.0)
    before = torch.randn(tokens, 40, generator=generator)
    y_TY = before.clone()
    add_routed_lora_sparse(outputs_of(y_TY), x_TH, held, pair_rows(held), ids_TNK, weights_TNK)
    deltas = routed_lora_reference(x_TH, held, ids_TNK, weights_TNK)
    torch.testing.assert_close(y_TY[:, :32], before[:, :32] + torch.cat(deltas, dim=1), rtol=1e-4, atol=1e-4)
    assert torch.equal(y_TY[:, 32:], before[:, 32:])


def test_a_token_of_many_experts_has_the_same_bits_alone_and_in_company() -> None:
    held, generator = a_stack(RANKS * 25), torch.Generator().manual_seed(1)
    x_TH = torch.randn(33, INPUTS, generator=generator)
    ids_TNK = torch.randint(-1, 100, (33, 3, 2), generator=generator)
    weights_TNK = torch.rand(33, 3, 2, generator=generator)
    together, alone = torch.zeros(33, 32), torch.zeros(33, 32)
    add_routed_lora_sparse(outputs_of(together), x_TH, held, pair_rows(held), ids_TNK, weights_TNK)
    for token in range(33):
        one = slice(token, token + 1)
        add_routed_lora_sparse(outputs_of(alone[one]), x_TH[one], held, pair_rows(held), ids_TNK[one], weights_TNK[one])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("ranks", [RANKS, ((4, 4, 4), (4, 4, 4))], ids=["mixed", "alike"])
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_few_experts_are_added_as_whole_products(ranks: tuple[tuple[int | None, ...], ...], tokens: int) -> None:
    held, generator = a_stack(ranks), torch.Generator().manual_seed(tokens)
    x_TH = torch.randn(tokens, INPUTS, generator=generator)
    ids_TNK = torch.rand(tokens, 3, held.num_experts, generator=generator).argsort(-1)[..., :2]
    ids_TNK = ids_TNK.masked_fill(torch.rand(tokens, 3, 2, generator=generator) < 0.3, -1)
    weights_TNK = torch.rand(tokens, 3, 2, generator=generator).masked_fill(ids_TNK < 0, 0.0)
    y_TY = torch.ones(tokens, 32)
    add_routed_lora_dense(outputs_of(y_TY), x_TH, held, row_weights(held, ids_TNK, weights_TNK))
    deltas = routed_lora_reference(x_TH, held, ids_TNK, weights_TNK)
    torch.testing.assert_close(y_TY, 1 + torch.cat(deltas, dim=1), rtol=1e-4, atol=1e-4)


def test_many_experts_are_those_of_which_tokens_want_few() -> None:
    of_28 = a_stack(((2, 2, 2),) * 28)
    assert [worthwhile(of_28, slots) for slots in (1, 2, 3, 4)] == [True, True, True, False]


@pytest.mark.parametrize("expert", range(4))
def test_one_expert_for_all_tokens(expert: int) -> None:
    held = a_stack()
    x_TH = torch.randn(9, INPUTS, generator=torch.Generator().manual_seed(2))
    y_TY = torch.zeros(9, 32)
    add_expert(outputs_of(y_TY), x_TH, held.experts[expert], 0.7)
    ids_TNK = torch.full((9, 3, 1), expert)
    deltas = routed_lora_reference(x_TH, held, ids_TNK, torch.full((9, 3, 1), 0.7))
    torch.testing.assert_close(y_TY, torch.cat(deltas, dim=1), rtol=1e-4, atol=1e-4)
