"""Routed LoRA: worked examples, then loop = dense = grouped = split over sizes and routings (oracle 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from meteora_kernels.launch import tiles_of
from meteora_kernels.routed_lora import plan
from meteora_kernels.routed_lora.dense import pack, routed_lora_dense
from meteora_kernels.routed_lora.grouped import expand_grouped, routed_lora_grouped, shrink_grouped
from meteora_kernels.routed_lora.reference import expand_reference, routed_lora_reference, shrink_reference
from meteora_kernels.routed_lora.stack import Expert, LoraPart, LoraStack, stack, whole_part

RoutedLora = Callable[[Tensor, LoraStack, Tensor, Tensor], tuple[Tensor, ...]]


def dense(x_TH: Tensor, stack: LoraStack, ids_TNK: Tensor, weights_TNK: Tensor) -> tuple[Tensor, ...]:
    return routed_lora_dense(x_TH, pack(stack), ids_TNK, weights_TNK)


def grouped_in_two(x_TH: Tensor, stack: LoraStack, ids_TNK: Tensor, weights_TNK: Tensor) -> tuple[Tensor, ...]:
    return expand_grouped(shrink_grouped(x_TH, stack, ids_TNK), stack, ids_TNK, weights_TNK)


FAST = [dense, routed_lora_grouped, grouped_in_two]
ALL = [routed_lora_reference, *FAST]


def random_stack(
    generator: torch.Generator, experts: int = 5, in_features: int = 12, widths: tuple[int, ...] = (8, 4)
) -> LoraStack:
    """Mixed ranks 1 to 4; expert 1 lacks the last linear, and no expert's scale equals another's."""

    def part(n: int, e: int) -> LoraPart | None:
        if e == 1 and n == len(widths) - 1:
            return None
        rank = 1 + (e + n) % 4
        a_RH = torch.randn(rank, in_features, generator=generator)
        return whole_part((a_RH, torch.randn(widths[n], rank, generator=generator), 0.5 + 0.25 * e), torch.float32)

    rows = [tuple(part(n, e) for n in range(len(widths))) for e in range(experts)]
    return stack(rows, in_features, widths, torch.float32)


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
    pairs = stack([(whole_part(pair, torch.float32),) for pair in (first, second)], 2, [2], torch.float32)
    x_TH = torch.tensor([[3.0, 5.0], [3.0, 5.0], [3.0, 5.0]])
    ids_TNK = torch.tensor([[[0, 1]], [[1, -1]], [[-1, -1]]])
    weights_TNK = torch.tensor([[[0.25, 0.75]], [[1.0, 0.0]], [[0.0, 0.0]]])
    (delta_TO,) = operator(x_TH, pairs, ids_TNK, weights_TNK)
    assert delta_TO.tolist() == [[2.25, 0.25 * 2 * 3 + 3.75], [3.0, 5.0], [0.0, 0.0]]


@pytest.mark.parametrize("operator", FAST)
@pytest.mark.parametrize("traffic", ["uniform", "identical", "empty", "holes"])
@pytest.mark.parametrize("tokens", [0, 1, 8, 64, 1024])
@pytest.mark.parametrize("slots", [1, 2, 5])
def test_fast_operators_equal_the_loop(operator: RoutedLora, traffic: str, tokens: int, slots: int) -> None:
    g = torch.Generator().manual_seed(tokens * 10 + slots)
    pairs = random_stack(g)
    ids_TNK = routing(traffic, tokens, 2, slots, 5, g)
    weights_TNK = torch.rand(ids_TNK.shape, generator=g).masked_fill(ids_TNK < 0, 0.0)
    x_TH = torch.randn(tokens, 12, generator=g)
    expected = routed_lora_reference(x_TH, pairs, ids_TNK, weights_TNK)
    actual = operator(x_TH, pairs, ids_TNK, weights_TNK)
    for delta_TO, expected_TO in zip(actual, expected, strict=True):
        torch.testing.assert_close(delta_TO, expected_TO, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("operator", ALL)
def test_a_stack_without_any_pair_adds_nothing(operator: RoutedLora) -> None:
    pairs = stack([(None,), (None,)], 3, [4], torch.float32)
    (delta_TO,) = operator(torch.ones(2, 3), pairs, torch.tensor([[[0]], [[1]]]), torch.ones(2, 1, 1))
    assert delta_TO.tolist() == [[0.0] * 4] * 2


@pytest.mark.parametrize("operator", ALL)
def test_gradients_reach_input_and_weights(operator: RoutedLora) -> None:
    g = torch.Generator().manual_seed(3)
    pairs = random_stack(g)
    ids_TNK = routing("uniform", 6, 2, 2, 5, g)
    grads = []
    for op in (operator, routed_lora_reference):
        x_TH = torch.randn(6, 12, generator=torch.Generator().manual_seed(4)).requires_grad_()
        weights_TNK = torch.rand(6, 2, 2, generator=torch.Generator().manual_seed(5)).requires_grad_()
        sum(delta.square().sum() for delta in op(x_TH, pairs, ids_TNK, weights_TNK)).backward()
        grads.append((x_TH.grad, weights_TNK.grad))
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def halved(pairs: LoraStack) -> LoraStack:
    """The same experts in bfloat16, for inputs as before."""
    experts = [
        tuple(part and replace(part, a_RH=part.a_RH.bfloat16(), b_RO=part.b_RO.bfloat16()) for part in expert)
        for expert in pairs.experts
    ]
    return stack(experts, pairs.in_features, pairs.out_features, pairs.dtype)


@pytest.mark.parametrize("operator", [*FAST, plan.routed_lora])
def test_bfloat16_matrices_meet_fp32_inputs(operator: RoutedLora) -> None:
    g = torch.Generator().manual_seed(11)
    pairs = halved(random_stack(g))
    ids_TNK = routing("holes", 8, 2, 2, 5, g)
    weights_TNK = torch.rand(ids_TNK.shape, generator=g).masked_fill(ids_TNK < 0, 0.0)
    x_TH = torch.randn(8, 12, generator=g)
    if operator is plan.routed_lora:
        pairs = plan.located(plan.arrange(pairs))
    for delta_TO, expected_TO in zip(
        operator(x_TH, pairs, ids_TNK, weights_TNK),
        routed_lora_reference(x_TH, pairs, ids_TNK, weights_TNK),
        strict=True,
    ):
        assert delta_TO.dtype == torch.float32
        torch.testing.assert_close(delta_TO, expected_TO, rtol=1e-5, atol=1e-5)


def test_experts_of_two_types_are_not_packed() -> None:
    pairs = random_stack(torch.Generator().manual_seed(12))
    assert plan.arrange(pairs).packed is not None
    assert plan.arrange(halved(pairs)).packed is not None
    mixed = stack([*pairs.experts, *halved(pairs).experts], 12, pairs.out_features, torch.float32)
    assert plan.arrange(mixed).packed is None


@pytest.mark.parametrize(
    ("stored", "dtype", "device_type", "held"),
    [
        (torch.bfloat16, torch.float32, "cpu", torch.bfloat16),
        (torch.float32, torch.float32, "cpu", torch.float32),
        (torch.float16, torch.float32, "cpu", torch.float32),
        (torch.float32, torch.bfloat16, "cpu", torch.bfloat16),
        (torch.bfloat16, torch.float32, "cuda", torch.float32),
    ],
)
def test_the_type_matrices_are_held_in(
    stored: torch.dtype, dtype: torch.dtype, device_type: str, held: torch.dtype
) -> None:
    assert plan.held_dtype(stored, dtype, device_type) == held


def test_shrink_by_hand() -> None:
    # One linear, ranks 2 and 1, of which row 1 of expert 0 is held elsewhere. Slots are as wide as the largest rank.
    first = LoraPart(torch.tensor([[1.0, 2.0]]), torch.zeros(2, 3), 5.0, rank=2, first_a=0)
    second = LoraPart(torch.tensor([[0.0, 1.0]]), torch.zeros(1, 3), 7.0, rank=1)
    pairs = stack([(first,), (second,)], 2, [3], torch.float32)
    ids_TNK = torch.tensor([[[0, 1]], [[1, -1]]])
    for shrink in (shrink_reference, shrink_grouped):
        shrunk_TNKR = shrink(torch.tensor([[1.0, 10.0], [2.0, 20.0]]), pairs, ids_TNK)
        assert shrunk_TNKR.tolist() == [[[[21.0, 0.0], [10.0, 0.0]]], [[[20.0, 0.0], [0.0, 0.0]]]]


def test_expand_by_hand() -> None:
    # Of expert 0, rank 2, only row 1 of B is here; scale 2, weight 0.5. The empty slot's numbers are ignored.
    part = LoraPart(torch.zeros(2, 1), torch.tensor([[1.0, 3.0]]), 2.0, rank=2, first_b=1)
    pairs = stack([(part,)], 1, [2], torch.float32)
    shrunk_TNKR = torch.tensor([[[[100.0, 4.0], [9.0, 9.0]]]])
    for expand in (expand_reference, expand_grouped):
        (delta_TO,) = expand(shrunk_TNKR, pairs, torch.tensor([[[0, -1]]]), torch.tensor([[[0.5, 0.0]]]))
        assert delta_TO.tolist() == [[4.0, 12.0]]


def cut(pairs: LoraStack, holder: int, shrunk: bool) -> LoraStack:
    """What one of two holders has: half of each pair's ranks of A (``shrunk``) or of B, and the other matrix whole."""

    def part(of: LoraPart | None) -> LoraPart | None:
        if of is None:
            return None
        middle = (of.rank + 1) // 2
        rows = slice(middle, of.rank) if holder else slice(0, middle)
        if shrunk:
            return LoraPart(of.a_RH[rows], of.b_RO, of.scale, of.rank, first_a=rows.start)
        return LoraPart(of.a_RH, of.b_RO[rows], of.scale, of.rank, first_b=rows.start)

    experts: list[Expert] = [tuple(map(part, expert)) for expert in pairs.experts]
    return stack(experts, pairs.in_features, pairs.out_features, torch.float32)


