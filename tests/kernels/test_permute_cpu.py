"""The compiled rows of an exchange equal their twins, in both types."""

from __future__ import annotations

from functools import reduce
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from meteora_kernels.gate.choice import GateChoice
from meteora_kernels.permute.cpu import operators as rows
from meteora_kernels.permute.reference import permute_reference
from meteora_kernels.routed_lora.cpu import operators as cpu
from meteora_kernels.routed_lora.plan import located
from meteora_kernels.routed_lora.stack import LoraStack
from tests.kernels.gpu_cases import random_stack

RANKS, EXPERTS, INPUTS, WIDTHS = 3, 5, 37, (21, 16)
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True)
def _compiled() -> None:
    assert rows.available(), "every machine that tests has a compiler"


def held(dtype: torch.dtype) -> LoraStack:
    return located(random_stack(torch.Generator().manual_seed(0), 2, (4, 2), INPUTS, WIDTHS, dtype))


def columns_between(gap: int) -> tuple[list[int], int]:
    """Where linears begin among outputs of which ``gap`` after each belong to nobody here, and Y."""
    *first_N, width = accumulate((width + gap for width in WIDTHS), initial=0)
    return first_N, width


@TYPES
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("tokens", "room"), [(0, 2), (1, 1), (5, 8), (17, 32), (64, 64)])
def test_rows_go_where_the_twin_sends_them(dtype: torch.dtype, threads: int, tokens: int, room: int) -> None:
    g = torch.Generator().manual_seed(tokens)
    x_TH = torch.randn(tokens, INPUTS, generator=g).to(dtype)
    ids_TK = torch.randint(-1, EXPERTS, (tokens, 2), generator=g)
    weights_TK = torch.rand(tokens, 2, generator=g)
    if tokens:
        # What nobody computes must not travel: not even as a NaN times a weight of 0.
        ids_TK[0], x_TH[0] = -1, torch.nan
    slot_E = torch.randperm(EXPERTS, generator=g)
    owner_G, local_G = torch.randint(0, RANKS, (EXPERTS,), generator=g), torch.randint(0, 9, (EXPERTS,), generator=g)
    target_DG = torch.where(owner_G == torch.arange(RANKS)[:, None], local_G, -1)
    target_DG = torch.nn.functional.pad(target_DG, (0, 1), value=-1)
    absent_N1 = torch.tensor([[False], [True]])
    first_N, width = columns_between(0)
    group = cpu.Group.of(held(dtype), width, first_N, absent_N1=absent_N1)
    choice = GateChoice(slots=2, gated=False, ids_TK=ids_TK, weights_TK=weights_TK, slot_E=slot_E)
    uses_G = torch.zeros(EXPERTS, dtype=torch.int64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        step = cpu.Pass.of(choice, tokens, uses_G=uses_G)
    finally:
        torch.set_num_threads(before)
    shape = (RANKS, room, len(WIDTHS), 2)
    found = (
        torch.full((RANKS, room, INPUTS), torch.nan, dtype=dtype),
        torch.full(shape, 7, dtype=torch.int32),
        torch.full(shape, torch.nan),
    )
    rows.lay_out(found, x_TH, group, step, target_DG)

    slots_TK = torch.where(ids_TK >= 0, slot_E[ids_TK.clamp_min(0)], -1)
    slots_TNK = slots_TK[:, None].expand(-1, len(WIDTHS), -1).masked_fill(absent_N1, -1)
    position_DT = torch.arange(RANKS * room).view(RANKS, room)
    expected = permute_reference(
        x_TH, target_DG[:, slots_TNK], weights_TK[:, None].expand(slots_TNK.shape), position_DT, RANKS * room
    )
    for values, twin in zip(found, expected, strict=True):
        assert torch.equal(values.flatten(0, 1), twin)
    assert torch.equal(uses_G, torch.bincount(slots_TNK[slots_TNK >= 0], minlength=EXPERTS))


@TYPES
@pytest.mark.parametrize("prototypes", [False, True])
def test_gates_choose_as_they_do_where_nothing_travels(dtype: torch.dtype, prototypes: bool) -> None:
    g = torch.Generator().manual_seed(3)
    x_TH = torch.randn(23, INPUTS, generator=g).to(dtype)
    gate_PH = torch.randn(len(WIDTHS) * EXPERTS, INPUTS, generator=g)
    prototype_E = torch.arange(EXPERTS) % 2 == 1 if prototypes else None
    choice = GateChoice(slots=2, top_k_T=torch.randint(1, 3, (23,), generator=g), prototype_E=prototype_E)
    first_N, width = columns_between(0)
    group = cpu.Group.of(held(dtype), width, first_N, gate_PH)
    target_1G = torch.arange(EXPERTS)[None]
    shape = (1, 32, len(WIDTHS), 2)
    found = torch.empty(1, 32, INPUTS, dtype=dtype), torch.empty(shape, dtype=torch.int32), torch.empty(shape)
    shares_TE = torch.zeros(23, EXPERTS)
    rows.lay_out(found, x_TH, group, cpu.Pass.of(choice, 23, shares_TE), target_1G)
    logits_TNE = cpu.gate_logits(x_TH, gate_PH).unflatten(1, (len(WIDTHS), EXPERTS))
    ids_TNK, weights_TNK = cpu.choose(logits_TNE, choice)
    assert torch.equal(found[1][0, :23].long(), ids_TNK)
    assert torch.equal(found[2][0, :23], weights_TNK)
    expected_TE = torch.zeros_like(shares_TE).scatter_add_(1, ids_TNK.flatten(1).clamp_min(0), weights_TNK.flatten(1))
    torch.testing.assert_close(shares_TE, expected_TE)


def test_rows_that_came_are_joined_rank_by_rank() -> None:
    g = torch.Generator().manual_seed(0)
    came = [
        (torch.randn(4, 7, generator=g), torch.randint(-1, 9, (4, 2, 3), generator=g, dtype=torch.int32),
         torch.rand(4, 2, 3, generator=g))
        for _ in range(RANKS)
    ]  # fmt: skip
    rows_MH, ids_MNK, weights_MNK = rows.join(*zip(*came, strict=True))
    assert ids_MNK.dtype == torch.int64
    for joined, parts in zip((rows_MH, ids_MNK, weights_MNK), zip(*came, strict=True), strict=True):
        assert torch.equal(joined, torch.cat(parts).to(joined.dtype))


@TYPES
@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_deltas_are_added_in_the_order_of_the_ranks(dtype: torch.dtype, gap: int, ranks: int) -> None:
    g = torch.Generator().manual_seed(ranks)
    first_N, width = columns_between(gap)
    group = cpu.Group.of(held(dtype), width, first_N)
    parts: list[Tensor] = [torch.randn(8, sum(WIDTHS), generator=g).to(dtype) for _ in range(ranks)]
    y_TY = torch.randn(5, width, generator=g).to(dtype)
    expected_TY = y_TY.clone()
    sums_TY = reduce(torch.add, parts)[:5].split(WIDTHS, dim=1)
    for first, sums_TO in zip(first_N, sums_TY, strict=True):
        expected_TY[:, first : first + sums_TO.shape[1]] += sums_TO
    rows.add_returned(y_TY, parts, group)
    assert torch.equal(y_TY, expected_TY)
