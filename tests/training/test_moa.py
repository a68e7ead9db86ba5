"""The MoA objective by hand and against PEFT, and what a run changes and what it leaves alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from meteora_dist.bank import Bank, BankEdit, NewExpert, Routers, edit_bank
from meteora_dist.errors import BankError, ExpertNotFound
from meteora_dist.moe.inject import inject
from meteora_dist.moe.routed_model import RoutedModel
from meteora_dist.training.moa_bank import first_bank, trained_experts, write_trained
from meteora_dist.training.moa_data import DomainBatch, DomainData, DomainRow, collate
from meteora_dist.training.moa_loop import MoaRun, fit
from meteora_dist.training.moa_objective import MoaObjective, MoaSettings, router_losses
from tests.support.tiny import LAYERS, SPECS, Spec, load_tiny_llama, random_routers, write_adapter, write_tiny_bank

NAMES = tuple(SPECS)
EXPERTS = len(SPECS)
Line = dict[str, Any]


def row(expert: int, number: int) -> DomainRow:
    """Domain e uses bytes of its own in prompts that all end in the same token, and answers with one of them."""
    generator = torch.Generator().manual_seed(1000 * expert + number)
    letters = (40 * expert + torch.randint(8, (5 + (number + expert) % 4,), generator=generator)).tolist()
    return DomainRow((*letters, 250), (letters[0], 259), expert)


def data_of(experts: Sequence[int] = range(EXPERTS), rows: int = 12) -> DomainData:
    training = {expert: tuple(row(expert, number) for number in range(rows)) for expert in experts}
    held_out = {expert: tuple(row(expert, 100 + number) for number in range(6)) for expert in experts}
    return DomainData(training, held_out, 0, 257)


def batch_of(*experts: int) -> DomainBatch:
    return collate([row(expert, 3 * place) for place, expert in enumerate(experts)], 257)


def made(base: Path, bank: Bank, trained: Sequence[int] = range(EXPERTS), **settings: Any) -> MoaObjective:
    routed = inject(load_tiny_llama(base), bank, torch.float32)
    return MoaObjective(routed, bank, tuple(trained), MoaSettings(**settings))


def routed_of(objective: MoaObjective) -> RoutedModel:
    return objective._routed


def run(objective: MoaObjective, data: DomainData, **options: Any) -> list[Line]:
    lines: list[Line] = []
    settings = {"steps": 30, "rows": 2, "router_rate": 0.05, "lora_rate": 2e-3, "evaluated": 6}
    fit(objective, data, NAMES, MoaRun(**settings | options), lines.append)
    return lines


def test_router_losses_by_hand() -> None:
    # Two layers, two sequences of experts 1 and 0. Layer one gives 1 probability 3/4 in both, layer two 1/2.
    logits_DBE = torch.tensor([[[0.0, math.log(3)], [0.0, math.log(3)]], [[0.0, 0.0], [5.0, 5.0]]])
    first, second = (-math.log(3 / 4) + math.log(2)) / 2, (-math.log(1 / 4) + math.log(2)) / 2
    assert router_losses(logits_DBE, torch.tensor([1, 0])).tolist() == pytest.approx([first, second])
    assert float(router_losses(torch.zeros(30, 1, 28), torch.tensor([4]))) == pytest.approx(math.log(28))


def peft_losses(base: Path, bank: Bank, one: DomainBatch, b: int) -> tuple[float, dict[str, Tensor]]:
    """Sequence b alone in PEFT's model with its own adapter: sum of the answer's cross-entropies, and its gradient."""
    folder = bank.path / "experts" / bank.names[one.experts[b]]
    model = PeftModel.from_pretrained(load_tiny_llama(base), folder, is_trainable=True)
    own = one.rows([b])
    loss = model(input_ids=own.ids_BL, attention_mask=own.mask_BL, labels=own.labels_BL).loss
    total = loss * (own.labels_BL != -100).sum()
    total.backward()
    gradients = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return float(total.detach()), gradients


def test_a_mixed_pass_is_every_sequence_alone_in_peft(tiny_base: Path, tiny_bank: Bank) -> None:
    batch = batch_of(2, 0, 3, 1)
    objective = made(tiny_base, tiny_bank)
    sums = objective(batch)
    sums.lm_B.sum().backward()
    assert sums.tokens_B.tolist() == [2] * 4
    for b, expert in enumerate(batch.experts):
        loss, gradients = peft_losses(tiny_base, tiny_bank, batch, b)
        assert float(sums.lm_B[b].detach()) == pytest.approx(loss, rel=1e-4)
        assert len(gradients) == 2 * len(tiny_bank.adapters[expert].shapes)
        for linear in tiny_bank.adapters[expert].shapes:
            g, n = next(
                (g, group.names.index(linear))
                for g, group in enumerate(routed_of(objective).groups)
                if linear in group.names
            )
            for which, transposed in (("a", False), ("b", True)):
                mine = objective._pairs[f"{g}-{expert}-{n}-{which}"].grad
                assert mine is not None
                theirs = gradients[f"{linear}.lora_{which.upper()}"]
                torch.testing.assert_close(mine.T if transposed else mine, theirs, rtol=2e-3, atol=1e-4)


def gradients(objective: MoaObjective, loss: Tensor) -> tuple[bool, bool]:
    """Whether a loss reaches the routers, and any LoRA."""
    objective.zero_grad(set_to_none=True)
    if loss.requires_grad:
        loss.backward(retain_graph=True)

    def reached(parameters: list[torch.nn.Parameter]) -> bool:
        return any(p.grad is not None and bool(p.grad.any()) for p in parameters)

    return reached(objective.router_parameters()), reached(objective.lora_parameters())


def test_what_each_loss_teaches(tiny_base: Path, tmp_path: Path) -> None:
    bank = write_tiny_bank(tiny_base, tmp_path, routers=Routers(random_routers(EXPERTS)))
    for router_input, reaches in (("base", False), ("expert", True)):
        objective = made(tiny_base, bank, router_input=router_input)
        sums = objective(batch_of(0, 1, 2, 3))
        assert gradients(objective, sums.lm_B.sum()) == (False, True)
        assert gradients(objective, sums.router_B.sum()) == (True, reaches)


def test_routers_of_zeros_lose_ln_e(tiny_base: Path, tiny_bank: Bank) -> None:
    sums = made(tiny_base, tiny_bank)(batch_of(0, 1, 2, 3))
    assert sums.router_B.tolist() == pytest.approx([math.log(EXPERTS)] * 4)


def test_a_step_weighs_tokens_and_sequences_whatever_its_passes(tiny_base: Path, tiny_bank: Bank) -> None:
    whole = run(made(tiny_base, tiny_bank, eta=3.0, pooling="mean"), data_of(), steps=2, micro_batch=8)
    parted = run(made(tiny_base, tiny_bank, eta=3.0, pooling="mean"), data_of(), steps=2, micro_batch=3)
    for one, other in zip(whole[1:3], parted[1:3], strict=True):
        assert one["event"] == "step"
        assert one["loss"] == pytest.approx(one["lm"] + 3 * one["router"])
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        for name in NAMES:
            assert other["domains"][name] == pytest.approx(one["domains"][name], rel=1e-3)


@pytest.mark.parametrize("router_input", ["base", "expert"])
def test_routers_learn_to_name_the_domain(tiny_base: Path, tiny_bank: Bank, router_input: str) -> None:
    objective = made(tiny_base, tiny_bank, pooling="mean", router_input=router_input)
    before, *steps, after = run(objective, data_of(rows=40), steps=60)
    assert len(steps) == 60
    assert before["mean"]["majority"] == 1 / EXPERTS
    assert steps[0]["router"] == pytest.approx(math.log(EXPERTS))
    assert steps[-1]["router_accuracy"] > 0.9
    if router_input == "base":
        # Held-out rows are judged on the base model's states, which are not what the other variant learned from.
        assert after["mean"]["router_accuracy"] == after["mean"]["majority"] == after["mean"]["last"] == 1.0
        assert after["layers"] == (1.0,) * LAYERS
    assert after["mean"]["perplexity"] < before["mean"]["perplexity"]


def test_the_first_layer_is_blind_to_all_but_the_last_token(tiny_base: Path, tiny_bank: Bank) -> None:
    objective = made(tiny_base, tiny_bank, train_loras=False)
    *_, last, after = run(objective, data_of(), steps=60)
    assert last["lm"] == 0.0
    assert after["layers"] == (1 / EXPERTS, 1.0)
    assert after["mean"]["last"] == 1.0
    # Of two votes, one of them blind, the deeper one decides a tie.
    assert after["mean"]["majority"] == 1.0


def files(bank: Bank, name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((bank.path / "experts" / name).iterdir())]


def test_joint_training_changes_routers_and_loras_alone(tiny_base: Path, tiny_bank: Bank, tmp_path: Path) -> None:
    objective = made(tiny_base, tiny_bank)
    routed = routed_of(objective)
    frozen = {name: value.clone() for name, value in routed.model.state_dict().items()}
    run(objective, data_of(), steps=3, evaluated=0)
    assert all(torch.equal(value, frozen[name]) for name, value in routed.model.state_dict().items())
    bank = write_trained(tmp_path / "out", tiny_base, tiny_bank, routed, objective)
    assert bank.manifest.generation == tiny_bank.manifest.generation + 1
    assert bank.manifest.routers is not None
    assert torch.equal(bank.routers(), objective.routers.detach())
    for expert, name in enumerate(NAMES):
        assert files(bank, name)[0] == files(tiny_bank, name)[0]
        for linear in tiny_bank.adapters[expert].shapes:
            now, then = bank.pair(linear, expert), tiny_bank.pair(linear, expert)
            assert now is not None
            assert then is not None
            assert not torch.equal(now.a_RH, then.a_RH)
            assert not torch.equal(now.b_OR, then.b_OR)
            trained = objective.pair(linear, expert)
            assert trained is not None
            assert torch.equal(now.a_RH, trained[0])
    for linear in bank.linears:
        assert torch.equal(bank.gate(linear), tiny_bank.gate(linear))


def test_an_added_expert_is_trained_and_nothing_else(tiny_base: Path, tiny_bank: Bank, tmp_path: Path) -> None:
    first = made(tiny_base, tiny_bank, range(EXPERTS), pooling="mean")
    run(first, data_of(), evaluated=0)
    bank = write_trained(tmp_path / "first", tiny_base, tiny_bank, routed_of(first), first)
    extra = NewExpert(write_adapter(tiny_base, tmp_path / "extra", Spec(3, 6), 31))
    more = edit_bank(bank, BankEdit(add={"extra": extra}, remove=("wide",)), tmp_path / "more")
    # "rooted", "partial" and "extra" stand where 1, 2 and 3 stood; the domain of 1 is now that of "rooted".
    assert [entry.router for entry in more.manifest.experts] == ["trained", "trained", "trained", "none"]
    domains = (0, 2, 3, 1)
    data = DomainData(
        {
            place: tuple(DomainRow(r.prompt_ids, r.answer_ids, place) for r in data_of().training[domain])
            for place, domain in enumerate(domains)
        },
        {},
        0,
        257,
    )
    trained = trained_experts(more, ["extra"])
    objective = made(tiny_base, more, trained, pooling="mean")
    lines = run(objective, data, steps=40, evaluated=0)
    assert lines[-1]["router_accuracy"] == 1.0
    # Sequences of the others teach the new row what not to choose, and no LoRA.
    assert lines[-1]["domains"]["plain"]["lm"] == 0.0
    after = write_trained(tmp_path / "after", tiny_base, more, routed_of(objective), objective)
    assert after.routers()[:, :3].equal(more.routers()[:, :3])
    assert not after.routers()[:, 3].equal(more.routers()[:, 3])
    assert [files(after, name) == files(more, name) for name in more.names] == [True, True, True, False]
    assert [entry.router for entry in after.manifest.experts] == ["trained"] * 4
    # Its gate rows are prototypes of the adapter, made anew with it.
    assert after.prototypes == more.prototypes == (False, False, False, True)
    linear = "model.layers.0.self_attn.q_proj"
    assert not after.gate(linear)[3].equal(more.gate(linear)[3])
    assert after.gate(linear)[:3].equal(more.gate(linear)[:3])


def test_the_same_seed_gives_the_same_bank(tiny_base: Path, tiny_bank: Bank, tmp_path: Path) -> None:
    def once(name: str, seed: int) -> Bank:
        objective = made(tiny_base, tiny_bank)
        run(objective, data_of(), steps=2, evaluated=0, seed=seed)
        return write_trained(tmp_path / name, tiny_base, tiny_bank, routed_of(objective), objective)

    first, second, other = once("first", 1), once("second", 1), once("other", 2)
    assert first.manifest == second.manifest
    assert first.manifest.routers != other.manifest.routers
    assert first.digests != other.digests


def test_routers_do_not_depend_on_the_loras_trained_beside_them(tiny_base: Path, tiny_bank: Bank) -> None:
    joint, alone = made(tiny_base, tiny_bank), made(tiny_base, tiny_bank, train_loras=False)
    for objective in (joint, alone):
        run(objective, data_of(), steps=4, evaluated=0)
    assert torch.equal(joint.routers, alone.routers)
    # With frozen LoRAs there is no language-model loss, also where a pass with experts is made for the routers.
    by_expert = made(tiny_base, tiny_bank, train_loras=False, router_input="expert")
    assert run(by_expert, data_of(), steps=1, evaluated=0)[0]["lm"] == 0.0


def test_a_bank_of_adapters_alone(tiny_base: Path, tiny_bank: Bank, tmp_path: Path) -> None:
    bank = first_bank(tmp_path / "bank", tiny_base, "tiny", tiny_bank.path / "experts")
    assert bank.names == tuple(sorted(NAMES))
    assert bank.prototypes == (True,) * EXPERTS
    assert bank.manifest.routers is None
    with pytest.raises(BankError, match=r"has no folder with an adapter_config\.json"):
        first_bank(tmp_path / "none", tiny_base, "tiny", tmp_path / "nowhere")


def test_only_experts_of_the_bank_can_be_trained(tiny_bank: Bank) -> None:
    assert trained_experts(tiny_bank, ()) == (0, 1, 2, 3)
    assert trained_experts(tiny_bank, ["partial", "wide"]) == (1, 3)
    with pytest.raises(ExpertNotFound, match="no expert 'nobody' to train; the bank has plain, wide"):
        trained_experts(tiny_bank, ["nobody"])
