"""The data sets of a run, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from meteora_dist.evaluation.tasks import TaskRow, read_task, split
from meteora_dist.training.data import Batch, Halves, Order, Sample, collate, encode, read_texts
from meteora_dist.training.settings import DataSettings, Run, Source

Row = TaskRow | str


class Parts(NamedTuple):
    """The rows of a data set."""

    training: list[Row]
    held_out: list[Row]


class TaskData:
    """Batches of every step, and of the held-out rows. Rows are tokenised when they are needed."""

    def __init__(
        self,
        run: Run,
        settings: DataSettings,
        experts: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        count_prompt: bool,
    ) -> None:
        """Reads the data sets of a run.

        Args:
            run: The run.
            settings: Its objective's options.
            experts: The bank's, in its order.
            tokenizer: The base model's.
            count_prompt: Whether tokens of prompts count as labels.

        Raises:
            DatasetError: A data set is damaged.
        """
        self._loop = run.loop
        self._settings = settings
        self._tokenizer = tokenizer
        self._count_prompt = count_prompt
        self._experts = [experts.index(source.expert) for source in run.sources]
        self._parts = [self._read(source) for source in run.sources]
        self._sizes = [len(parts.training) for parts in self._parts]
        self._order = Order(self._sizes, settings.sampler == "balanced", run.loop.seed)

    def training(self, step: int, rank: int, world: int) -> list[Batch]:
        """The batches that worker ``rank`` of ``world`` passes in step number ``step``, one an accumulation."""
        loop = self._loop
        start = step * loop.accumulation * world * loop.micro_batch
        places = range(start, start + loop.accumulation * world * loop.micro_batch)
        return [
            self._batch([self._sample(place) for place in places[first : first + loop.micro_batch]])
            for first in range(rank * loop.micro_batch, len(places), world * loop.micro_batch)
        ]

    def held_out(self, rank: int, world: int) -> list[Batch]:
        """The worker's share of the held-out rows, none forced; every worker gets equally many batches."""
        size, limit = self._loop.micro_batch, self._settings.hold_out_rows
        samples = [
            self._single(row, expert, forced=False)
            for expert, parts in zip(self._experts, self._parts, strict=True)
            for row in parts.held_out[:limit]
        ]
        if not samples:
            return []
        samples += [replace(samples[0], real=False)] * (-len(samples) % (size * world))
        own = samples[rank::world]
        return [self._batch(own[first : first + size]) for first in range(0, len(own), size)]

    def _read(self, source: Source) -> Parts:
        rows: list[Row] = [*(read_texts if source.unlabelled else read_task)(source.path)]
        training, held_out = split(rows, self._settings.hold_out)
        return Parts(training[: self._settings.rows or None], held_out)

    def _sample(self, place: int) -> Sample:
        """The sequence at a place of the run's order."""
        source, row = self._order(place)
        return self._single(self._parts[source].training[row], self._experts[source], forced=False)

    def _single(self, row: Row, expert: int, forced: bool) -> Sample:
        tokenizer = self._tokenizer
        ids = Halves([], tokenizer(row).input_ids) if isinstance(row, str) else encode(tokenizer, row)
        ids = ids.cut(self._settings.max_tokens)
        return Sample(ids, Halves([expert] * len(ids.prompt), [expert] * len(ids.answer)), forced)

    def _batch(self, samples: list[Sample]) -> Batch:
        pad_id = self._tokenizer.pad_token_id
        pad_id = self._tokenizer.eos_token_id if pad_id is None else pad_id
        return collate(samples, pad_id, self._count_prompt)
