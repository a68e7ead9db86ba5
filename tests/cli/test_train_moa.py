"""``meteora train moa`` from the command line to a bank that serves."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from meteora_dist.bank import Bank
from meteora_dist.cli import main as cli
from meteora_dist.engine.config import EngineConfig
from meteora_dist.engine.rank import RankEngine
from meteora_dist.engine.request import GenerationRequest
from meteora_dist.moe.routers import elect
from meteora_dist.moe.routing import BASE
from meteora_dist.serving.tokenizer import TextTokenizer
from tests.support.tiny import SPECS

LETTERS = dict(zip(SPECS, ("abc", "mno", "xyz", "147"), strict=True))


def question(name: str, number: int) -> str:
    return "".join(LETTERS[name][(number // 3**place) % 3] for place in range(4))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in SPECS:
        rows = [{"input": question(name, number), "target": LETTERS[name][0], "choices": None} for number in range(30)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(monkeypatch: pytest.MonkeyPatch, *options: object) -> None:
    monkeypatch.setattr(sys, "argv", ["meteora", "train", "moa", *map(str, options)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None), f"exit code {ended.value.code}"


async def test_a_trained_bank_votes_right(
    tiny_base: Path, tiny_bank: Bank, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, out = tmp_path / "log.jsonl", tmp_path / "out"
    options = ["--base", tiny_base, "--bank", tiny_bank.path, "--data", data, "--out", out, "--log", log]
    command(monkeypatch, *options, *("--steps", 40, "--router-rate", 0.05, "--pooling", "mean", "--evaluated", 6))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "evaluation", *["step"] * 40, "evaluation", "end"]
    assert lines[0]["router_parameters"] == 2 * 4 * 32
    assert lines[-2]["mean"]["majority"] == 1.0
    engine = RankEngine(EngineConfig(model=tiny_base, bank=out, kv_cache_tokens=4096))
    tokenizer = TextTokenizer.open(tiny_base)
    try:
        for expert, name in enumerate(SPECS):
            # From the held-out fifth; the template's ends are a chat's.
            prompt = tokenizer.encode(f"<user>{question(name, 27)}\n<assistant>")
            request = GenerationRequest(name, prompt, 1, routing=BASE, vote="routers")
            (event,) = [event async for event in engine.generate(request)]
            assert event.votes is not None
            assert elect(event.votes, "majority") == expert
    finally:
        engine.stop()


def test_from_adapters_alone_and_back_for_one_of_them(
    tiny_base: Path, tiny_bank: Bank, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    same = ("--base", tiny_base, "--data", data, "--steps", 2, "--log", tmp_path / "log.jsonl")
    command(monkeypatch, *same, "--adapters", tiny_bank.path / "experts", "--out", first, "--freeze-loras")
    command(monkeypatch, *same, "--bank", first, "--out", second, "--train", "wide")
    before, after = Bank.open(first), Bank.open(second)
    assert before.manifest.base_model == tiny_base.name
    assert before.names == tuple(sorted(SPECS))
    assert set(before.digests) == set(tiny_bank.digests)
    changed = [then != now for then, now in zip(before.digests, after.digests, strict=True)]
    assert [name for name, differs in zip(before.names, changed, strict=True) if differs] == ["wide"]
    same_rows = (before.routers() == after.routers()).all(-1).all(0)
    assert same_rows.tolist() == [name != "wide" for name in before.names]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ((), "the run starts from --bank or from --adapters: name one of them"),
        (("--bank", "BANK", "--adapters", "BANK"), "name one of them"),
        (("--bank", "BANK", "--train", "nobody"), "there is no expert 'nobody' to train"),
        (("--bank", "BANK", "--data", "BANK"), "has neither plain.jsonl nor plain.jsonl.gz"),
        (("--bank", "BANK", "--out", "BANK"), "exists already"),
    ],
    ids=["neither", "both", "expert", "data", "out"],
)
def test_what_is_wrong_is_said(
    tiny_base: Path,
    tiny_bank: Bank,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    reason: str,
) -> None:
    given = [tiny_bank.path if option == "BANK" else option for option in options]
    needed = ("--base", tiny_base, "--data", data, "--out", tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["meteora", "train", "moa", *map(str, (*needed, *given))])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert reason in capsys.readouterr().err
