"""Sequences with known experts: rows made into tokens, and which of them a step takes.

Which sequences a step takes is a function of the step's number alone, so a run that goes on where another ended sees
what the other would have seen.

Shapes: B sequences, L positions.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
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


class Encoded(NamedTuple):
    """Token ids of a prompt and of what follows it."""

    prompt_ids: list[int]
    answer_ids: list[int]


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence of a step.

    Attributes:
        encoded: Its tokens.
        expert: Index of the expert it belongs to.
        forced: Whether it runs with that expert; otherwise the gates route it.
        real: Whether it counts; fills up batches where it does not.
    """

    encoded: Encoded
    expert: int
    forced: bool
    real: bool = True


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences that pass the model together.

    Attributes:
        ids_BL: Token ids, padded on the right.
        mask_BL: 1 for a token, 0 for padding.
        counted_BL: Whether a token counts as a label.
        experts: The expert of each sequence.
        forced: Whether each sequence runs with its own expert; otherwise the gates route it.
    """

    ids_BL: Tensor
    mask_BL: Tensor
    counted_BL: Tensor
    experts: tuple[int, ...]
    forced: tuple[bool, ...]

    @property
    def counted(self) -> int:
        """Positions that count: those whose next token does."""
        return int(self.counted_BL[:, 1:].sum())

    @property
    def expert_labels(self) -> Tensor:
        """The expert of every token, [B, L], ``IGNORE`` where it does not count."""
        labels_B1 = torch.tensor(self.experts, device=self.ids_BL.device)[:, None]
        return labels_B1.expand_as(self.ids_BL).masked_fill(~self.counted_BL, IGNORE)

    @property
    def token_labels(self) -> Tensor:
        """The id of every token, [B, L], ``IGNORE`` where it does not count."""
        return self.ids_BL.masked_fill(~self.counted_BL, IGNORE)

    def to(self, device: torch.device) -> Batch:
        """The same on ``device``."""
        tensors = (self.ids_BL.to(device), self.mask_BL.to(device), self.counted_BL.to(device))
        return Batch(*tensors, self.experts, self.forced)


def encode(tokenizer: PreTrainedTokenizerBase, row: TaskRow) -> Encoded:
    """The tokens of a row as it is asked in evaluation, and of its answer with its end."""
    return Encoded(list(prompt_ids(tokenizer, [row.prompt])), list(answer_ids(tokenizer, row.target)))


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
    length = max(len(ids) + len(answer) for ids, answer in (one.encoded for one in sequences))
    ids_BL = torch.full((len(sequences), length), pad_id)
    mask_BL = torch.zeros(len(sequences), length, dtype=torch.long)
    counted_BL = torch.zeros(len(sequences), length, dtype=torch.bool)
    for b, one in enumerate(sequences):
        ids = [*one.encoded.prompt_ids, *one.encoded.answer_ids]
        ids_BL[b, : len(ids)] = torch.tensor(ids)
        mask_BL[b, : len(ids)] = 1
        counted_BL[b, 0 if count_prompt else len(one.encoded.prompt_ids) : len(ids)] = one.real
    experts, forced = (one.expert for one in sequences), (one.forced for one in sequences)
    return Batch(ids_BL, mask_BL, counted_BL, tuple(experts), tuple(forced))


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
    """Whether the sequence at a place runs with its own expert: ``share`` of any expert's, evenly spread over them."""
    turn = sum(divmod(place, experts))
    return math.floor((turn + 1) * share) > math.floor(turn * share)
