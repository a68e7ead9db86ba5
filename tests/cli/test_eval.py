"""``meteora eval`` from end to end on the tiny model."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from meteora_dist.bank import Bank
from meteora_dist.cli.eval import command
from meteora_dist.cli.main import main

METHODS = ("base", "oracle", "top-2@15", "auto-sequence", "linear", "arrow", "lorahub")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks that have experts, and the names to prove it."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("plain", "wide"):
        rows = [{"input": f"{name} {i}?", "target": f"yes {i}", "choices": None} for i in range(20)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def run(*options: object) -> int:
    """Exit code of the command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["meteora", "eval", *map(str, options)])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def options(tiny_base: Path, tiny_bank: Bank, data: Path, out: Path, methods: Sequence[str] = METHODS) -> list[object]:
    where = ["--out", out, "--model", tiny_base, "--bank", tiny_bank.path, "--data", data]
    sizes = ["--rows", 2, "--max-tokens", 3, "--composite", 2, "--shots", 1, "--composite-rows", 2]
    search = ["--hub-examples", 1, "--hub-evaluations", 5]
    named = [option for method in methods for option in ("--method", method)]
    # The same adapter as the expert plain: what it answers is known.
    same = ["--adapter", f"same={tiny_bank.adapters[tiny_bank.names.index('plain')].path}"]
    return [*where, *sizes, *search, *named, "--gates", *same, "--perplexity", "--text", "plain"]


