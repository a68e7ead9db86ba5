"""Fits the gates of the demo bank on the tasks' training rows and writes the finished bank.

    python examples/train_gates.py --base BASE --adapters ADAPTERS --out examples/bank

Every step takes one sequence of each task. All tokens count, prompt and answer. Half of the sequences run with their
own expert, the other half are routed by the gates as they stand, so that gates also meet what they will see in use.
"""

from __future__ import annotations

import argparse
import random
import shutil
import time
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from demo_tasks import BASE_ID, TASKS, encode, task_rows
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from meteora_dist.adapters import read_adapter
from meteora_dist.bank import Bank, write_bank
from meteora_dist.model.load import load_base
from meteora_dist.moe.inject import inject
from meteora_dist.moe.routed_model import RoutedModel
from meteora_dist.training.local_gates import GateBatch, GateMetrics, LocalFit, fit_gates

SEED = 20250403


def zero_gates(adapters: dict[str, Path]) -> dict[str, Tensor]:
    """A gate of zeros for every linear any adapter targets: then L_gate starts at exactly ln E."""
    widths = {
        module: shape.in_features
        for folder in adapters.values()
        for module, shape in read_adapter(folder).shapes.items()
    }
    return {module: torch.zeros(len(adapters), width) for module, width in widths.items()}


def plan_steps(tokenizer: PreTrainedTokenizerBase, steps: int, seed: int) -> list[list[GateBatch]]:
    """``steps`` steps of one sequence a task, rows drawn without repetition until a task runs out of them."""
    rng = random.Random(seed)
    columns = []
    for expert, name in enumerate(TASKS):
        rows, _ = task_rows(name)
        order = chain.from_iterable(rng.sample(rows, len(rows)) for _ in range(-(-steps // len(rows))))
        batches = []
        for number, row in enumerate(islice(order, steps)):
            prompt_ids, answer_ids = encode(tokenizer, row)
            ids_BL = torch.tensor([prompt_ids + answer_ids])
            forced = (number + expert) % 2 == 0
            batches.append(GateBatch(ids_BL, torch.ones_like(ids_BL), (expert,), (forced,)))
        columns.append(batches)
    return [list(step) for step in zip(*columns, strict=True)]


def fit(routed: RoutedModel, steps: list[list[GateBatch]], seed: int) -> dict[str, Tensor]:
    """The fitted gates, with a line of progress a step."""
    started = time.perf_counter()

    def report(number: int, metrics: GateMetrics) -> None:
        spent = time.perf_counter() - started
        print(
            f"step {number + 1}/{len(steps)} loss {metrics.loss:.4f} accuracy {metrics.accuracy:.4f} {spent:.0f} s",
            flush=True,
        )

    return fit_gates(routed, steps, LocalFit(seed=seed), report)


def main() -> None:
    """Fits the gates and writes the bank the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="folder of the base checkpoint")
    parser.add_argument("--adapters", type=Path, required=True, help="folder with one adapter a task")
    parser.add_argument("--out", type=Path, required=True, help="the bank to write; replaced if it is there")
    parser.add_argument("--steps", type=int, default=80, help="sequences of each task")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--seed", type=int, default=SEED, help="of the rows' order")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    adapters = {name: arguments.adapters / name for name in TASKS}
    gates = zero_gates(adapters)
    with TemporaryDirectory() as folder:
        bank: Bank = write_bank(Path(folder) / "bank", arguments.base, BASE_ID, adapters, gates)
        model = load_base(arguments.base, torch.bfloat16)
        routed = inject(model, bank, torch.bfloat16)
        steps = plan_steps(AutoTokenizer.from_pretrained(arguments.base), arguments.steps, arguments.seed)
        gates = fit(routed, steps, arguments.seed)
    shutil.rmtree(arguments.out, ignore_errors=True)
    write_bank(arguments.out, arguments.base, BASE_ID, adapters, gates)


if __name__ == "__main__":
    main()
