"""The routing of data sets, counted: against gates whose choices are known, and as a page."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

from meteora_dist.bank import Bank, write_bank
from meteora_dist.evaluation.forced import Passage, answer_nll, watched_gates
from meteora_dist.evaluation.gates import watch_gates
from meteora_dist.evaluation.prompts import encode, open_tokenizer
from meteora_dist.evaluation.routing import RoutingSummary, routing_summary
from meteora_dist.evaluation.suite import Task
from meteora_dist.evaluation.tasks import TaskRow
from meteora_dist.moe.inject import inject
from meteora_dist.moe.routing import RoutingChoice
from tests.support.shell import Shell
from tests.support.tiny import load_tiny_llama, random_gates

ROWS = (TaskRow("one?", "yes"), TaskRow("two, or three?", "no"))
CHOICE = RoutingChoice(top_k=1)


def bank_of(tiny_bank: Bank, tiny_base: Path, folder: Path, gates: dict[str, torch.Tensor]) -> Bank:
    adapters = {name: tiny_bank.path / "experts" / name for name in tiny_bank.names}
    return write_bank(folder / "bank", tiny_base, "tiny", adapters, gates)


def summary(bank: Bank, tiny_base: Path) -> RoutingSummary:
    routed = inject(load_tiny_llama(tiny_base), bank, torch.float32)
    tasks = [Task("plain", ROWS), Task("other", ROWS[:1])]
    return routing_summary(routed, open_tokenizer(tiny_base), bank.names, tasks, CHOICE)


def test_it_counts_what_each_gate_chooses(tiny_bank: Bank, tiny_base: Path) -> None:
    found = summary(tiny_bank, tiny_base)
    routed = inject(load_tiny_llama(tiny_base), tiny_bank, torch.float32)
    tokenizer = open_tokenizer(tiny_base)
    passages = [Passage(*encode(tokenizer, row)) for row in ROWS]
    for expert in range(4):
        counts = watch_gates(routed, passages, expert, CHOICE).counts
        right, total = (sum(one[i] for one in counts["module"].values()) for i in (0, 1))
        assert found.tasks[0].chosen[expert] == pytest.approx(right / total)
        assert found.tasks[0].answer_chosen[expert] == pytest.approx(
            counts["part"]["answer"][0] / counts["part"]["answer"][1]
        )
    assert [sum(shares) for shares in found.load] == pytest.approx([1.0, 1.0])
    assert found.tasks[1].rows == 1
    with watched_gates(routed) as picks:
        answer_nll(routed, passages[0], CHOICE)
    example = found.tasks[0].example
    assert len(example.tokens) == len(example.votes) == len(passages[0].ids)
    assert example.prompt_tokens == len(passages[0].prompt)
    third = [int(picks_T[2]) for picks_T in picks.values()]
    assert example.votes[3] == pytest.approx([third.count(expert) / len(third) for expert in range(4)])


def test_entropy_of_gates_that_do_not_know_and_of_gates_that_are_sure(
    tiny_bank: Bank, tiny_base: Path, tmp_path: Path
) -> None:
    zeros = {linear: torch.zeros_like(gate) for linear, gate in random_gates(4).items()}
    found = summary(bank_of(tiny_bank, tiny_base, tmp_path / "zeros", zeros), tiny_base)
    assert found.layer_entropy == pytest.approx([1.0, 1.0])
    assert found.tasks[0].entropy == pytest.approx(1.0)
    sure = {linear: 1e4 * gate for linear, gate in random_gates(4).items()}
    found = summary(bank_of(tiny_bank, tiny_base, tmp_path / "sure", sure), tiny_base)
    assert found.tasks[0].entropy < 0.01
    assert math.isclose(sum(found.tasks[0].chosen), 1.0, rel_tol=1e-6)


def test_the_command(
    tiny_bank: Bank,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    rows = [{"input": f"q<{i}>?", "target": f"yes {i}"} for i in range(10)]
    (tmp_path / "wide.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shell, out = Shell(monkeypatch, capfd), tmp_path / "x.html"
    words = ["report", "routing", "--model", tiny_base, "--bank", tiny_bank.path, "--data", tmp_path, "--rows", 2]
    said = shell(*words, "--out", out)
    assert said.code == 0
    assert said.out.splitlines()[-1] == str(out)
    page = out.read_text()
    assert "How bank routes" in page
    assert "&lt;" in page  # of the questions
    assert not re.search(r"https?://|src=|url\(|<script|<link", page)
    assert len(re.findall("<svg", page)) == 3
    numbers = json.loads(shell(*words, "--json", "--topk", 1).out)
    assert (numbers["tasks"][0]["task"], numbers["tasks"][0]["rows"]) == ("wide", 2)
    assert len(numbers["load"]) == 2
    assert "cannot be written" in shell(*words, "--out", tmp_path / "no" / "x.html").err
    assert "there is no task 'x'" in shell(*words, "--task", "x").err
    words[words.index("--data") + 1] = tmp_path / "none"
    assert shell(*words).code == 1
