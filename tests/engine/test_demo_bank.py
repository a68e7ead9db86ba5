"""The committed demo bank on the real model: greedy tokens on two ranks equal those on one (fp32)."""

from __future__ import annotations

import asyncio
from pathlib import Path

from transformers import AutoTokenizer

from meteora_cluster.member import free_port
from meteora_dist.bank import Bank
from meteora_dist.engine.config import EngineConfig
from meteora_dist.engine.rank import RankEngine
from meteora_dist.engine.request import GenerationRequest, TokenEvent
from meteora_dist.evaluation.tasks import read_task, split
from meteora_dist.moe.routing import BASE, RoutingChoice, named
from tests.support.ranks import run_ranks

EXAMPLES = Path(__file__).parents[2] / "examples"
TASKS = ("object_counting", "unit_conversion", "strategyqa", "cs_algorithms")
CHOICES = (RoutingChoice(), RoutingChoice(), named(2), BASE)


def requests(model: Path) -> list[GenerationRequest]:
    """One held-out question of each task."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    made = []
    for task, choice in zip(TASKS, CHOICES, strict=True):
        row = split(read_task(EXAMPLES / "data" / f"{task}.jsonl.gz"))[1][0]
        turns = [{"role": "user", "content": row.prompt}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        made.append(GenerationRequest(task, tuple(ids), 12, routing=choice, trace=True))
    return made


async def answer(engine: RankEngine, asked: list[GenerationRequest]) -> list[list[TokenEvent]]:
    async def one(request: GenerationRequest) -> list[TokenEvent]:
        return [event async for event in engine.generate(request)]

    return await asyncio.gather(*map(one, asked))


def serve(rank: int, model: Path, ep: int, rendezvous: str | None) -> list[list[TokenEvent]]:
    """This rank's share of the requests, answered."""
    engine = RankEngine(EngineConfig(model=model, bank=EXAMPLES / "bank", ep=ep), rank, rendezvous)
    answers = asyncio.run(answer(engine, requests(model)[rank::ep]))
    engine.stop()
    return answers


def test_two_ranks_equal_one(demo_model: Path, tmp_path: Path) -> None:
    alone = serve(0, demo_model, 1, None)
    shares = run_ranks(2, serve, demo_model, 2, f"tcp://127.0.0.1:{free_port()}", join=False)
    together = [answers for pair in zip(*shares, strict=True) for answers in pair]
    assert [[event.token_id for event in events] for events in together] == [
        [event.token_id for event in events] for events in alone
    ]
    # A question of a trained task is answered by that task's own expert.
    names = Bank.open(EXAMPLES / "bank").names
    for task, events in zip(TASKS[:2], alone[:2], strict=True):
        totals = [sum(shares) for shares in zip(*(event.shares or () for event in events), strict=True)]
        assert names[totals.index(max(totals))] == task
