"""Which tasks gain most from an adapter: scores of the base model, and of a short run of equal length on every task.

    python examples/pilot.py --base BASE --data FOLDER --out ADAPTERS --json FILE [--tasks NAME ...]

``FOLDER`` holds one ``<task>.jsonl.gz`` for each candidate. The lines of ``FILE`` are sorted by gain.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from demo_tasks import encode
from peft import PeftModel
from train_adapters import Recipe, train
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from meteora_dist.evaluation.tasks import TaskRow, read_task, split


@dataclass(frozen=True)
class Pilot:
    """Scores in 0..1 on the same held-out rows.

    Attributes:
        commonest: Of the answer most frequent in the training rows.
        guess: Expected of a guess among a row's choices; 0 where the answer is free.
        base: Of the base model.
        pilot: Of the short run.
    """

    task: str
    rows: int
    commonest: float
    guess: float
    base: float
    pilot: float

    @property
    def gain(self) -> float:
        """What the adapter adds to the best of the three."""
        return self.pilot - max(self.commonest, self.guess, self.base)


@torch.inference_mode()
def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[TaskRow]) -> float:
    """Mean score of greedy answers, from one forward pass a row.

    Greedy decoding gives the gold answer exactly when, with the gold answer as input, the most probable token at every
    position is the gold one.
    """
    total = 0.0
    for row in rows:
        prompt_ids, answer_ids = encode(tokenizer, row)
        ids_BL = torch.tensor([prompt_ids + answer_ids[:-1]])
        logits_LV = model(input_ids=ids_BL, use_cache=False, logits_to_keep=len(answer_ids)).logits[0]
        total += row.score(tokenizer.decode(logits_LV.argmax(-1), skip_special_tokens=True))
    return total / len(rows)


def pilot(base: Path, data: Path, name: str, recipe: Recipe, out: Path, count: int) -> Pilot:
    """Trains the task's pilot adapter and scores it beside the base model on the first ``count`` held-out rows."""
    training, held_out = split(read_task(data / f"{name}.jsonl.gz"))
    rows = held_out[:count]
    train(base, name, recipe, training, out)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    commonest = Counter(row.target for row in training).most_common(1)[0][0]
    return Pilot(
        task=name,
        rows=len(rows),
        commonest=sum(row.score(commonest) for row in rows) / len(rows),
        guess=sum(1 / len(row.choices) for row in rows if row.choices) / len(rows),
        base=score(model, tokenizer, rows),
        pilot=score(PeftModel.from_pretrained(model, out / name), tokenizer, rows),
    )


def main() -> None:
    """Runs the pilots the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="folder of the base checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="folder with one file a candidate task")
    parser.add_argument("--out", type=Path, required=True, help="folder the pilot adapters are written to")
    parser.add_argument("--json", type=Path, required=True, help="file the results are written to")
    parser.add_argument("--tasks", nargs="+", help="which tasks (default: every file of FOLDER)")
    parser.add_argument("--tokens", type=int, default=24_000, help="length of each run")
    parser.add_argument("--rows", type=int, default=48, help="held-out rows a task")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = arguments.tasks or sorted(file.name.removesuffix(".jsonl.gz") for file in arguments.data.glob("*.jsonl.gz"))
    recipe = Recipe(rank=8, alpha=16, tokens=arguments.tokens)
    results: list[Pilot] = []
    for name in names:
        results.append(pilot(arguments.base, arguments.data, name, recipe, arguments.out, arguments.rows))
        print(results[-1], f"gain {results[-1].gain:.3f}", flush=True)
        results.sort(key=lambda result: -result.gain)
        rows = [{**asdict(result), "gain": result.gain} for result in results]
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
