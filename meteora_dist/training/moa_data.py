"""Sequences of several domains for the MoA objective: task rows made into tokens, and which of them a step takes.

A step takes equally many rows of every domain. Which ones is a function of the step's number and the seed alone.

Shapes: B sequences, L positions, P prompt positions.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from meteora_dist.errors import CheckpointError
from meteora_dist.evaluation.tasks import read_task, split
from meteora_dist.training.data import encode
from meteora_dist.training.gate_loss import IGNORE


@dataclass(frozen=True, slots=True)
class DomainRow:
    """One sequence.

    Attributes:
        prompt_ids: Tokens of the prompt, on which routers vote.
        answer_ids: Tokens of the answer, which carry the language-model loss.
        expert: Index of the expert whose domain it is.
    """

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    expert: int

    @property
    def length(self) -> int:
        """Tokens in all."""
        return len(self.prompt_ids) + len(self.answer_ids)


@dataclass(frozen=True, slots=True)
class DomainBatch:
    """Sequences that pass the model together, each with its own expert.

    Attributes:
        ids_BL: Token ids, padded on the right.
        mask_BL: 1 for a token, 0 for padding.
        labels_BL: The answer's ids, ``IGNORE`` elsewhere; not shifted.
        prompts: Tokens of each prompt.
        experts: The expert of each sequence.
    """

    ids_BL: Tensor
    mask_BL: Tensor
    labels_BL: Tensor
    prompts: tuple[int, ...]
    experts: tuple[int, ...]

    def rows(self, kept: Sequence[int]) -> DomainBatch:
        """The same with these sequences alone."""
        index = list(kept)
        return DomainBatch(
            self.ids_BL[index],
            self.mask_BL[index],
            self.labels_BL[index],
            tuple(self.prompts[i] for i in index),
            tuple(self.experts[i] for i in index),
        )

    def to(self, device: torch.device) -> DomainBatch:
        """The same on ``device``."""
        tensors = (self.ids_BL.to(device), self.mask_BL.to(device), self.labels_BL.to(device))
        return DomainBatch(*tensors, self.prompts, self.experts)


def collate(rows: Sequence[DomainRow], pad_id: int) -> DomainBatch:
    """Pads sequences on the right to the longest of them."""
    length = max(row.length for row in rows)
    ids_BL = torch.full((len(rows), length), pad_id)
    mask_BL = torch.zeros(len(rows), length, dtype=torch.long)
    labels_BL = torch.full((len(rows), length), IGNORE)
    for b, row in enumerate(rows):
        ids_BL[b, : row.length] = torch.tensor([*row.prompt_ids, *row.answer_ids])
        mask_BL[b, : row.length] = 1
        labels_BL[b, len(row.prompt_ids) : row.length] = torch.tensor(row.answer_ids)
    return DomainBatch(
        ids_BL, mask_BL, labels_BL, tuple(len(row.prompt_ids) for row in rows), tuple(row.expert for row in rows)
    )


@dataclass(frozen=True, slots=True)
class DomainData:
    """Rows of every domain.

    Attributes:
        training: Rows by expert index.
        held_out: Likewise; training never sees them.
        skipped: Rows longer than the limit, of all domains.
        pad_id: Fills up batches.
    """

    training: Mapping[int, tuple[DomainRow, ...]]
    held_out: Mapping[int, tuple[DomainRow, ...]]
    skipped: int
    pad_id: int

    def step(self, number: int, rows: int, seed: int) -> list[DomainRow]:
        """The rows of a step: ``rows`` of every domain, each domain's in shuffled order, shuffled anew when used up."""
        taken = []
        for expert, pool in self.training.items():
            for place in range(number * rows, (number + 1) * rows):
                turn, index = divmod(place, len(pool))
                order = random.Random(f"{seed}/{expert}/{turn}").sample(range(len(pool)), len(pool))
                taken.append(pool[order[index]])
        return taken

    def batches(self, rows: Sequence[DomainRow], size: int) -> list[DomainBatch]:
        """Batches of at most ``size`` sequences of alike length, domains mixed."""
        ordered = sorted(rows, key=lambda row: row.length)
        return [collate(ordered[i : i + size], self.pad_id) for i in range(0, len(ordered), size)]


def read_domains(
    folder: Path, experts: Mapping[str, int], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> DomainData:
    """Reads ``<expert>.jsonl`` or ``<expert>.jsonl.gz`` of every expert; the last fifth of a file is held out.

    Args:
        folder: Of the files.
        experts: Index by name.
        tokenizer: The base model's.
        max_tokens: Longest sequence that is used.

    Raises:
        CheckpointError: A file is missing, or has no row that is short enough; names it.
    """
    training, held_out, skipped = {}, {}, 0
    for name, expert in experts.items():
        path = next((path for end in ("jsonl", "jsonl.gz") if (path := folder / f"{name}.{end}").exists()), None)
        if path is None:
            raise CheckpointError(folder, f"has neither {name}.jsonl nor {name}.jsonl.gz, the rows of expert {name}")
        parts = []
        for part in split(read_task(path)):
            texts = [encode(tokenizer, row) for row in part]
            encoded = [DomainRow(tuple(one.prompt), tuple(one.answer), expert) for one in texts]
            parts.append(tuple(row for row in encoded if row.length <= max_tokens))
            skipped += len(encoded) - len(parts[-1])
        training[expert], held_out[expert] = parts
        if not training[expert]:
            raise CheckpointError(path, f"has no row of at most {max_tokens} tokens to train on")
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return DomainData(training, held_out, skipped, pad_id)
