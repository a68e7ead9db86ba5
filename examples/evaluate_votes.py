"""Counts how often the routers of a bank name the right expert for held-out rows, as `auto-sequence` asks them.

    python examples/evaluate_votes.py --base BASE --bank BANK [--rows N] [--dtype float32] --json FILE

Every prompt is a vote in the serving engine; both rules are applied to the same votes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from demo_tasks import TASKS, encode, task_rows
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from meteora_dist.engine.config import EngineConfig
from meteora_dist.engine.rank import RankEngine
from meteora_dist.engine.request import GenerationRequest
from meteora_dist.moe.routers import elect
from meteora_dist.moe.routing import BASE


@dataclass(frozen=True)
class VoteResult:
    """One line of the table: shares of rows for which the routers name the task's own expert."""

    task: str
    rows: int
    majority: float
    last: float


async def votes(engine: RankEngine, prompt_ids: list[int], request_id: str) -> tuple[int, ...]:
    """The expert each layer votes for."""
    request = GenerationRequest(request_id, tuple(prompt_ids), 1, routing=BASE, vote="routers")
    (event,) = [event async for event in engine.generate(request)]
    return event.votes or ()


async def score(engine: RankEngine, tokenizer: PreTrainedTokenizerBase, expert: int, count: int) -> VoteResult:
    """A task's first ``count`` held-out rows."""
    rows = task_rows(TASKS[expert])[1][:count]
    prompts = [encode(tokenizer, row)[0] for row in rows]
    ballots = await asyncio.gather(*(votes(engine, ids, f"{expert}-{i}") for i, ids in enumerate(prompts)))
    shares = [sum(elect(ballot, rule) == expert for ballot in ballots) / len(rows) for rule in ("majority", "last")]
    return VoteResult(TASKS[expert], len(rows), *shares)


async def evaluate(engine: RankEngine, tokenizer: PreTrainedTokenizerBase, count: int) -> list[VoteResult]:
    """All tasks in turn, with a line of progress each."""
    results = []
    for expert in range(len(TASKS)):
        results.append(await score(engine, tokenizer, expert, count))
        print(results[-1], flush=True)
    return results


def main() -> None:
    """Evaluates the bank the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="folder of the base checkpoint")
    parser.add_argument("--bank", type=Path, default=Path(__file__).parent / "bank", help="the bank, with routers")
    parser.add_argument("--rows", type=int, default=100, help="held-out rows a task")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="the engine computes in")
    parser.add_argument("--json", type=Path, required=True, help="file the results are written to")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    engine = RankEngine(EngineConfig(model=arguments.base, bank=arguments.bank, dtype=arguments.dtype))
    try:
        results = asyncio.run(evaluate(engine, tokenizer, arguments.rows))
    finally:
        engine.stop()
    arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
