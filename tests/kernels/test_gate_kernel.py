"""The gate's kernel equals its twin: ties, temperatures, per-token modes, planes, and gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from meteora_kernels.gate import kernel
from meteora_kernels.gate.choice import Chosen, GateChoice
from meteora_kernels.gate.kernel import choose, launch_choose
from meteora_kernels.gate.reference import choose_reference


def mixed(tokens: int, experts: int, slots: int, g: torch.Generator) -> GateChoice:
    """Every field in use: gated tokens with a top-k and a temperature of their own, and tokens that name experts."""
    return GateChoice(
        slots,
        auto_T=torch.rand(tokens, generator=g) < 0.7,
        top_k_T=torch.randint(1, min(slots, experts) + 1, (tokens,), generator=g),
        temperature_T1=0.5 + torch.rand(tokens, 1, generator=g),
        ids_TK=torch.randint(-1, experts, (tokens, slots), generator=g),
        weights_TK=torch.rand(tokens, slots, generator=g),
        prototype_E=torch.rand(experts, generator=g) < 0.5,
        absent_N1=torch.tensor([[False], [True], [False]]),
        slot_E=torch.randperm(experts + 2, generator=g)[:experts],
        local_G=torch.where(torch.rand(experts + 2, generator=g) < 0.5, torch.arange(experts + 2), -1),
    )


def assert_same(actual: Chosen, expected: Chosen) -> None:
    assert actual.slots_TNK.tolist() == expected.slots_TNK.tolist()
    assert actual.local_TNK.tolist() == expected.local_TNK.tolist()
    torch.testing.assert_close(actual.weights_TNK, expected.weights_TNK, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("tokens", "experts", "slots"), [(1, 1, 1), (17, 3, 2), (2, 28, 28), (3, 300, 3), (3, 3, 4)])
@pytest.mark.parametrize("per_token", [False, True])
def test_kernel_equals_the_twin(tokens: int, experts: int, slots: int, per_token: bool) -> None:
    g = torch.Generator().manual_seed(experts)
    # Few values, so that many logits tie.
    logits_TNE = torch.randint(-3, 4, (tokens, 3, experts), generator=g).float()
    choice = mixed(tokens, experts, slots, g) if per_token else GateChoice(slots)
    assert_same(choose(logits_TNE, choice, tokens, 3), choose_reference(logits_TNE, choice, tokens, 3))


def test_experts_beyond_a_block_tie_to_the_smaller_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "MOST_EXPERTS_AT_ONCE", 8)
    logits_TNE = torch.zeros(2, 1, 30)
    logits_TNE[1, 0, [9, 25]] = 1.0
    chosen = choose(logits_TNE, GateChoice(3), 2, 1)
    assert chosen.slots_TNK.tolist() == [[[0, 1, 2]], [[9, 25, 0]]]


def test_planes_are_parts_of_a_sum() -> None:
    planes = torch.tensor([[[[1.0, 5.0, 0.0]]], [[[1.0, -4.5, 0.75]]]])
    chosen = launch_choose(planes, GateChoice(2), 1, 1)
    assert_same(chosen, choose_reference(planes.sum(0), GateChoice(2), 1, 1))
    assert chosen.slots_TNK.tolist() == [[[0, 2]]]


def test_without_gates_the_named_experts_act() -> None:
    ids_TK, weights_TK = torch.tensor([[2, -1], [0, 1]]), torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    choice = GateChoice(2, gated=False, ids_TK=ids_TK, weights_TK=weights_TK)
    chosen = choose(None, choice, 2, 3)
    assert chosen.slots_TNK.tolist() == ids_TK[:, None].expand(2, 3, 2).tolist()
    assert chosen.weights_TNK.tolist() == weights_TK[:, None].expand(2, 3, 2).tolist()


def test_logits_that_are_no_numbers_name_real_experts_with_no_weight_to_trust() -> None:
    logits_TNE = torch.tensor([[[0.0, float("nan"), 1.0]], [[0.0, 2.0, 1.0]]])
    chosen = choose(logits_TNE, GateChoice(2), 2, 1)
    assert chosen.slots_TNK.tolist() == [[[1, 2]], [[1, 2]]]
    assert chosen.weights_TNK[0].isnan().any()
    assert not chosen.weights_TNK[1].isnan().any()


def torch_weights(logits_TNE: Tensor, ids_TNK: Tensor, choice: GateChoice) -> Tensor:
    """The weights of given experts, as torch differentiates them."""
    if choice.prototype_E is not None:
        logits_TNE = torch.where(choice.prototype_E, logits_TNE.abs(), logits_TNE)
    chosen_TNK = logits_TNE.gather(-1, ids_TNK.clamp_min(0))
    if choice.temperature_T1 is not None:
        chosen_TNK = chosen_TNK / choice.temperature_T1[:, None]
    return torch.softmax(chosen_TNK.masked_fill(ids_TNK < 0, float("-inf")), dim=-1)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "slots"), [(17, 3, 2), (4, 300, 3)])
def test_gradient_reaches_the_logits(tokens: int, experts: int, slots: int, per_token: bool) -> None:
    g = torch.Generator().manual_seed(3)
    choice = GateChoice(slots)
    if per_token:
        own = mixed(tokens, experts, slots, g)
        choice = replace(own, auto_T=None, ids_TK=None, weights_TK=None, absent_N1=None, slot_E=None, local_G=None)
    logits_TNE = torch.randn(tokens, 3, experts, generator=g)
    grad_TNK = torch.randn(tokens, 3, slots, generator=g)
    ours, theirs = (logits_TNE.clone().requires_grad_() for _ in range(2))
    chosen = choose(ours, choice, tokens, 3)
    chosen.weights_TNK.backward(grad_TNK)
    torch_weights(theirs, chosen.slots_TNK, choice).backward(grad_TNK.masked_fill(chosen.slots_TNK < 0, 0.0))
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_one_expert_gives_the_gate_no_gradient() -> None:
    logits_TNE = torch.randn(3, 1, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    choose(logits_TNE, GateChoice(1), 3, 1).weights_TNK.sum().backward()
    assert logits_TNE.grad is not None
    assert logits_TNE.grad.abs().max() == 0
