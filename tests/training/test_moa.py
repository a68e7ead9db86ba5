"""The MoA objective by hand and against PEFT, and what a run changes and what it leaves alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from meteora_dist.bank import Bank, BankEdit, NewExpert, Routers, edit_bank
from meteora_dist.errors import AdapterError, DatasetError, ExpertNotFound, InvalidRequest, TrainingError
from meteora_dist.training.data import Batch, Halves, Sample, collate
from meteora_dist.training.keeper import FolderKeeper
from meteora_dist.training.moa_bank import trained_experts
from meteora_dist.training.moa_objective import MoaObjective, router_losses
from meteora_dist.training.moa_run import MoaRequest, MoaTraining
from meteora_dist.training.run_folder import TRAINED_FILE
from meteora_dist.training.settings import LoopSettings, MoaRun, MoaSettings
from meteora_dist.training.task_data import TaskData
from meteora_dist.training.worker import prepare
from meteora_dist.training.zero import cosine
from tests.support.ranks import run_ranks
from tests.support.tasks import write_tasks
from tests.support.tiny import LAYERS, SPECS, Spec, load_tiny_llama, random_routers, write_adapter, write_tiny_bank
from tests.training.test_gate_run import alone, cut_off, reports

NAMES = tuple(SPECS)
EXPERTS = len(SPECS)


def row(expert: int, number: int) -> Sample:
    """Domain e uses bytes of its own in prompts that all end in the same token, and answers with one of them."""
    generator = torch.Generator().manual_seed(1000 * expert + number)
    letters = (40 * expert + torch.randint(8, (5 + (number + expert) % 4,), generator=generator)).tolist()
    prompt, answer = [*letters, 250], [letters[0], 259]
    return Sample(Halves(prompt, answer), Halves([expert] * len(prompt), [expert] * 2), forced=False)


def batch_of(*experts: int) -> Batch:
    return collate([row(expert, 3 * place) for place, expert in enumerate(experts)], 257, count_prompt=False)


def made(base: Path, bank: Bank, trained: Sequence[int] = range(EXPERTS), **settings: Any) -> MoaObjective:
    return MoaObjective(load_tiny_llama(base), bank, trained, MoaSettings(**settings), torch.float32).train()


def asked(base: Path, folder: Path, options: dict[str, Any] | None = None, **more: Any) -> MoaRequest:
    """A short run in fp32 over all tasks, with its data, its folder and its bank below ``folder``."""
    given = {"steps": 6, "dtype": "float32", "log_every": 1, "checkpoint_every": 2, "threads": 1, "micro_batch": 8}
    given |= {"learning_rate": 0.05, "lora_learning_rate": 2e-3, "pooling": "mean"} | (options or {})
    loop = LoopSettings(**{name: value for name, value in given.items() if name in LoopSettings.model_fields})
    moa = MoaSettings(**{name: value for name, value in given.items() if name in MoaSettings.model_fields})
    data = folder / "data"
    if not data.exists():
        write_tasks(data)
    return MoaRequest(base, data, folder / "bank", folder / "run", loop=loop, moa=moa, **more)


def trained(request: MoaRequest) -> Bank:
    training = MoaTraining(request)
    alone(training.run)
    return training.publish()


def test_router_losses_by_hand() -> None:
    # Two layers, two sequences of experts 1 and 0. Layer one gives 1 probability 3/4 in both, layer two 1/2.
    logits_DBE = torch.tensor([[[0.0, math.log(3)], [0.0, math.log(3)]], [[0.0, 0.0], [5.0, 5.0]]])
    first, second = (-math.log(3 / 4) + math.log(2)) / 2, (-math.log(1 / 4) + math.log(2)) / 2
    assert router_losses(logits_DBE, torch.tensor([1, 0])).tolist() == pytest.approx([first, second])
    assert float(router_losses(torch.zeros(30, 1, 28), torch.tensor([4]))) == pytest.approx(math.log(28))


def peft_losses(base: Path, bank: Bank, one: Batch, b: int) -> tuple[float, dict[str, Tensor]]:
    """Sequence b alone in PEFT's model with its own adapter: sum of the answer's cross-entropies, and its gradient."""
    folder = bank.path / "experts" / bank.names[int(one.experts_BL[b, 0])]
    model = PeftModel.from_pretrained(load_tiny_llama(base), folder, is_trainable=True)
    own = one.rows(torch.tensor([b]))
    loss = model(input_ids=own.ids_BL, attention_mask=own.mask_BL, labels=own.token_labels).loss
    total = loss * own.counted
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
    assert objective.counts(batch) == (8, 4)
    loss, sums = objective(batch, (1.0, 0.0))
    loss.backward()
    found = {
        (tap.names[n], expert): (a_RH, b_RO)
        for tap in objective._taps
        for n, expert, a_RH, b_RO in tap.group._matrices(tap.group.lora.grad)
    }
    for b, expert in enumerate(batch.experts_BL[:, 0].tolist()):
        total, gradients = peft_losses(tiny_base, tiny_bank, batch, b)
        assert float(sums["lm_E"][expert]) == pytest.approx(total, rel=1e-4)
        assert sums["tokens_E"][expert] == 2
        assert len(gradients) == 2 * len(tiny_bank.adapters[expert].shapes)
        for linear in tiny_bank.adapters[expert].shapes:
            a_RH, b_RO = found[linear, expert]
            for mine, which in ((a_RH, "A"), (b_RO.T, "B")):
                torch.testing.assert_close(mine, gradients[f"{linear}.lora_{which}"], rtol=2e-3, atol=1e-4)


def reached(objective: MoaObjective, scales: tuple[float, float]) -> tuple[bool, ...]:
    """Whether a loss reaches the routers, and any LoRA."""
    objective.zero_grad(set_to_none=True)
    objective(batch_of(0, 1, 2, 3), scales)[0].backward()
    groups = objective.parameter_groups()
    return tuple(any(p.grad is not None and bool(p.grad.any()) for p in group.parameters) for group in groups)


def test_what_each_loss_teaches(tiny_base: Path, tmp_path: Path) -> None:
    bank = write_tiny_bank(tiny_base, tmp_path, routers=Routers(random_routers(EXPERTS)))
    for router_input, reaches in (("base", False), ("expert", True)):
        objective = made(tiny_base, bank, router_input=router_input)
        assert reached(objective, (1.0, 0.0)) == (False, True)
        assert reached(objective, (0.0, 1.0)) == (True, reaches)


def test_routers_of_zeros_lose_ln_e_times_eta(tiny_base: Path, tiny_bank: Bank) -> None:
    objective = made(tiny_base, tiny_bank, eta=3.0)
    loss, sums = objective(batch_of(0, 1, 2, 3), (0.0, 1 / 4))
    assert float(loss.detach()) == pytest.approx(3 * math.log(EXPERTS))
    metrics = objective.metrics(sums)
    assert metrics["router_ce"] == pytest.approx(math.log(EXPERTS))
    assert metrics["loss"] == pytest.approx(3 * metrics["router_ce"] + metrics["lm_loss"])


def test_what_a_batch_has_to_teach(tiny_base: Path, tiny_bank: Bank) -> None:
    batch = batch_of(0, 1, 2, 3)
    filled = replace(batch, counted_BL=batch.counted_BL & (torch.arange(4) != 2)[:, None])
    objective = made(tiny_base, tiny_bank, trained=(1, 2))
    # Sequences of experts that are not trained teach routers alone, and fillers nobody.
    assert objective.counts(filled) == (2, 3)
    sums = objective(filled, (1.0, 1.0))[1]
    assert sums["tokens_E"].tolist() == [0, 2, 0, 0]
    assert sums["rows_E"].tolist() == [1, 1, 0, 1]
    # A worker without a row that counts has gradients of the same matrices as the others, of zeros.
    objective.zero_grad()
    objective(batch_of(0, 3), (1.0, 1.0))[0].backward()
    _, loras = objective.parameter_groups()
    assert all(matrix.grad is not None and not matrix.grad.any() for matrix in loras.parameters)
    # Held-out rows are looked at with all experts, and with frozen LoRAs too.
    for frozen in (objective, made(tiny_base, tiny_bank, lora_learning_rate=None)):
        assert frozen.eval()(filled, (0.0, 0.0))[1]["tokens_E"].tolist() == [2, 2, 0, 2]
    assert made(tiny_base, tiny_bank, lora_learning_rate=None).counts(batch) == (0, 4)


def test_the_first_layer_is_blind_to_all_but_the_last_token(tiny_base: Path, tiny_bank: Bank) -> None:
    objective = made(tiny_base, tiny_bank, lora_learning_rate=None)
    optimizer = torch.optim.AdamW([objective.rows_DAH], lr=0.05)
    for step in range(60):
        samples = [row(expert, number) for expert in range(EXPERTS) for number in (step % 12, 12 + step % 7)]
        loss, _ = objective(collate(samples, 257, count_prompt=False), (1 / 8, 1 / 8))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    held_out = collate([row(expert, 100 + n) for expert in range(EXPERTS) for n in range(6)], 257, count_prompt=False)
    found = objective.metrics(objective.eval()(held_out, (0.0, 0.0))[1])
    blind, seeing = (found[f"router_accuracy/layer/{layer}"] for layer in range(LAYERS))
    assert (blind, seeing > 0.9) == (1 / EXPERTS, True)
    # Of two votes, one of them blind, the deeper one decides a tie.
    assert found["last_accuracy"] == found["majority_accuracy"] == seeing


@pytest.mark.parametrize("router_input", ["base", "expert"])
def test_a_run_learns_and_changes_routers_and_loras_alone(
    tiny_base: Path, tiny_bank: Bank, tmp_path: Path, router_input: str
) -> None:
    options = {"steps": 50, "router_input": router_input, "evaluate_every": 50, "hold_out_rows": 4}
    request = asked(tiny_base, tmp_path, options, bank=tiny_bank.path)
    bank = trained(request)
    before, *steps, after = reports(request.folder)
    assert (before["step"], after["step"]) == (0, 50)
    assert before["held_out/router_ce"] == steps[0]["router_ce"] == pytest.approx(math.log(EXPERTS))
    assert before["held_out/majority_accuracy"] == 1 / EXPERTS
    assert after["router_accuracy"] > 0.9
    assert after["held_out/perplexity"] < before["held_out/perplexity"]
    if router_input == "base":
        # Held-out rows are judged on the base model's states, which are not what the other variant learned from.
        assert after["held_out/majority_accuracy/expert/rooted"] == after["held_out/last_accuracy"] == 1.0
    assert bank.manifest.generation == tiny_bank.manifest.generation + 1
    assert bank.manifest.routers is not None
    assert bank.manifest.routers.pooling == "mean"
    for expert, name in enumerate(NAMES):
        assert files(bank, name)[0] == files(tiny_bank, name)[0]
        for linear in tiny_bank.adapters[expert].shapes:
            now, then = bank.pair(linear, expert), tiny_bank.pair(linear, expert)
            assert now is not None
            assert then is not None
            assert not torch.equal(now.a_RH, then.a_RH)
            assert not torch.equal(now.b_OR, then.b_OR)
    for linear in bank.linears:
        assert torch.equal(bank.gate(linear), tiny_bank.gate(linear))


def test_a_run_that_was_cut_off_ends_as_if_it_had_not(tiny_base: Path, tiny_bank: Bank, tmp_path: Path) -> None:
    options = {"hold_out_rows": 0}
    whole, cut = (
        MoaTraining(asked(tiny_base, tmp_path / name, options, bank=tiny_bank.path)).run for name in ("whole", "cut")
    )
    alone(whole)
    with pytest.raises(RuntimeError, match="CutOff"):
        run_ranks(1, cut_off, cut)
    again = MoaTraining(asked(tiny_base, tmp_path / "cut", options, bank=tiny_bank.path))
    assert not again.done
    assert again.run == cut
    alone(again.run)
    assert again.done
    expected, found = load_file(whole.folder / TRAINED_FILE), load_file(cut.folder / TRAINED_FILE)
    assert expected.keys() == found.keys() >= {"router.model.layers.0", "lora.wide.model.layers.0.mlp.up_proj.a"}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def files(bank: Bank, name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((bank.path / "experts" / name).iterdir())]


def test_an_added_expert_is_trained_and_nothing_else(tiny_base: Path, tmp_path: Path) -> None:
    old = write_tiny_bank(tiny_base, tmp_path, routers=Routers(random_routers(EXPERTS), pooling="mean"))
    extra = NewExpert(write_adapter(tiny_base, tmp_path / "extra", Spec(3, 6), 31))
    more = edit_bank(old, BankEdit(add={"extra": extra}, remove=("wide",)), tmp_path / "more")
    write_tasks(tmp_path / "data", ("plain", "rooted", "partial", "extra"))
    request = asked(tiny_base, tmp_path / "new", bank=more.path, trained=("extra",))
    bank = trained(replace(request, data=tmp_path / "data"))
    last = reports(request.folder)[-1]
    # Sequences of the others teach the new row what not to choose, and no LoRA.
    assert "perplexity/expert/plain" not in last
    assert last.keys() >= {"perplexity/expert/extra", "router_ce/expert/plain", "held_out/perplexity/expert/plain"}
    assert bank.routers()[:, :3].equal(more.routers()[:, :3])
    assert not bank.routers()[:, 3].equal(more.routers()[:, 3])
    assert [files(bank, name) == files(more, name) for name in more.names] == [True, True, True, False]
    assert [entry.router for entry in bank.manifest.experts] == ["trained"] * 4
    # Its gate rows are prototypes of the adapter, made anew with it.
    assert bank.prototypes == more.prototypes == (False, False, False, True)
    linear = "model.layers.0.self_attn.q_proj"
    assert not bank.gate(linear)[3].equal(more.gate(linear)[3])
    assert bank.gate(linear)[:3].equal(more.gate(linear)[:3])


OPTIONS = {"micro_batch": 3, "accumulation": 2, "clip": 0.05, "hold_out": 0.0, "hold_out_rows": 0}


def gradients_and_parameters(rank: int, runs: list[MoaRun]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Of each run: the gradients of its first step, and the parameters after it."""
    found = []
    for run in runs:
        loop = prepare(run, FolderKeeper(run.folder))
        parameters = [p for group in loop._objective.parameter_groups() for p in group.parameters]
        batches = loop._data.training(0, rank, 2)
        scales = loop.scales(batches)
        for batch in batches:
            loss, _ = loop.engine(batch, scales)
            loop.engine.backward(loss)
            if batch is batches[-1]:
                gradients = [loop.engine.gradient(parameter).clone() for parameter in parameters]
            loop.engine.update()
        found.append((gradients, [loop.engine.parameter(parameter).clone() for parameter in parameters]))
    return found


