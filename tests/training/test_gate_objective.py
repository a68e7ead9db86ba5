"""The objective against its readable twin and the method's oracles, on a tiny model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from meteora_dist.bank import Bank
from meteora_dist.moe.dispatcher import LocalDispatcher
from meteora_dist.moe.experts import stack_experts
from meteora_dist.moe.layer import GroupState, RoutedGroup, RoutingContext
from meteora_dist.moe.linears import SHARED_INPUTS
from meteora_dist.moe.sharding import GroupShape
from meteora_dist.planning.known import KNOWN
from meteora_dist.training.data import Batch
from meteora_dist.training.gate_objective import GateObjective
from meteora_dist.training.reference import LoopModel
from meteora_dist.training.settings import GateSettings
from meteora_dist.training.trained_group import GroupTraining, TrainedGroup
from tests.support.tiny import SPECS, load_tiny_llama

EXPERTS = len(SPECS)
Made = Callable[..., GateObjective]


@pytest.fixture
def made(tiny_base: Path, tiny_bank: Bank) -> Made:
    def make(trained: int = EXPERTS, **options: object) -> GateObjective:
        settings = GateSettings(**options)  # type: ignore[arg-type]
        return GateObjective(load_tiny_llama(tiny_base), tiny_bank, trained, settings, torch.float32)

    return make


def batch(forced: bool = False, prompt: int = 0) -> Batch:
    """Four sequences, one an expert, the second shorter than the others; ``prompt`` tokens do not count."""
    ids_BL = torch.randint(250, (EXPERTS, 9), generator=torch.Generator().manual_seed(3))
    mask_BL = torch.ones_like(ids_BL)
    mask_BL[1, 6:] = 0
    counted_BL = mask_BL.bool()
    counted_BL[:, :prompt] = False
    experts_BL = torch.arange(EXPERTS)[:, None].expand_as(ids_BL)
    return Batch(ids_BL, mask_BL, counted_BL, experts_BL, (forced,) * EXPERTS)


def composite(forced: bool) -> Batch:
    """The same tokens with another expert every few of them, other ones in every sequence."""
    one = batch()
    starts_BL = torch.arange(9).div(4, rounding_mode="floor") + torch.arange(EXPERTS)[:, None]
    return replace(one, experts_BL=starts_BL % EXPERTS, forced=(forced,) * EXPERTS)


def mean_loss(objective: GateObjective, of: Batch) -> Tensor:
    return objective(of, (1 / of.counted,))[0]


def gate_gradients(objective: GateObjective) -> dict[str, Tensor]:
    return {
        name: grad_EH
        for tap in objective._taps
        for name, grad_EH in zip(tap.names, tap.group.trained_NAH.grad, strict=True)
    }


@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
@pytest.mark.parametrize("prompt", [0, 4])
def test_losses_and_gradients_are_those_of_the_loop_over_experts(
    made: Made, tiny_base: Path, tiny_bank: Bank, top_k: int, prompt: int
) -> None:
    twin = LoopModel(load_tiny_llama(tiny_base), tiny_bank, top_k, torch.float32)
    objective = made(top_k=top_k)
    ours, theirs = mean_loss(objective, batch(prompt=prompt)), twin(batch(prompt=prompt), beta=50.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    ours.backward()
    theirs.backward()
    for name, grad_EH in gate_gradients(objective).items():
        expected_EH = twin.linears[name].gate_EH.grad
        assert (grad_EH - expected_EH).norm() < 1e-3 * expected_EH.norm(), name


def test_labels_may_change_inside_a_sequence(made: Made, tiny_base: Path, tiny_bank: Bank) -> None:
    twin = LoopModel(load_tiny_llama(tiny_base), tiny_bank, 2, torch.float32)
    objective, mixed = made(), composite(forced=False)
    ours, theirs = mean_loss(objective, mixed), twin(mixed, beta=50.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    assert not torch.isclose(ours, mean_loss(objective, batch()), rtol=1e-2)
    ours.backward()
    theirs.backward()
    for name, grad_EH in gate_gradients(objective).items():
        expected_EH = twin.linears[name].gate_EH.grad
        assert (grad_EH - expected_EH).norm() < 1e-3 * expected_EH.norm(), name


def test_the_lm_term_moves_gates_from_two_experts_on(made: Made) -> None:
    for top_k, moves in ((1, False), (2, True)):
        objective = made(top_k=top_k, beta=0.0)
        mean_loss(objective, batch()).backward()
        for name, grad_EH in gate_gradients(objective).items():
            assert bool(grad_EH.abs().max() > 0) == moves, (top_k, name)


def test_zero_gates_lose_exactly_ln_e(made: Made) -> None:
    objective = made(lm=False, beta=1.0)
    for tap in objective._taps:
        tap.group.trained_NAH.data.zero_()
    assert mean_loss(objective, batch()).item() == pytest.approx(math.log(EXPERTS), rel=1e-6)


def test_gates_of_llama_3_8b_with_28_experts() -> None:
    shape = KNOWN["Llama-3.1-8B"]
    parameters = 0
    for linears in shape.groups:
        names = tuple(linear.name for linear in linears)
        outputs = tuple(linear.out_features for linear in linears)
        group_shape = GroupShape(names, linears[0].in_features, outputs)
        gate_PH = torch.empty(28 * len(names), group_shape.in_features, device="meta")
        stack = stack_experts([], group_shape, torch.float32, torch.device("meta"))
        group = RoutedGroup(
            group_shape, GroupState((gate_PH,), (None,), torch.empty(0), stack), LocalDispatcher(), RoutingContext()
        )
        trained = TrainedGroup(group, GroupTraining(trained=28))
        parameters += shape.layers * sum(parameter.numel() for parameter in trained.parameters())
    assert {name for names in SHARED_INPUTS for name in names} == {one.name for group in shape.groups for one in group}
    assert parameters == 34_865_152


def test_layers_run_again_in_the_backward_pass_change_nothing(made: Made) -> None:
    kept, again = made(), made()
    again.model.activation_checkpointing_enable({"use_reentrant": False})
    again.train()
    for objective in (kept, again):
        mean_loss(objective, batch()).backward()
    expected = gate_gradients(kept)
    for name, grad_EH in gate_gradients(again).items():
        assert torch.equal(grad_EH, expected[name]), name


def test_a_forced_sequence_runs_with_its_own_expert(made: Made, tiny_base: Path, tiny_bank: Bank) -> None:
    # One expert a token, and gates that always say the right one: the twin then does what is forced here.
    objective = made(top_k=1)
    losses = [float(objective(batch(forced=True), (1.0,))[1]["lm_loss"])]
    twin = LoopModel(load_tiny_llama(tiny_base), tiny_bank, 1, torch.float32)
    total, whole = 0.0, batch()
    for expert in range(EXPERTS):
        for linear in twin.linears.values():
            linear._pairs, linear.gate_EH.data = [linear._pairs[expert]], torch.zeros(1, linear.gate_EH.shape[1])
        tensors = (whole.ids_BL, whole.mask_BL, whole.counted_BL, torch.zeros_like(whole.ids_BL))
        one = Batch(*(tensor[expert : expert + 1] for tensor in tensors), (False,))
        total += float(twin(one, beta=0.0)) * one.counted
        twin = LoopModel(load_tiny_llama(tiny_base), tiny_bank, 1, torch.float32)
    assert losses == [pytest.approx(total, rel=1e-5)]


def test_a_forced_composite_runs_token_by_token_with_the_experts_to_be_named(made: Made) -> None:
    # One expert a token, and gates that say the next token's label of whatever they see: the same is forced.
    mixed, objective = composite(forced=True), made(top_k=1)
    step = objective._route(mixed)
    assert step.ids_TK.view(EXPERTS, -1)[:, :-1].equal(mixed.experts_BL[:, 1:])
    assert step.ids_TK.view(EXPERTS, -1)[:, -1].equal(mixed.experts_BL[:, -1])
    assert not step.gated
    # Up to where its first part ends, a composite that is forced is the first expert's own sequence.
    own = replace(batch(forced=True), experts_BL=mixed.experts_BL[:, :1].expand(-1, 9))
    logits = [_logits(objective, one) for one in (mixed, own)]
    torch.testing.assert_close(logits[0][:, :3], logits[1][:, :3])
    assert not torch.allclose(logits[0][:, 3], logits[1][:, 3], atol=1e-2)


def _logits(objective: GateObjective, of: Batch) -> Tensor:
    """The model's, as the objective routes it."""
    seen: list[Tensor] = []
    hook = objective.model.register_forward_hook(lambda module, args, output: seen.append(output.logits.detach()))
    objective(of, (1.0,))
    hook.remove()
    return seen[0]


