"""Sequences with known experts: rows made into tokens, and which of them a step takes.

Which sequences a step takes is a function of the step's number alone, so a run that goes on where another ended sees
what the other would have seen.

Shapes: B sequences, L positions.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from meteora_dist.errors import DatasetError
from meteora_dist.evaluation.prompts import answer_ids, prompt_ids
from meteora_dist.evaluation.tasks import TaskRow, json_lines
from meteora_dist.training.gate_loss import IGNORE


class Halves(NamedTuple):
    """Something of every token of a prompt, and of what follows it: its id, or the expert it belongs to."""

    prompt: list[int]
    answer: list[int]

    def cut(self, most: int) -> Halves:
        """At most so many tokens: the beginning of the prompt goes, and of an answer that is too long its end."""
        answer = self.answer[: most - 1] if self.prompt else self.answer[:most]
        return Halves(self.prompt[-(most - len(answer)) :] if self.prompt else [], answer)


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence of a step.

    Attributes:
        ids: Its tokens.
        experts: Index of the expert that each token belongs to.
        forced: Whether tokens run with those experts; otherwise the gates route them.
        real: Whether it counts; fills up batches where it does not.
    """

    ids: Halves
    experts: Halves
    forced: bool
    real: bool = True


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences that pass the model together.

    Attributes:
        ids_BL: Token ids, padded on the right.
        mask_BL: 1 for a token, 0 for padding.
        counted_BL: Whether a token counts as a label.
        experts_BL: The expert each token belongs to; anything for padding.
        forced: Whether each sequence runs with its own experts; otherwise the gates route it.
    """

    ids_BL: Tensor
    mask_BL: Tensor
    counted_BL: Tensor
    experts_BL: Tensor
    forced: tuple[bool, ...]

    @property
    def counted(self) -> int:
        """Positions that count: those whose next token does."""
        return int(self.counted_BL[:, 1:].sum())

    @property
    def expert_labels(self) -> Tensor:
        """The expert of every token, [B, L], ``IGNORE`` where it does not count."""
        return self.experts_BL.masked_fill(~self.counted_BL, IGNORE)

    @property
    def token_labels(self) -> Tensor:
        """The id of every token, [B, L], ``IGNORE`` where it does not count."""
        return self.ids_BL.masked_fill(~self.counted_BL, IGNORE)

    def rows(self, kept_K: Tensor) -> Batch:
        """The same with these sequences alone."""
        return self._each(lambda of_BL: of_BL[kept_K], tuple(self.forced[k] for k in kept_K.tolist()))

    def to(self, device: torch.device) -> Batch:
        """The same on ``device``."""
        return self._each(lambda of_BL: of_BL.to(device), self.forced)

    def _each(self, change: Callable[[Tensor], Tensor], forced: tuple[bool, ...]) -> Batch:
        return Batch(
            change(self.ids_BL), change(self.mask_BL), change(self.counted_BL), change(self.experts_BL), forced
        )


def encode(tokenizer: PreTrainedTokenizerBase, row: TaskRow) -> Halves:
    """The tokens of a row as it is asked in evaluation, and of its answer with its end."""
    return Halves(list(prompt_ids(tokenizer, [row.prompt])), list(answer_ids(tokenizer, row.target)))


def read_texts(path: Path) -> list[str]:
    """The texts of a file with one ``{"text": ...}`` a line.

    Raises:
        DatasetError: It is missing or damaged, or has no text; names the line.
    """
    texts = []
    for number, fields in json_lines(path):
        text = fields.get("text")
        if not isinstance(text, str) or not text:
            raise DatasetError(path, f"line {number} must have a text that is not empty")
        texts.append(text)
    if not texts:
        raise DatasetError(path, 'has no text; a line is {"text": "..."}')
    return texts


def collate(sequences: Sequence[Sample], pad_id: int, count_prompt: bool) -> Batch:
    """Pads sequences on the right to the longest of them."""
    length = max(len(one.ids.prompt) + len(one.ids.answer) for one in sequences)
    ids_BL = torch.full((len(sequences), length), pad_id)
    mask_BL = torch.zeros(len(sequences), length, dtype=torch.long)
    counted_BL = torch.zeros(len(sequences), length, dtype=torch.bool)
    experts_BL = torch.zeros(len(sequences), length, dtype=torch.long)
    for b, one in enumerate(sequences):
        ids, experts = ([*half.prompt, *half.answer] for half in (one.ids, one.experts))
        ids_BL[b, : len(ids)] = torch.tensor(ids)
        mask_BL[b, : len(ids)] = 1
        counted_BL[b, 0 if count_prompt else len(one.ids.prompt) : len(ids)] = one.real
        experts_BL[b, : len(ids)] = torch.tensor(experts)
        experts_BL[b, len(ids) :] = experts[-1]
    return Batch(ids_BL, mask_BL, counted_BL, experts_BL, tuple(one.forced for one in sequences))


class Order:
    """Which row of which expert stands at each place of an endless line of sequences.

    ``balanced`` takes the experts in turn, and every expert's rows in a shuffled order, shuffled anew whenever they are
    used up. ``proportional`` does the same with one pool of all rows.
    """

    def __init__(self, sizes: Sequence[int], balanced: bool, seed: int) -> None:
        """``sizes`` has the number of rows of every expert."""
        self._sizes = tuple(sizes)
        self._balanced = balanced
        self._shuffled = lru_cache(maxsize=2 * len(sizes) + 2)(self._shuffle)
        self._seed = seed

    def __call__(self, place: int) -> tuple[int, int]:
        """Index of the expert, and of its row."""
        if self._balanced:
            turn, expert = divmod(place, len(self._sizes))
            epoch, at = divmod(turn, self._sizes[expert])
            return expert, self._shuffled(epoch, expert)[at]
        epoch, at = divmod(place, sum(self._sizes))
        row = self._shuffled(epoch, None)[at]
        for expert, size in enumerate(self._sizes):
            if row < size:
                return expert, row
            row -= size
        raise AssertionError("a pool has as many rows as its experts together")

    def _shuffle(self, epoch: int, expert: int | None) -> list[int]:
        size = sum(self._sizes) if expert is None else self._sizes[expert]
        return random.Random(f"{self._seed} {epoch} {expert}").sample(range(size), size)


def is_forced(place: int, experts: int, share: float) -> bool:
    """Whether the sequence at a place runs with its own experts: ``share`` of any expert's, evenly spread over them."""
    turn = sum(divmod(place, experts))
    return math.floor((turn + 1) * share) > math.floor(turn * share)