def by_torch_alone(run: MoaRun, bank: Bank) -> tuple[list[Tensor], list[Tensor]]:
    """The same step as one process and torch's own AdamW make it, on all sequences at once."""
    whole = run.model_copy(update={"loop": run.loop.model_copy(update={"micro_batch": 12, "accumulation": 1})})
    tokenizer = AutoTokenizer.from_pretrained(run.base)
    (batch,) = TaskData(whole, run.moa, bank.names, tokenizer, count_prompt=False).training(0, 0, 1)
    experts = [bank.names.index(name) for name in run.trained]
    objective = MoaObjective(load_tiny_llama(run.base), bank, experts, run.moa, torch.float32).train()
    groups = objective.parameter_groups()
    parameters = [parameter for group in groups for parameter in group.parameters]
    warm = cosine(run.loop.steps, run.loop.warm_up)(0)
    optimizer = torch.optim.AdamW(
        [{"params": g.parameters, "lr": warm * (g.learning_rate or run.loop.learning_rate)} for g in groups],
        weight_decay=0.0,
    )
    objective(batch, tuple(1 / count for count in objective.counts(batch)))[0].backward()
    gradients = [parameter.grad.clone() for parameter in parameters]
    torch.nn.utils.clip_grad_norm_(parameters, run.loop.clip)
    optimizer.step()
    return gradients, [parameter.detach() for parameter in parameters]