def test_the_local_objective_is_the_gate_loss_without_a_way_back(made: Made) -> None:
    local = made(objective="local", lm=False)
    loss = mean_loss(local, batch())
    loss.backward()
    whole = made(lm=False, beta=1.0)
    assert float(loss) == pytest.approx(float(mean_loss(whole, batch())), rel=1e-6)
    # The gates of the last group have nothing above them: there both objectives have the same gradient.
    mean_loss(made(lm=False, beta=1.0), batch())
    whole_loss = mean_loss(whole, batch())
    whole_loss.backward()
    last = whole.gates[-1]
    torch.testing.assert_close(gate_gradients(local)[last], gate_gradients(whole)[last])
    first = whole.gates[0]
    assert not torch.allclose(gate_gradients(local)[first], gate_gradients(whole)[first])


def test_only_the_last_rows_are_parameters_of_an_incremental_run(made: Made, tiny_bank: Bank) -> None:
    objective = made(trained=1)
    assert all(parameter.shape[1] == 1 for group in objective.parameter_groups() for parameter in group.parameters)
    mean_loss(objective, batch()).backward()
    whole = made()
    mean_loss(whole, batch()).backward()
    expected = gate_gradients(whole)
    for name, grad_AH in gate_gradients(objective).items():
        torch.testing.assert_close(grad_AH, expected[name][-1:])


def test_joint_training_has_gradients_for_every_adapter(made: Made) -> None:
    objective = made(lora_learning_rate=7e-5)
    gates, adapters = objective.parameter_groups()
    assert (gates.learning_rate, adapters.learning_rate) == (None, 7e-5)
    mean_loss(objective, batch(forced=True)).backward()
    assert len(adapters.parameters) == len(objective._taps)
    for tap in objective._taps:
        for n, expert, *pair in tap.group._matrices(tap.group.lora.grad):
            assert all(float(grad.norm()) > 0 for grad in pair), (tap.names[n], expert)


def test_dropout_is_on_the_adapters_and_not_on_the_gates(made: Made) -> None:
    plain, dropped = made(objective="local", lm=False), made(objective="local", lm=False, lora_dropout=0.5)
    first = next(iter(plain.gates))
    losses = [objective.train()(batch(), (1.0,))[1]["gate_loss"] for objective in (plain, dropped)]
    assert losses[0][plain.gates.index(first)] == losses[1][plain.gates.index(first)]
    assert losses[0][-1] != losses[1][-1]
    torch.testing.assert_close(dropped.eval()(batch(), (1.0,))[1]["gate_loss"], losses[0])
