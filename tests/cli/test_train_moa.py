"""``meteora train moa`` from the command line to a bank that serves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from meteora_dist.bank import Bank
from meteora_dist.cli.main import build_app
from meteora_dist.engine.config import EngineConfig
from meteora_dist.engine.rank import RankEngine
from meteora_dist.engine.request import GenerationRequest
from meteora_dist.moe.routers import elect
from meteora_dist.moe.routing import BASE
from meteora_dist.serving.tokenizer import TextTokenizer
from tests.support.ranks import run_ranks
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


def typed(rank: int, arguments: list[str]) -> tuple[str, str | None]:
    """What the command prints, and the error it ends with."""
    result = CliRunner().invoke(build_app(arguments), arguments)
    return result.output, None if result.exit_code == 0 else repr(result.exception)


async def test_a_trained_bank_votes_right(tiny_base: Path, tiny_bank: Bank, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["train", "moa", "--base", str(tiny_base), "--bank", str(tiny_bank.path), "--data", str(data)]
    arguments += ["--out", str(out), "--run", str(tmp_path / "run")]
    pairs = ("steps=40", "learning_rate=0.05", "pooling=mean", "micro_batch=8", "dtype=float32", "hold_out_rows=6")
    for pair in (*pairs, "threads=1"):
        arguments += ["--set", pair]
    # In a process of its own: DeepSpeed takes no second process group in one.
    ((said, error),) = run_ranks(1, typed, arguments, join=False)
    assert error is None
    assert "majority_accuracy 1.0000" in said
    assert "4 experts, 14 gates, 2 routers" in said
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
