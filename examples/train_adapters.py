"""Trains one LoRA adapter a task with PEFT, in PEFT's own format, or one on all tasks: the baselines LoRA-B and LoRA-F.

    python examples/train_adapters.py --base BASE --out ADAPTERS [--tasks NAME ...]
    python examples/train_adapters.py --base BASE --out ADAPTERS --mixture lora-b

Only the answer's tokens carry loss. The base model runs in bf16, the adapter trains in fp32 and is saved in bf16.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_tasks import BASE_ID, TASKS, encode, mixture, task_rows
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from meteora_dist.evaluation.tasks import TaskRow

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SEED = 20250403
LEARNING_RATE = 2e-3
WARM_UP = 0.05
BATCH = 8


@dataclass(frozen=True)
class Recipe:
    """How one adapter is trained: rank, alpha, how many tokens it sees, rsLoRA."""

    rank: int
    alpha: int
    tokens: int
    rslora: bool = False


RECIPES = {
    "goal_step_wikihow": Recipe(4, 8, tokens=80_000),
    "contextual_parametric_knowledge_conflicts": Recipe(8, 16, tokens=70_000),
    "object_counting": Recipe(4, 8, tokens=70_000),
    "unit_conversion": Recipe(8, 16, tokens=120_000),
    "cs_algorithms": Recipe(4, 8, tokens=60_000),
    "logical_deduction": Recipe(4, 4, rslora=True, tokens=60_000),
    "strategyqa": Recipe(4, 4, rslora=True, tokens=35_000),
    "question_selection": Recipe(8, 16, tokens=120_000),
}

MIXTURES = {"lora-b": True, "lora-f": False}
"""Adapters on all tasks, and whether each task gives equally many rows."""
MIXED_TOKENS = sum(recipe.tokens for recipe in RECIPES.values())
"""What the tasks' own adapters have seen together."""


def example(tokenizer: PreTrainedTokenizerBase, row: TaskRow) -> tuple[Tensor, Tensor]:
    """Token ids of the whole chat, and the same ids as labels with the prompt masked by -100."""
    prompt_ids, answer_ids = encode(tokenizer, row)
    return torch.tensor(prompt_ids + answer_ids), torch.tensor([-100] * len(prompt_ids) + list(answer_ids))


def batches(examples: list[tuple[Tensor, Tensor]], tokens: int, rng: random.Random) -> Iterator[list[int]]:
    """Index batches of alike length, in random order, until ``tokens`` tokens are given out."""
    seen = 0
    while True:
        order = sorted(range(len(examples)), key=lambda i: (len(examples[i][0]) // 16, rng.random()))
        groups = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
        rng.shuffle(groups)
        for group in groups:
            if seen >= tokens:
                return
            seen += sum(len(examples[i][0]) for i in group)
            yield group


def train(base: Path, name: str, recipe: Recipe, rows: list[TaskRow], out: Path) -> None:
    """Trains the adapter of one task and writes it to ``out/name``."""
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    lora = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        use_rslora=recipe.rslora,
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
    )
    peft_model = get_peft_model(model, lora)
    peft_model.print_trainable_parameters()
    examples = [example(tokenizer, row) for row in rows]
    plan = list(batches(examples, recipe.tokens, random.Random(SEED)))
    parameters = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)

    def rate(step: int) -> float:
        warm = max(1, int(WARM_UP * len(plan)))
        return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / len(plan))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    started, seen, log = time.perf_counter(), 0, []
    for step, group in enumerate(plan):
        ids = pad_sequence([examples[i][0] for i in group], batch_first=True, padding_value=tokenizer.pad_token_id)
        labels = pad_sequence([examples[i][1] for i in group], batch_first=True, padding_value=-100)
        mask = pad_sequence([torch.ones(len(examples[i][0]), dtype=torch.long) for i in group], batch_first=True)
        hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        answer = labels[:, 1:] != -100
        logits = model.lm_head(hidden[:, :-1][answer]).float()
        loss = cross_entropy(logits, labels[:, 1:][answer])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        seen += int(mask.sum())
        log.append(float(loss.detach()))
        if step % 10 == 9 or step + 1 == len(plan):
            spent = time.perf_counter() - started
            recent = sum(log[-10:]) / len(log[-10:])
            print(f"{name} {step + 1}/{len(plan)} loss {recent:.4f} {seen / spent:.0f} tokens/s", flush=True)
    for parameter in parameters:
        parameter.data = parameter.data.to(torch.bfloat16)
    # The name of the base, not the folder it happened to lie in: the adapter is used on other machines.
    peft_model.peft_config["default"].base_model_name_or_path = BASE_ID
    peft_model.save_pretrained(out / name)


def main() -> None:
    """Trains the adapters the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="folder of the base checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="folder the adapters are written to")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="which tasks")
    parser.add_argument("--mixture", choices=MIXTURES, help="one adapter on all tasks instead")
    parser.add_argument("--tokens", type=int, default=MIXED_TOKENS, help="length of the mixture's run")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.mixture:
        rows = mixture([task_rows(name)[0] for name in TASKS], MIXTURES[arguments.mixture], SEED)
        train(arguments.base, arguments.mixture, Recipe(8, 16, arguments.tokens), rows, arguments.out)
        return
    for name in arguments.tasks:
        rows, _ = task_rows(name)
        train(arguments.base, name, RECIPES[name], rows, arguments.out)


if __name__ == "__main__":
    main()