@pytest.mark.parametrize("shrunk", [True, False])
@pytest.mark.parametrize("traffic", ["uniform", "holes"])
def test_parts_of_pairs_add_up(shrunk: bool, traffic: str) -> None:
    g = torch.Generator().manual_seed(9)
    pairs = random_stack(g)
    ids_TNK = routing(traffic, 16, 2, 2, 5, g)
    weights_TNK = torch.rand(ids_TNK.shape, generator=g).masked_fill(ids_TNK < 0, 0.0)
    x_TH = torch.randn(16, 12, generator=g)
    parts = [cut(pairs, holder, shrunk) for holder in range(2)]
    shrunken = [shrink_grouped(x_TH, part, ids_TNK) for part in parts]
    # A reduction adds up either the shrunk inputs, before each holder expands them, or what was expanded.
    first = sum(shrunken) if shrunk else shrunken[0]
    expanded = [expand_grouped(first, part, ids_TNK, weights_TNK) for part in parts]
    deltas = expanded[0] if shrunk else [a + b for a, b in zip(*expanded, strict=True)]
    for delta_TO, expected_TO in zip(deltas, routed_lora_reference(x_TH, pairs, ids_TNK, weights_TNK), strict=True):
        torch.testing.assert_close(delta_TO, expected_TO, rtol=1e-5, atol=1e-5)
    for part, shrunk_TNKR in zip(parts, shrunken, strict=True):
        torch.testing.assert_close(shrunk_TNKR, shrink_reference(x_TH, part, ids_TNK), rtol=1e-5, atol=1e-5)
    assert plan.arrange(parts[0]).packed is None