def far(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference of a tensor, relative to its norm."""
    return max(float((a - b).norm() / b.norm().clamp_min(1e-9)) for a, b in zip(ours, theirs, strict=True))


def test_two_workers_do_what_torch_alone_does(tiny_base: Path, tiny_bank: Bank, tmp_path: Path) -> None:
    # With one trained expert most batches have no answer that counts, some workers none at all.
    cases = [
        ({"zero_stage": 2}, ()),
        ({"zero_stage": 2, "router_input": "expert"}, ()),
        ({"zero_stage": 3}, ()),
        ({"zero_stage": 2}, ("wide",)),
        ({"zero_stage": 3}, ("wide",)),
    ]
    runs = [
        MoaTraining(asked(tiny_base, tmp_path / str(n), OPTIONS | case, bank=tiny_bank.path, trained=names)).run
        for n, (case, names) in enumerate(cases)
    ]
    expected = [by_torch_alone(run, tiny_bank) for run in runs]
    for results in run_ranks(2, gradients_and_parameters, runs):
        for case, (gradients, after), (expected_gradients, expected_after) in zip(
            cases, results, expected, strict=True
        ):
            assert far(gradients, expected_gradients) < 1e-5, case
            assert far(after, expected_after) < 1e-5, case


def test_a_bank_of_adapters_alone(tiny_base: Path, tiny_bank: Bank, tmp_path: Path) -> None:
    options = {"lora_learning_rate": None, "steps": 2}
    adapters = tiny_bank.path / "experts"
    bank = trained(asked(tiny_base, tmp_path, options, adapters=adapters))
    assert bank.names == tuple(sorted(NAMES))
    assert bank.prototypes == (True,) * EXPERTS
    assert set(bank.digests) == set(tiny_bank.digests)
    assert bank.manifest.base_model == tiny_base.name


def refused(request: MoaRequest, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        MoaTraining(request)
    assert not request.out.exists()


def test_what_is_wrong_is_said(tiny_base: Path, tiny_bank: Bank, tmp_path: Path) -> None:
    bank, adapters = tiny_bank.path, tiny_bank.path / "experts"
    refused(asked(tiny_base, tmp_path), InvalidRequest, "from --bank or from --adapters: name one of them")
    refused(asked(tiny_base, tmp_path, bank=bank, adapters=adapters), InvalidRequest, "name one of them")
    refused(asked(tiny_base, tmp_path, adapters=tmp_path / "nowhere"), AdapterError, "holds no adapter")
    nobody = asked(tiny_base, tmp_path, bank=bank, trained=("nobody",))
    refused(nobody, ExpertNotFound, "no expert 'nobody' to train; the bank has plain, wide")
    assert trained_experts(NAMES, ()) == NAMES
    assert trained_experts(NAMES, ["partial", "wide"]) == ("wide", "partial")
    MoaTraining(asked(tiny_base, tmp_path, bank=bank))
    refused(asked(tiny_base, tmp_path, {"eta": 2.0}, bank=bank), TrainingError, r"moa\.eta")
    (tmp_path / "data" / "wide.jsonl").unlink()
    refused(asked(tiny_base, tmp_path, bank=bank), DatasetError, "expert wide needs a data set")
