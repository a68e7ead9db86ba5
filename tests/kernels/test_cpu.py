"""The compiled operation of the CPU against its twins, over odd sizes, mixed choices and both types."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from meteora_kernels.gate.choice import GateChoice
from meteora_kernels.gate.reference import choose_reference
from meteora_kernels.routed_lora.cpu import operators as cpu
from meteora_kernels.routed_lora.reference import routed_lora_reference
from meteora_kernels.routed_lora.stack import LoraPart, LoraStack, stack, whole_part
from meteora_kernels.routed_lora.tables import tables_of

INPUTS, WIDTHS = 37, (21, 16, 50)
FIRSTS = (0, *accumulate(WIDTHS))[:-1]
COLUMNS = sum(WIDTHS) + 5
"""The last five belong to a linear without experts."""

pytestmark = pytest.mark.skipif(not cpu.available(), reason="there is no C compiler")


TYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-in-fp32": (torch.float32, torch.bfloat16),
}
"""Of inputs and outputs, and of every other expert's matrices, whose numbers are those of bfloat16 in any case."""


def a_stack(
    experts: int,
    ranks: tuple[int | None, ...],
    g: torch.Generator,
    dtype: torch.dtype,
    other: torch.dtype | None = None,
) -> LoraStack:
    """Expert e has rank number e + n of ``ranks``, in turn, at linear n; None for none. Odd ones are of ``other``."""

    def part(e: int, n: int):
        if not (rank := ranks[(e + n) % len(ranks)]):
            return None
        a_RH, b_OR = torch.randn(rank, INPUTS, generator=g), torch.randn(WIDTHS[n], rank, generator=g)
        a_RH, b_OR = (a_RH / 6).to(other or dtype), (b_OR / rank).to(other or dtype)
        return whole_part((a_RH, b_OR, 0.5 + 0.25 * (e % 3)), other if other and e % 2 else dtype)

    held = stack([tuple(part(e, n) for n in range(3)) for e in range(experts)], INPUTS, WIDTHS, dtype)
    return replace(held, tables=tables_of(held, 16))


def a_choice(tokens: int, experts: int, slots: int, g: torch.Generator, mixed: bool) -> GateChoice:
    """By gates alone; or by gates, by name and not at all, with top-k, temperatures and prototypes of all kinds."""
    if not mixed:
        return GateChoice(slots)
    ids_TK = torch.rand(tokens, experts, generator=g).argsort(-1)[:, :slots]
    empty = torch.rand(ids_TK.shape, generator=g) < 0.3
    return GateChoice(
        slots,
        auto_T=torch.rand(tokens, generator=g) < 0.5,
        top_k_T=torch.randint(1, slots + 1, (tokens,), generator=g),
        temperature_T1=0.5 + torch.rand(tokens, 1, generator=g),
        ids_TK=ids_TK.masked_fill(empty, -1),
        weights_TK=torch.rand(ids_TK.shape, generator=g).masked_fill(empty, 0.0),
        prototype_E=torch.rand(experts, generator=g) < 0.3,
        slot_E=torch.randperm(experts, generator=g),
    )


def add(y_TY: Tensor, x_TH: Tensor, held: LoraStack, gate_PH: Tensor | None, choice: GateChoice, *outputs: Tensor):
    group = cpu.Group.of(held, COLUMNS, FIRSTS, gate_PH, choice.absent_N1, choice.local_G)
    cpu.add_routed_lora(y_TY, x_TH, group, cpu.Pass.of(choice, len(x_TH), *outputs))


def gates(experts: int, g: torch.Generator) -> Tensor:
    return torch.randn(3 * experts, INPUTS, generator=g)


