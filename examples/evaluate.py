"""Scores base, each task's own adapter and ``auto`` on held-out rows, and prints the table of README.md.

    python examples/evaluate.py --base BASE [--bank examples/bank] [--tasks NAME ...] [--rows N] --json FILE

A row's dominating expert is the one with the largest share of gate weight over its answer's tokens.
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
from meteora_dist.evaluation.tasks import TaskRow
from meteora_dist.moe.routing import BASE, RoutingChoice, named

MAX_TOKENS = 24
"""Enough for every gold answer but the explanations of strategyqa, which is judged by its first word."""


@dataclass(frozen=True)
class TaskResult:
    """One line of the table: scores in 0..1, and the share of rows dominated by the task's own expert."""

    task: str
    rows: int
    base: float
    own: float
    auto: float
    routed_to_own: float


async def answer(
    engine: RankEngine, tokenizer: PreTrainedTokenizerBase, row: TaskRow, choice: RoutingChoice, request_id: str
) -> tuple[float, int]:
    """The row's score and the index of its dominating expert."""
    prompt_ids, _ = encode(tokenizer, row)
    request = GenerationRequest(request_id, tuple(prompt_ids), MAX_TOKENS, routing=choice, trace=True)
    events = [event async for event in engine.generate(request)]
    text = tokenizer.decode([event.token_id for event in events], skip_special_tokens=True)
    totals = [sum(shares) for shares in zip(*(event.shares or () for event in events), strict=True)]
    return row.score(text), totals.index(max(totals))


async def score_task(engine: RankEngine, tokenizer: PreTrainedTokenizerBase, expert: int, count: int) -> TaskResult:
    """All three methods on a task's first ``count`` held-out rows."""
    rows = task_rows(TASKS[expert])[1][:count]
    means, own_share = [], 0.0
    for label, choice in (("base", BASE), ("own", named(expert)), ("auto", RoutingChoice())):
        results = await asyncio.gather(
            *(answer(engine, tokenizer, row, choice, f"{expert}-{label}-{i}") for i, row in enumerate(rows))
        )
        means.append(sum(score for score, _ in results) / len(rows))
        own_share = sum(dominating == expert for _, dominating in results) / len(rows)
    return TaskResult(TASKS[expert], len(rows), *means, own_share)


def table(results: list[TaskResult]) -> str:
    """The results as a Markdown table, with their mean."""
    columns = ("base", "own", "auto", "routed_to_own")
    mean = [sum(getattr(result, column) for result in results) / len(results) for column in columns]
    lines = ["| task | rows | base | own adapter | auto | routed to own |", "|---|---|---|---|---|---|"]
    for result in results:
        values = " | ".join(f"{getattr(result, column):.3f}" for column in columns)
        lines.append(f"| {result.task} | {result.rows} | {values} |")
    return "\n".join([*lines, f"| **mean** | | {' | '.join(f'{value:.3f}' for value in mean)} |"])


async def evaluate(
    engine: RankEngine, tokenizer: PreTrainedTokenizerBase, tasks: list[str], count: int
) -> list[TaskResult]:
    """The tasks in turn, with a line of progress each."""
    results = []
    for task in tasks:
        results.append(await score_task(engine, tokenizer, TASKS.index(task), count))
        print(results[-1], flush=True)
    return results


def main() -> None:
    """Evaluates the bank the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="folder of the base checkpoint")
    parser.add_argument("--bank", type=Path, default=Path(__file__).parent / "bank", help="the bank")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="which tasks")
    parser.add_argument("--rows", type=int, default=30, help="held-out rows a task")
    parser.add_argument("--json", type=Path, required=True, help="file the results are written to")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    engine = RankEngine(EngineConfig(model=arguments.base, bank=arguments.bank, max_batch_requests=6))
    try:
        results = asyncio.run(evaluate(engine, tokenizer, arguments.tasks, arguments.rows))
    finally:
        engine.stop()
    arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