@pytest.fixture(scope="module")
def out(tiny_base: Path, tiny_bank: Bank, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of one whole run."""
    folder = tmp_path_factory.mktemp("eval") / "out"
    assert run(*options(tiny_base, tiny_bank, data, folder)) == 0
    return folder


def test_results_have_every_method_and_task(out: Path) -> None:
    found = json.loads((out / "results.json").read_text())
    assert set(found) == {"setting", "scores", "means", "composites", "gates", "maps"}
    every = [(method, task) for method in (*METHODS, "same") for task in ("plain", "wide")]
    assert [(score["method"], score["task"]) for score in found["scores"]] == every
    assert {one["method"] for one in found["composites"]} == {*METHODS, "same"} - {"oracle", "lorahub"}
    assert [one["method"] for one in found["gates"]] == ["top-2@15", "arrow"]
    for score in found["scores"]:
        text = {"bleu", "rouge1", "rouge2", "rougeL"} if score["task"] == "plain" else set()
        assert set(score["metrics"]) == {"exact_match", "containment"} | text
        assert score["rows"] == len(score["exact"]) == 2
        assert (score["own"] is None) == (score["method"] not in ("top-2@15", "auto-sequence", "arrow"))
        assert score["perplexity"]["low"] <= score["perplexity"]["value"] <= score["perplexity"]["high"]


def test_an_adapter_is_scored_like_the_expert_it_is(out: Path) -> None:
    found = json.loads((out / "results.json").read_text())
    scores = {(score["method"], score["task"]): score for score in found["scores"]}
    own, same = scores["oracle", "plain"], scores["same", "plain"]
    assert same["perplexity"]["value"] == pytest.approx(own["perplexity"]["value"], rel=1e-4)
    assert same["metrics"] == own["metrics"]
    assert scores["same", "wide"]["perplexity"] != scores["oracle", "wide"]["perplexity"]


def test_the_page_has_its_tables_and_its_plots_are_not_blank(out: Path) -> None:
    page = (out / "results.md").read_text()
    for title in ("Means over tasks", "Exact match", "Containment", "BLEU and ROUGE", "Composite questions"):
        assert f"## {title}\n\n|" in page
    files = sorted(out.glob("*.png"))
    assert len(files) == 4  # two tasks make no radar: bars, curves, and a map for each method with gates
    for file in files:
        assert f"]({file.name})" in page
        with Image.open(file) as image:
            assert image.width > 400
            assert len(image.convert("RGB").getcolors(1 << 24)) > 20


def test_a_second_run_measures_nothing_and_an_interrupted_one_goes_on(
    out: Path, tiny_base: Path, tiny_bank: Bank, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = json.loads((out / "results.json").read_text())
    (lost,) = (out / "cells").glob("top-2@15-wide-answers-*.json")
    lost.unlink()
    fewer = options(tiny_base, tiny_bank, data, out, methods=("base", "top-2@15"))
    assert run(*fewer[: fewer.index("--gates")], "--composite-method", "base") == 0
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in said] == ["top-2@15-wide-answers"]
    again = json.loads((out / "results.json").read_text())
    assert again["composites"] == [one for one in before["composites"] if one["method"] == "base"]
    scores = [score for score in before["scores"] if score["method"] in ("base", "top-2@15")]
    assert len(again["scores"]) == len(scores) == 4
    for one, other in zip(again["scores"], scores, strict=True):
        assert (one["exact"], one["metrics"]["exact_match"]) == (other["exact"], other["metrics"]["exact_match"])
        assert one["own"] == other["own"]


def test_every_option_and_method_is_in_the_guide() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    for name in inspect.signature(command).parameters:
        assert f"`--{name.replace('_', '-')}" in guide, name
    for method in (*METHODS, "top-K", "ties", "dare-ties", "average", "base"):
        assert f"`{method.replace('top-2@15', 'top-K@T')}`" in guide, method


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--method", "top-x"], "there is no method 'top-x'"),
        (["--method", "oracle", "--task", "odd"], "method oracle needs an expert called odd"),
        (["--method", "lorahub", "--split", "all"], "method lorahub needs 5 training rows; task odd has 0"),
        (["--task", "none"], "there is no task 'none'"),
        (["--adapter", "x"], "--adapter x: it must be NAME=FOLDER"),
        (["--bank", "missing"], "missing: there is no such folder"),
        (["--composite", "1"], "there must be at least 1, 2 and 0"),
        (["--composite-method", "ties"], "composite questions are to be asked of ties, which is none of the methods"),
        (["--method", "lorahub", "--composite-method", "lorahub"], "method lorahub is told the task"),
    ],
    ids=["method", "oracle", "lorahub", "task", "adapter", "bank", "composite", "asked", "told"],
)
def test_mistakes_end_it_before_anything_is_measured(
    tiny_base: Path, tiny_bank: Bank, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    rows = [{"input": f"{i}?", "target": "t"} for i in range(20)]
    (tmp_path / "odd.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    where = ["--out", tmp_path / "out", "--model", tiny_base, "--data", tmp_path / "odd.jsonl"]
    bank = [] if "--bank" in more else ["--bank", tiny_bank.path]
    method = [] if "--method" in more else ["--method", "base"]
    assert run(*where, *bank, *method, *more) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_banks_of_other_experts_are_refused(
    tiny_base: Path, tiny_bank: Bank, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from meteora_dist.evaluation.banks import named_bank

    other = named_bank(tiny_bank, tiny_base, {"one": tiny_bank.adapters[0].path}, tmp_path / "other")
    banks = ["--bank", f"a={tiny_bank.path}", "--bank", f"b={other.path}"]
    assert run("--out", tmp_path / "out", "--model", tiny_base, "--data", data, *banks) == 1
    assert "hold other experts" in capsys.readouterr().err


def test_gates_of_several_seeds_are_compared(tiny_base: Path, tiny_bank: Bank, data: Path, tmp_path: Path) -> None:
    from meteora_dist.evaluation.banks import prototype_bank

    # Same experts, other gates.
    other = prototype_bank(tiny_bank, tmp_path / "other")
    banks = ["--bank", f"a={tiny_bank.path}", "--bank", f"b={other.path}"]
    where = ["--out", tmp_path / "out", "--model", tiny_base, "--data", data, "--rows", 1, "--max-tokens", 2]
    assert run(*where, *banks, "--method", "base", "--method", "top-1") == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(one["bank"], one["method"]) for one in found["means"]] == [("", "base"), ("a", "top-1"), ("b", "top-1")]
    page = (tmp_path / "out" / "results.md").read_text()
    assert "## Exact match over the banks\n\n| method | banks |" in page
    assert "top-1 (a)" in page