@pytest.mark.parametrize("mixed", [False, True], ids=["gates", "mixed"])
@pytest.mark.parametrize(
    ("tokens", "experts", "slots", "ranks"),
    [
        (1, 3, 2, (8,)),
        (17, 28, 4, (4, 16, None, 1)),
        (63, 3, 1, (16, None)),
        (63, 300, 2, (1, 5)),
        (200, 8, 2, (64, 7, 4)),
        (33, 1, 1, (None, 4)),
        (0, 3, 2, (4,)),
    ],
)
@pytest.mark.parametrize("types", TYPES)
def test_it_chooses_counts_and_adds_as_the_twins_do(
    tokens: int, experts: int, slots: int, ranks: tuple[int | None, ...], mixed: bool, types: str
) -> None:
    g = torch.Generator().manual_seed(tokens + experts)
    dtype, other = TYPES[types]
    held, gate_PH = a_stack(experts, ranks, g, dtype, other), gates(experts, g)
    choice = replace(
        a_choice(tokens, experts, slots, g, mixed),
        absent_N1=torch.tensor([[False], [True], [False]]) if mixed else None,
        local_G=torch.randperm(experts, generator=g) if mixed else None,
    )
    x_TH, before_TY = torch.randn(tokens, INPUTS, generator=g).to(dtype), torch.randn(tokens, COLUMNS).to(dtype)
    y_TY, shares_TF, uses_G = before_TY.clone(), torch.zeros(tokens, experts), torch.zeros(experts, dtype=torch.long)
    add(y_TY, x_TH, held, gate_PH, choice, shares_TF, uses_G)
    logits_TNE = (x_TH.float() @ gate_PH.T).view(tokens, 3, experts)
    chosen = choose_reference(logits_TNE, choice, tokens, 3)
    deltas = routed_lora_reference(x_TH, held, chosen.local_TNK, chosen.weights_TNK)
    expected_TY = before_TY.float()
    expected_TY[:, : sum(WIDTHS)] += torch.cat(deltas, dim=1)
    near = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.01, "atol": 0.01}
    torch.testing.assert_close(y_TY.float(), expected_TY, **near)
    assert torch.equal(y_TY[:, sum(WIDTHS) :], before_TY[:, sum(WIDTHS) :])
    assert torch.equal(uses_G, torch.bincount(chosen.slots_TNK.flatten() + 1, minlength=experts + 1)[1:])
    torch.testing.assert_close(shares_TF.sum(1), chosen.weights_TNK.sum((1, 2)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 17, 63])
