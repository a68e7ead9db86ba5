"""Whole runs on a tiny model: from adapters and data sets to a bank that serves."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from meteora_dist.bank import Bank
from meteora_dist.engine.config import EngineConfig
from meteora_dist.engine.rank import RankEngine
from meteora_dist.engine.request import GenerationRequest
from meteora_dist.errors import AdapterError, DatasetError, ExpertNotFound, InvalidRequest, MeteoraError, TrainingError
from meteora_dist.moe.routing import BASE, RoutingChoice, named
from meteora_dist.training.gate_run import NULL_EXPERT, GateRequest, GateTraining
from meteora_dist.training.keeper import METRICS_FILE, FolderKeeper
from meteora_dist.training.run_folder import TRAINED_FILE
from meteora_dist.training.settings import GateRun, Run
from meteora_dist.training.worker import prepare, train
from tests.support.ranks import run_ranks
from tests.support.tasks import request, write_tasks, write_texts
from tests.support.tiny import SPECS, load_tiny_llama, write_tiny_llama

PROMPT = (72, 72, 72, 72)


@pytest.fixture(scope="session")
def adapters(tiny_bank: Bank) -> Path:
    return tiny_bank.path / "experts"


def trained(asked: GateRequest) -> Bank:
    training = GateTraining(asked)
    alone(training.run)
    return training.publish()


def alone(run: Run) -> None:
    """The whole run, by one worker, in a process of its own: DeepSpeed takes no second process group in one."""
    run_ranks(1, _train, run)


def _train(rank: int, run: Run) -> None:
    train(run, FolderKeeper(run.folder))


def reports(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def answers(base: Path, bank: Bank, *choices: RoutingChoice) -> list[list[int]]:
    """Greedy answers to one prompt under several choices."""
    engine = RankEngine(EngineConfig(model=base, bank=bank.path))

    async def answer(number: int, choice: RoutingChoice) -> list[int]:
        asked = GenerationRequest(f"r{number}", PROMPT, 5, routing=choice, ignore_eos=True)
        return [event.token_id async for event in engine.generate(asked)]

    try:
        return asyncio.run(_all(answer, choices))
    finally:
        engine.stop()


async def _all(answer, choices) -> list[list[int]]:
    return [await answer(number, choice) for number, choice in enumerate(choices)]


def test_gates_learn_the_tasks_and_the_bank_serves(tiny_base: Path, adapters: Path, tmp_path: Path) -> None:
    options = {
        "steps": 60,
        "learning_rate": 5e-2,
        "clip": 0.0,
        "objective": "local",
        "lm": False,
        "teacher_forced": 0.5,
    }
    asked = request(tiny_base, adapters, tmp_path, options, unlabelled=write_texts(tmp_path / "texts.jsonl"))
    bank = trained(asked)
    assert bank.names == (*sorted(SPECS), NULL_EXPERT)
    seen = reports(asked.folder)
    assert seen[0]["gate_ce"] == pytest.approx(math.log(5), rel=1e-5)
    # The chat template's tokens are the same in all tasks, so no gate can name the expert there.
    assert seen[-1]["gate_ce"] < 0.65 * seen[0]["gate_ce"]
    assert seen[-1]["held_out/gate_accuracy"] > 0.4
    assert {"gate_ce/layer/0", "gate_ce/layer/1", "gate_accuracy/linear/down_proj"} <= seen[-1].keys()
    assert list((asked.folder / "tensorboard").iterdir())
    by_gates, by_null, by_base = answers(tiny_base, bank, RoutingChoice(), named(4), BASE)
    assert by_null == by_base != by_gates


def test_what_is_frozen_stays_as_it_is(tiny_base: Path, adapters: Path, tmp_path: Path) -> None:
    run = GateTraining(request(tiny_base, adapters, tmp_path, {"zero_stage": 2})).run
    run_ranks(1, _train_and_compare, run)


def _train_and_compare(rank: int, run: GateRun) -> None:
    loop = prepare(run, FolderKeeper(run.folder))
    objective = loop._objective
    expected = load_tiny_llama(run.base).state_dict()
    experts = [part for tap in objective._taps for e in tap.group.group.state.stack.experts for part in e if part]
    before = [(part.a_RH.clone(), part.b_RO.clone()) for part in experts]
    changed = {name: tensor.abs().max() for name, tensor in loop.run().items()}
    assert all(changed.values())
    for name, tensor in objective.model.state_dict().items():
        assert torch.equal(tensor, expected[name.replace(".base_layer", "")]), name
    for part, (a_RH, b_RO) in zip(experts, before, strict=True):
        assert torch.equal(part.a_RH, a_RH)
        assert torch.equal(part.b_RO, b_RO)


def test_an_expert_joins_and_the_others_rows_stay(tiny_base: Path, adapters: Path, tmp_path: Path) -> None:
    first = request(tiny_base, adapters, tmp_path / "first", experts=("plain", "wide", "rooted"))
    old = trained(first)
    options = {"objective": "local", "lm": False, "teacher_forced": 0.5, "init": "normal"}
    texts = write_texts(tmp_path / "texts.jsonl")
    asked = request(
        tiny_base, adapters, tmp_path / "second", options, bank=old.path, add=("partial",), unlabelled=texts
    )
    joined = trained(asked)
    assert joined.names == (*old.names, "partial", NULL_EXPERT)
    assert joined.manifest.generation == old.manifest.generation + 1
    assert {entry.gate for entry in joined.manifest.experts} == {"trained"}
    draft = Bank.open(tmp_path / "second" / "run" / "draft")
    for linear in joined.linears:
        assert torch.equal(joined.gate(linear)[:3], old.gate(linear))
        assert not torch.equal(joined.gate(linear)[3], draft.gate(linear)[3])


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_run_that_wascut_off_ends_as_if_it_had_not(
    tiny_base: Path, adapters: Path, tmp_path: Path, stage: int
) -> None:
    options = {"zero_stage": stage, "init": "normal", "lora_dropout": 0.2}
    whole, cut = (GateTraining(request(tiny_base, adapters, tmp_path / name, options)).run for name in ("whole", "cut"))
    alone(whole)
    with pytest.raises(RuntimeError, match="CutOff"):
        run_ranks(1, cut_off, cut)
    again = GateTraining(request(tiny_base, adapters, tmp_path / "cut", options)).run
    assert again == cut
    alone(again)
    expected, found = load_file(whole.folder / TRAINED_FILE), load_file(cut.folder / TRAINED_FILE)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    ours, theirs = reports(cut.folder), reports(whole.folder)
    assert [line["step"] for line in ours] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in ours] == [line["loss"] for line in theirs]


class CutOff(Exception):
    """Ends a run."""


class _CutOff(FolderKeeper):
    """Ends the run after five steps; the newest checkpoint is of the fourth."""

    def report(self, step: int, metrics: dict[str, float]) -> None:
        super().report(step, metrics)
        if step == 5:
            raise CutOff


def cut_off(rank: int, run: Run) -> None:
    train(run, _CutOff(run.folder))


def test_adapters_train_along(tiny_base: Path, adapters: Path, tmp_path: Path) -> None:
    bank = trained(request(tiny_base, adapters, tmp_path, {"lora_learning_rate": 1e-2, "teacher_forced": 1.0}))
    for name in SPECS:
        before, after = (
            load_file(folder / name / "adapter_model.safetensors") for folder in (adapters, bank.path / "experts")
        )
        assert before.keys() == after.keys()
        assert all(not torch.equal(tensor, before[key]) for key, tensor in after.items())
    # What is written is what PEFT computes with.
    with torch.no_grad():
        model = PeftModel.from_pretrained(load_tiny_llama(tiny_base), bank.path / "experts" / "rooted")
        expected = int(model(torch.tensor([PROMPT])).logits[0, -1].argmax())
    (tokens,) = answers(tiny_base, bank, named(bank.names.index("rooted")))
    assert tokens[0] == expected


def refused(asked: GateRequest, error: type[MeteoraError], *words: str) -> None:
    with pytest.raises(error) as refusal:
        GateTraining(asked)
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert not asked.out.exists()


def test_data_sets_that_are_missing_or_damaged(tiny_base: Path, adapters: Path, tmp_path: Path) -> None:
    asked = request(tiny_base, adapters, tmp_path)
    lines = (asked.data / "wide.jsonl").read_text().splitlines()
    for bad, words in (
        ("{", ["wide.jsonl", "line 3", "not valid JSON"]),
        ('{"input": "a"}', ["wide.jsonl", "line 3", "target"]),
        ('{"input": "a", "target": "b", "choices": "ab"}', ["wide.jsonl", "line 3", "choices"]),
    ):
        (asked.data / "wide.jsonl").write_text("\n".join([*lines[:2], bad, *lines[2:]]))
        refused(asked, DatasetError, *words)
    (asked.data / "wide.jsonl").write_text("")
    refused(asked, DatasetError, "wide.jsonl", "no row")
    (asked.data / "wide.jsonl").unlink()
    refused(asked, DatasetError, "expert wide needs a data set")
    write_tasks(asked.data, (*SPECS, "stray"))
    refused(asked, DatasetError, "stray.jsonl", "belongs to no expert")


def test_experts_and_adapters_that_do_not_fit(tiny_base: Path, adapters: Path, tmp_path: Path) -> None:
    refused(request(tiny_base, adapters, tmp_path, experts=("plian",)), ExpertNotFound, "'plian'", "plain")
    other = write_tiny_llama(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    refused(request(other, adapters, tmp_path), AdapterError, "48", "40", "mlp")
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    refused(request(other, adapters, tmp_path), AdapterError, "model.layers.1", "lacks")


def test_the_null_expert_alone_joins_a_bank(tiny_base: Path, tiny_bank: Bank, adapters: Path, tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts.jsonl")
    asked = request(tiny_base, adapters, tmp_path, bank=tiny_bank.path, unlabelled=texts)
    assert GateTraining(asked).run.trained == (NULL_EXPERT,)
    texts.write_text('{"text": "one"}\n{"words": "two"}\n')
    refused(request(tiny_base, adapters, tmp_path, unlabelled=texts), DatasetError, "texts.jsonl", "line 2")


def test_options_that_do_not_go_together(tiny_base: Path, tiny_bank: Bank, adapters: Path, tmp_path: Path) -> None:
    refused(request(tiny_base, adapters, tmp_path, add=("plain",)), TrainingError, "--bank")
    refused(request(tiny_base, adapters, tmp_path, bank=tiny_bank.path), TrainingError, "--add")
    refused(request(tiny_base, adapters, tmp_path, bank=tiny_bank.path, add=("plain",)), InvalidRequest, "'plain'")
    joint = {"lora_learning_rate": 1e-4}
    refused(request(tiny_base, adapters, tmp_path, joint, bank=tiny_bank.path, add=("plain",)), TrainingError, "lora")
    with pytest.raises(ValueError, match="lm off"):
        request(tiny_base, adapters, tmp_path, {"objective": "local"})


def test_a_run_goes_on_with_the_same_settings_only(tiny_base: Path, adapters: Path, tmp_path: Path) -> None:
    GateTraining(request(tiny_base, adapters, tmp_path))
    GateTraining(request(tiny_base, adapters, tmp_path, {"log_every": 5}))
    refused(request(tiny_base, adapters, tmp_path, {"beta": 10.0}), TrainingError, "gates.beta")
    with (tmp_path / "data" / "wide.jsonl").open("a") as file:
        file.write('{"input": "one", "target": "more"}\n')
    refused(request(tiny_base, adapters, tmp_path), TrainingError, "data.wide")
