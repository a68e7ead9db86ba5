"""The GPU operators equal the loop in the interpreter: values and gradients, both regimes, odd sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from meteora_kernels.gate.choice import GateChoice
from meteora_kernels.gate.reference import choose_reference
from meteora_kernels.launch import Launch
from meteora_kernels.routed_lora import operators
from meteora_kernels.routed_lora.dense import pack
from meteora_kernels.routed_lora.reference import routed_lora_reference, shrink_reference
from meteora_kernels.routed_lora.stack import Expert, LoraPart, LoraStack, stack
from meteora_kernels.routed_lora.tables import tables_of
from tests.kernels.gpu_cases import FEW, MANY, random_stack, traffic

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
RoutedLora = Callable[[Tensor, LoraStack, Tensor, Tensor], tuple[Tensor, ...]]
REGIMES = pytest.mark.parametrize("regime", ["grouped", "dense"])
# tokens, experts, ranks, slots, traffic, regime, launch: every value of each, and what goes wrong first.
CASES = [
    (1, 1, (1,), 1, "uniform", "grouped", FEW),
    (1, 1, (4,), 1, "uniform", "dense", FEW),
    (17, 3, (4, 16, 1), 2, "uniform", "grouped", MANY),
    (17, 3, (4, 16, 1), 2, "uniform", "dense", FEW),
    (63, 3, (8,), 2, "one", "grouped", MANY),
    (63, 28, (1, 4), 2, "holes", "dense", MANY),
    (5, 28, (8, 64), 3, "holes", "grouped", FEW),
    (3, 300, (1, 4), 2, "uniform", "grouped", FEW),
    (3, 3, (4,), 2, "empty", "grouped", FEW),
    (3, 3, (4,), 2, "empty", "dense", MANY),
]
NAMES = "tokens", "experts", "ranks", "slots", "kind", "regime", "launch"
COVERING = pytest.mark.parametrize(NAMES, CASES, ids=[f"{c[0]}-of-{c[1]}-{c[4]}-{c[5]}" for c in CASES])
ALL = [
    (tokens, experts, ranks, min(2, experts), kind, regime, launch)
    for tokens in (1, 17, 63)
    for experts in (1, 3, 28, 300)
    for ranks in ((1,), (4,), (8,), (16,), (64,), (4, 1, 64, 8))
    for kind in ("uniform", "one", "holes")
    for regime in ("grouped", "dense")
    for launch in (FEW, MANY)
]


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory holds NaN, so that whatever is read before it is written shows."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() and not made.is_meta else made

    monkeypatch.setattr(torch, "empty", poisoned)


def gpu(x_TH: Tensor, stack: LoraStack, ids_TNK: Tensor, weights_TNK: Tensor, launch: Launch) -> tuple[Tensor, ...]:
    tables = tables_of(stack, launch.outputs)
    return operators.routed_lora(x_TH, stack, tables, ids_TNK, weights_TNK, launch)


def compare(
    tokens: int, experts: int, ranks: tuple[int, ...], slots: int, kind: str, regime: str, launch: Launch
) -> None:
    g = torch.Generator().manual_seed(experts)
    stack = random_stack(g, experts, ranks)
    ids_TNK, weights_TNK = traffic(kind, tokens, 2, slots, experts, g)
    x_TH = torch.randn(tokens, stack.in_features, generator=g)
    expected = routed_lora_reference(x_TH, stack, ids_TNK, weights_TNK)
    actual = gpu(x_TH, laid_out(stack, regime), ids_TNK, weights_TNK, launch)
    for delta_TO, expected_TO in zip(actual, expected, strict=True):
        torch.testing.assert_close(delta_TO, expected_TO, **CLOSE)


def laid_out(stack: LoraStack, regime: str) -> LoraStack:
    return pack(stack) if regime == "dense" else stack


@COVERING
def test_operator_equals_the_loop(
    tokens: int, experts: int, ranks: tuple[int, ...], slots: int, kind: str, regime: str, launch: Launch
) -> None:
    compare(tokens, experts, ranks, slots, kind, regime, launch)


@pytest.mark.parametrize("missing", [[], [(None, None), (None, None)]], ids=["nobody", "nothing"])
@REGIMES
def test_a_stack_without_pairs_adds_nothing(missing: list[Expert], regime: str) -> None:
    empty = stack(missing, 12, (8, 40), torch.float32)
    if missing:
        empty = laid_out(empty, regime)
    ids_TNK, weights_TNK = torch.full((3, 2, 1), -1), torch.zeros(3, 2, 1)
    for launch in (FEW, MANY):
        deltas = gpu(torch.ones(3, 12), empty, ids_TNK, weights_TNK, launch)
        assert [tuple(delta_TO.shape) for delta_TO in deltas] == [(3, 8), (3, 40)]
        assert all(bool((delta_TO == 0).all()) for delta_TO in deltas)


@REGIMES
@pytest.mark.parametrize("tokens", [0, 1])
def test_no_tokens_bring_no_rows(regime: str, tokens: int) -> None:
    pairs = laid_out(random_stack(torch.Generator().manual_seed(8), 3, (4,)), regime)
    ids_TNK, weights_TNK = torch.zeros(tokens, 2, 1, dtype=torch.long), torch.ones(tokens, 2, 1)
    x_TH, gate_PH = torch.ones(tokens, pairs.in_features), torch.ones(6, pairs.in_features)
    assert [delta_TO.shape[0] for delta_TO in gpu(x_TH, pairs, ids_TNK, weights_TNK, FEW)] == [tokens] * 2
    chosen, deltas = operators.fused(x_TH, gate_PH, GateChoice(1), pairs, tables_of(pairs, 32), FEW)
    assert chosen.slots_TNK.tolist() == ids_TNK.tolist()
    assert [delta_TO.shape[0] for delta_TO in deltas] == [tokens] * 2


@REGIMES
def test_half_precision(regime: str) -> None:
    g = torch.Generator().manual_seed(6)
    stack = random_stack(g, 4, (4, 17), in_features=40, dtype=torch.float16)
    ids_TNK, weights_TNK = traffic("holes", 9, 2, 2, 4, g)
    x_TH = torch.randn(9, 40, generator=g).half()
    expected = routed_lora_reference(x_TH, stack, ids_TNK, weights_TNK)
    actual = gpu(x_TH, laid_out(stack, regime), ids_TNK, weights_TNK, MANY)
    for delta_TO, expected_TO in zip(actual, expected, strict=True):
        assert delta_TO.dtype == torch.float16
        assert (delta_TO.float() - expected_TO).norm() <= 2e-3 * expected_TO.norm()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_operator_equals_the_loop_over_the_full_product() -> None:
    for case in ALL:
        compare(*case)


@REGIMES
@pytest.mark.parametrize("gated", [True, False])
def test_fused_is_choice_then_deltas(regime: str, gated: bool) -> None:
    g = torch.Generator().manual_seed(1)
    tokens, experts = 5, 5
    stack = laid_out(random_stack(g, experts, (4, 16, 1)), regime)
    x_TH = torch.randn(tokens, stack.in_features, generator=g)
    gate_PH = torch.randn(2 * experts, stack.in_features, generator=g)
    auto_T = torch.arange(tokens) % 3 > 0 if gated else None
    named = {"ids_TK": torch.randint(-1, experts, (tokens, 2), generator=g), "weights_TK": torch.rand(tokens, 2)}
    choice = GateChoice(2, gated, auto_T=auto_T, slot_E=torch.randperm(experts, generator=g), **named)
    logits_TNE = (x_TH @ gate_PH.T).view(tokens, 2, experts) if gated else None
    expected = choose_reference(logits_TNE, choice, tokens, 2)
    deltas = routed_lora_reference(x_TH, stack, expected.local_TNK, expected.weights_TNK)
    for launch in (FEW, MANY):
        tables = tables_of(stack, launch.outputs)
        chosen, actual = operators.fused(x_TH, gate_PH if gated else None, choice, stack, tables, launch)
        assert chosen.slots_TNK.tolist() == expected.slots_TNK.tolist()
        torch.testing.assert_close(chosen.weights_TNK, expected.weights_TNK, **CLOSE)
        for delta_TO, expected_TO in zip(actual, deltas, strict=True):
            torch.testing.assert_close(delta_TO, expected_TO, **CLOSE)


@REGIMES
def test_a_token_does_not_depend_on_its_batch(regime: str) -> None:
    g = torch.Generator().manual_seed(2)
    stack = laid_out(random_stack(g, 6, (4, 16, 1), in_features=70), regime)
    x_TH, gate_PH = torch.randn(18, 70, generator=g), torch.randn(12, 70, generator=g)
    together, alone = (
        operators.fused(rows, gate_PH, GateChoice(2), stack, tables_of(stack, launch.outputs), launch)
        for rows, launch in ((x_TH, MANY), (x_TH[16:17], FEW))
    )
    assert torch.equal(together[0].weights_TNK[16:17], alone[0].weights_TNK)
    for delta_TO, single_TO in zip(together[1], alone[1], strict=True):
        assert torch.equal(delta_TO[16:17], single_TO)


def test_halves_of_pairs_add_up() -> None:
    g = torch.Generator().manual_seed(3)
    whole = random_stack(g, 3, (4, 5, 1))
    ids_TNK, weights_TNK = traffic("holes", 7, 2, 2, 3, g)
    x_TH = torch.randn(7, whole.in_features, generator=g)
    parts = [halved(whole, holder) for holder in range(2)]
    shrunk = sum(operators.shrink(x_TH, part, tables_of(part, 32), ids_TNK, MANY) for part in parts)
    torch.testing.assert_close(shrunk, shrink_reference(x_TH, whole, ids_TNK), **CLOSE)
    deltas = operators.expand(shrunk, parts[0], tables_of(parts[0], 32), ids_TNK, weights_TNK, MANY)
    for delta_TO, expected_TO in zip(deltas, routed_lora_reference(x_TH, whole, ids_TNK, weights_TNK), strict=True):
        torch.testing.assert_close(delta_TO, expected_TO, **CLOSE)


def halved(whole: LoraStack, holder: int) -> LoraStack:
    """Half of each pair's ranks of A, and B whole, as a rank of a tp group that splits outputs would have them."""

    def half(part: LoraPart | None) -> LoraPart | None:
        if part is None:
            return None
        rows = slice((part.rank + 1) // 2, part.rank) if holder else slice(0, (part.rank + 1) // 2)
        return replace(part, a_RH=part.a_RH[rows], first_a=rows.start)

    experts = tuple(tuple(half(part) for part in expert) for expert in whole.experts)
    return replace(whole, experts=experts)


def leaves_of(stack: LoraStack) -> list[Tensor]:
    if stack.packed is not None:
        return [stack.packed.a_CH, *stack.packed.b_CO]
    parts = [part for n in range(stack.num_linears) for expert in stack.experts if (part := expert[n])]
    return [*(part.a_RH for part in parts), *(part.b_RO for part in parts)]


def gradients(operator: RoutedLora, regime: str, kind: str, tokens: int = 18) -> list[Tensor | None]:
    """Of input, weights and matrices, for one fixed loss."""
    g = torch.Generator().manual_seed(4)
    stack = random_stack(g, 5, (4, 17, 1))
    if operator is not routed_lora_reference or regime == "grouped":
        stack = laid_out(stack, regime)
    leaves = leaves_of(stack)
    for leaf in leaves:
        leaf.requires_grad_()
    ids_TNK, weights_TNK = traffic(kind, tokens, 2, 2, 5, g)
    x_TH = torch.randn(tokens, stack.in_features, generator=g).requires_grad_()
    weights_TNK.requires_grad_()
    deltas = operator(x_TH, stack, ids_TNK, weights_TNK)
    sum((delta_TO.sin() * (n + 1)).sum() for n, delta_TO in enumerate(deltas)).backward()
    grad_weights = weights_TNK.grad.masked_fill(ids_TNK < 0, 0.0)
    return [x_TH.grad, grad_weights, *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("kind", ["holes", "one"])
@pytest.mark.parametrize(("launch", "tokens"), [(FEW, 4), (MANY, 18)], ids=["few", "many"])
def test_gradients_of_separate_matrices(kind: str, launch: Launch, tokens: int) -> None:
    ours = gradients(lambda x, stack, ids, weights: gpu(x, stack, ids, weights, launch), "grouped", kind, tokens)
    theirs = gradients(routed_lora_reference, "grouped", kind, tokens)
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, **CLOSE)


def test_gradients_of_packed_matrices() -> None:
    ours = gradients(lambda x, stack, ids, weights: gpu(x, stack, ids, weights, MANY), "dense", "holes")
    x_grad, weight_grad, *apart = gradients(routed_lora_reference, "grouped", "holes")
    pairs = len(apart) // 2
    of_b = apart[pairs:]
    # All five experts adapt the first linear.
    expected = [x_grad, weight_grad, torch.cat(apart[:pairs]), torch.cat(of_b[:5]), torch.cat(of_b[5:])]
    for actual, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(actual, wanted, **CLOSE)
