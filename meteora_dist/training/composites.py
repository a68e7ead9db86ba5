"""Composite sequences to train on: rows of several experts in one question and one answer, each token with its expert.

They are asked as ``meteora_dist.evaluation.composite`` asks them, and answered as it expects answers. The papers train
on sequences of one expert alone (arXiv 2405.13053).
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from meteora_dist.evaluation.composite import items, numbered, question
from meteora_dist.evaluation.prompts import answer_ids, prompt_text, prompt_tokens
from meteora_dist.evaluation.tasks import TaskRow
from meteora_dist.training.data import Halves

Part = tuple[int, int]
"""A data set, and a row of it."""


class CompositeDraw:
    """Which sequences are composite, and of what: a function of their place alone."""

    def __init__(self, sizes: Sequence[int], share: float, most: int, seed: int) -> None:
        """Draws from data sets.

        Args:
            sizes: Rows of every data set; 0 for one that has no questions.
            share: Probability that a sequence is composite.
            most: Most rows of one; their number is drawn evenly from 2 on.
            seed: Of all draws.
        """
        self._sizes = tuple(sizes)
        self._share = share
        self._most = min(most, sum(size > 0 for size in sizes))
        self._seed = seed

    def __call__(self, place: int, own: Part) -> list[Part]:
        """The parts of the sequence at ``place``, ``own`` among them, each of another data set; just ``own`` mostly."""
        rng = random.Random(f"{self._seed} composite {place}")
        if not self._sizes[own[0]] or self._most < 2 or rng.random() >= self._share:
            return [own]
        others = [source for source, size in enumerate(self._sizes) if size and source != own[0]]
        drawn = rng.sample(others, rng.randint(2, self._most) - 1)
        parts = [own, *((source, rng.randrange(self._sizes[source])) for source in drawn)]
        rng.shuffle(parts)
        return parts


def encode_composite(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[TaskRow], experts: Sequence[int]
) -> tuple[Halves, Halves]:
    """The tokens of a composite question and its answer, and the expert of each.

    A token belongs to the sub-question, or to the sub-answer, that its first character is in. What stands before one,
    its number for instance, belongs to the one it opens: the chat template's beginning to the first sub-question, and
    what it writes between question and answer to the first sub-answer.

    Args:
        tokenizer: A fast one, of the model.
        rows: The sub-questions.
        experts: Theirs.
    """
    text = prompt_text(tokenizer, [question(rows)])
    asked = prompt_tokens(tokenizer, text, offsets=True)
    ends = _ends(text, items([row.prompt for row in rows]))
    prompt_experts = [experts[bisect_right(ends, first) % len(rows)] for first, _ in asked.offset_mapping]

    answer = numbered([row.target for row in rows])
    ids = answer_ids(tokenizer, answer)
    said = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
    ends = _ends(answer, items([row.target for row in rows]))[:-1]
    answer_experts = [experts[bisect_right(ends, first)] for first, _ in said.offset_mapping]
    # The end of turn, which no text has, closes the last answer.
    return Halves(list(asked.input_ids), list(ids)), Halves(prompt_experts, [*answer_experts, experts[-1]])


def _ends(text: str, parts: Sequence[str]) -> list[int]:
    """Where each of the parts, which stand in ``text`` one after another, ends: the place of the character after it."""
    ends: list[int] = []
    for part in parts:
        # Chat templates may trim a question.
        part = part.rstrip()
        ends.append(text.index(part, ends[-1] if ends else 0) + len(part))
    return ends
