"""What the scripts of this folder share: the eight tasks in bank order, their files, and the chat encoding."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from meteora_dist.evaluation.tasks import TaskRow, read_task, split

BASE_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

TASKS = (
    "logical_deduction",
    "question_selection",
    "strategyqa",
    "goal_step_wikihow",
    "contextual_parametric_knowledge_conflicts",
    "object_counting",
    "unit_conversion",
    "cs_algorithms",
)

DATA = Path(__file__).parent / "data"


def task_rows(name: str) -> tuple[list[TaskRow], list[TaskRow]]:
    """Training rows and held-out rows of a task."""
    return split(read_task(DATA / f"{name}.jsonl.gz"))


def encode(tokenizer: PreTrainedTokenizerBase, row: TaskRow) -> tuple[list[int], list[int]]:
    """Token ids of the prompt in the model's chat template, and of the gold answer with its end of turn."""
    turns = [{"role": "user", "content": row.prompt}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    answer_ids = [*tokenizer(row.target, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return tokenizer(prompt, add_special_tokens=False).input_ids, answer_ids