def test_a_stack_with_other_experts_shares_what_stays() -> None:
    pairs = random_stack(torch.Generator().manual_seed(7))
    fewer = stack([pairs.experts[e] for e in (4, 0)], pairs.in_features, pairs.out_features, torch.float32)
    moved, first = fewer.experts[0][0], pairs.experts[4][0]
    assert moved is not None
    assert first is not None
    assert moved.a_RH.data_ptr() == first.a_RH.data_ptr()
    assert fewer.scales_NE.tolist() == pairs.scales_NE[:, [4, 0]].tolist()


def test_packed_experts_are_views() -> None:
    pairs = random_stack(torch.Generator().manual_seed(8))
    packed = pack(pairs)
    assert packed.packed is not None
    inside = packed.packed.a_CH.untyped_storage().data_ptr()
    for before, after in zip(pairs.experts, packed.experts, strict=True):
        for old, new in zip(before, after, strict=True):
            assert (old is None) == (new is None)
            if old and new:
                assert torch.equal(old.a_RH, new.a_RH)
                assert torch.equal(old.b_RO, new.b_RO)
                assert new.a_RH.untyped_storage().data_ptr() == inside
    assert packed.nbytes == pairs.nbytes


def set_dense_columns(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setattr(plan, "tiles_of", lambda device: replace(tiles_of(device), dense_columns=columns))


def test_a_small_stack_is_served_densely(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = random_stack(torch.Generator().manual_seed(3))
    set_dense_columns(monkeypatch, max(pairs.columns))
    assert plan.arrange(pairs).packed is not None
    set_dense_columns(monkeypatch, max(pairs.columns) - 1)
    assert plan.arrange(pairs).packed is None


@pytest.mark.parametrize("dense", [True, False])
def test_what_is_not_here_yet_has_room(monkeypatch: pytest.MonkeyPatch, dense: bool) -> None:
    pairs = random_stack(torch.Generator().manual_seed(5))
    set_dense_columns(monkeypatch, max(pairs.columns) if dense else 0)
    # Expert 1 is still to be read; the others are copied, or stay where they are.
    unread = tuple(
        part and replace(part, a_RH=part.a_RH.to("meta"), b_RO=part.b_RO.to("meta")) for part in pairs.experts[1]
    )
    laid_out = plan.arrange(replace(pairs, experts=(pairs.experts[0], unread, *pairs.experts[2:])))
    for place, part in zip(laid_out.experts[1], pairs.experts[1], strict=True):
        if place and part:
            place.a_RH.copy_(part.a_RH)
            place.b_RO.copy_(part.b_RO)
    expected = plan.arrange(pairs)
    assert (laid_out.packed is None) == (expected.packed is None) == (not dense)
    for found, wanted in zip(laid_out.experts, expected.experts, strict=True):
        for place, part in zip(found, wanted, strict=True):
            assert (place is None) == (part is None)
            if place and part:
                assert torch.equal(place.a_RH, part.a_RH)
                assert torch.equal(place.b_RO, part.b_RO)
    if laid_out.packed and expected.packed:
        assert torch.equal(laid_out.packed.a_CH, expected.packed.a_CH)
        assert torch.equal(laid_out.packed.pair_of_C, expected.packed.pair_of_C)


def test_a_stack_without_experts_adds_nothing() -> None:
    nobody = plan.arrange(stack([], 12, (8, 4), torch.float32))
    ids_TNK, weights_TNK = torch.full((3, 2, 2), -1), torch.zeros(3, 2, 2)
    deltas = plan.routed_lora(torch.ones(3, 12), nobody, ids_TNK, weights_TNK)
    assert [tuple(delta_TO.shape) for delta_TO in deltas] == [(3, 8), (3, 4)]
    assert all(delta_TO.abs().sum() == 0 for delta_TO in deltas)