def test_experts_that_are_chosen_already_add_as_the_reference_does(tokens: int) -> None:
    g = torch.Generator().manual_seed(tokens)
    held, x_TH = a_stack(5, (4, None, 9), g, torch.float32), torch.randn(tokens, INPUTS, generator=g)
    ids_TNK, weights_TNK = torch.randint(-1, 5, (tokens, 3, 3), generator=g), torch.rand(tokens, 3, 3, generator=g)
    found = cpu.routed_lora(x_TH, held, ids_TNK, weights_TNK)
    for one, other in zip(found, routed_lora_reference(x_TH, held, ids_TNK, weights_TNK), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_token_has_the_same_bits_alone_in_company_and_on_any_threads(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(3)
    held, gate_PH = a_stack(20, (8, 4, 7), g, dtype), gates(20, g)
    choice, x_TH = a_choice(150, 20, 2, g, mixed=True), torch.randn(150, INPUTS, generator=g).to(dtype)
    together_TY = torch.ones(150, COLUMNS, dtype=dtype)
    add(together_TY, x_TH, held, gate_PH, choice)
    threads = torch.get_num_threads()
    try:
        for size, team in ((1, 1), (7, 3), (32, 2), (75, 4)):
            torch.set_num_threads(team)
            y_TY = torch.ones_like(together_TY)
            for first in range(0, 150, size):
                rows = slice(first, min(first + size, 150))
                add(y_TY[rows], x_TH[rows], held, gate_PH, choice.part(first, size))
            assert torch.equal(y_TY, together_TY)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(cpu.gate_logits(x_TH, gate_PH)[5:6], cpu.gate_logits(x_TH[5:6], gate_PH))


@pytest.mark.parametrize("tokens", [1, 8, 63])
def test_bfloat16_matrices_are_the_same_numbers_in_half_the_memory(tokens: int) -> None:
    g = torch.Generator().manual_seed(6)
    halves = a_stack(12, (8, None, 5), g, torch.float32, torch.bfloat16)
    wide = [tuple(part and widened(part) for part in expert) for expert in halves.experts]
    wides = stack(wide, INPUTS, WIDTHS, torch.float32)
    assert halves.nbytes < wides.nbytes
    gate_PH, choice, x_TH = gates(12, g), a_choice(tokens, 12, 2, g, mixed=True), torch.randn(tokens, INPUTS)
    found_TY, expected_TY = torch.zeros(2, tokens, COLUMNS)
    add(found_TY, x_TH, halves, gate_PH, choice)
    add(expected_TY, x_TH, replace(wides, tables=tables_of(wides, 16)), gate_PH, choice)
    assert torch.equal(found_TY, expected_TY)


def widened(part: LoraPart) -> LoraPart:
    return replace(part, a_RH=part.a_RH.float(), b_RO=part.b_RO.float())


def test_ties_go_to_the_smaller_number_and_not_a_number_comes_first() -> None:
    g = torch.Generator().manual_seed(4)
    held, x_TH = a_stack(6, (3,), g, torch.float32), torch.randn(4, INPUTS, generator=g)
    row_1H = torch.randn(1, INPUTS, generator=g)
    rows = [row_1H * scale for scale in (1, 2, 1, 2, 2, 1)]
    uses_G = torch.zeros(6, dtype=torch.long)
    add(torch.zeros(4, COLUMNS), x_TH, held, torch.cat(rows * 3), GateChoice(2), torch.zeros(4, 6), uses_G)
    logits_TNE = (x_TH @ torch.cat(rows * 3).T).view(4, 3, 6)
    chosen = choose_reference(logits_TNE, GateChoice(2), 4, 3)
    assert torch.equal(uses_G, torch.bincount(chosen.slots_TNK.flatten(), minlength=6))
    rows[4] = row_1H * float("nan")
    uses_G.zero_()
    add(torch.zeros(4, COLUMNS), x_TH, held, torch.cat(rows * 3), GateChoice(1), torch.zeros(4, 6), uses_G)
    assert uses_G.tolist() == [0, 0, 0, 0, 12, 0]


def test_what_is_not_used_is_not_read() -> None:
    g = torch.Generator().manual_seed(5)
    held = a_stack(4, (8,), g, torch.float32)
    for part in (*held.experts[0], *held.experts[3]):
        part.a_RH.fill_(float("nan"))
        part.b_RO.fill_(float("inf"))
    x_TH, ids_TK = torch.randn(40, INPUTS, generator=g), torch.tensor([[1, 2], [2, -1]]).repeat(20, 1)
    weights_TK = torch.tensor([[0.5, 0.5], [1.0, float("nan")]]).repeat(20, 1)
    y_TY = torch.zeros(40, COLUMNS)
    add(y_TY, x_TH, held, None, GateChoice(2, gated=False, ids_TK=ids_TK, weights_TK=weights_TK))
    assert y_TY.isfinite().all()


@pytest.mark.parametrize("experts", [8, 1000, 10_000])
@pytest.mark.parametrize("threads", [1, 2, 8])
def test_4096_tokens_need_at_most_twice_the_memory_of_their_outputs(experts: int, threads: int) -> None:
    widths = (576, 192, 192)
    held = stack([(None, None, None)] * experts, 576, widths, torch.float32)
    held = replace(held, tables=tables_of(held, 16), max_rank=16)
    group = cpu.Group.of(held, sum(widths), (0, 576, 768), torch.empty(3 * experts, 576))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert cpu.memory_needed(group, cpu.Pass.of(GateChoice(2), 4096)) <= 2 * 4096 * sum(widths) * 4
    finally:
        torch.set_num_threads(before)


def test_outputs_that_are_not_those_of_the_pass_are_refused() -> None:
    held = a_stack(2, (4,), torch.Generator(), torch.float32)
    group, step = cpu.Group.of(held, COLUMNS, FIRSTS), cpu.Pass.of(GateChoice(1), 3)
    for y_TY in (torch.zeros(2, COLUMNS), torch.zeros(3, 2 * COLUMNS)[:, ::2]):
        with pytest.raises(AssertionError):
            cpu.add_routed_lora(y_TY, torch.zeros(3, INPUTS), group, step)


@pytest.mark.parametrize("mixed", [False, True], ids=["gates", "mixed"])
@pytest.mark.parametrize(("tokens", "experts", "slots"), [(1, 3, 2), (17, 28, 4), (63, 300, 2), (5, 1, 1), (0, 3, 2)])
def test_a_choice_alone(tokens: int, experts: int, slots: int, mixed: bool) -> None:
    g = torch.Generator().manual_seed(tokens)
    choice = replace(a_choice(tokens, experts, slots, g, mixed), slot_E=None)
    # Whole numbers, so that many are equal.
    logits_TNE = torch.randint(-3, 4, (tokens, 3, experts), generator=g).float()
    ids_TNK, weights_TNK = cpu.choose(logits_TNE, choice)
    expected = choose_reference(logits_TNE, choice, tokens, 3)
    assert torch.equal(ids_TNK, expected.slots_TNK)
    torch.testing.assert_close(weights_TNK, expected.weights_TNK)
