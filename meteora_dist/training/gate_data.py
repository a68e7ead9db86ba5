"""What gates are trained on: the data sets of a run, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from meteora_dist.errors import TrainingError
from meteora_dist.evaluation.tasks import TaskRow, read_task, split
from meteora_dist.training.composites import CompositeDraw, encode_composite
from meteora_dist.training.data import Batch, Halves, Order, Sample, collate, encode, is_forced, read_texts
from meteora_dist.training.settings import GateRun, Source

Row = TaskRow | str


class _Parts(NamedTuple):
    training: list[Row]
    held_out: list[Row]


class GateData:
    """Batches of every step, and of the held-out rows. Rows are tokenised when they are needed."""

    def __init__(self, run: GateRun, experts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        """Reads the data sets of ``run``; ``experts`` are the bank's, in its order.

        Raises:
            DatasetError: A data set is damaged.
            TrainingError: Composites are asked for, and the tokenizer cannot say where its tokens lie in a text.
        """
        if run.gates.composites and not tokenizer.is_fast:
            raise TrainingError(
                f"composites need a fast tokenizer, which knows where tokens lie in a text; {run.base} has none"
            )
        self._run = run
        self._tokenizer = tokenizer
        self._experts = [experts.index(source.expert) for source in run.sources]
        self._parts = [self._read(source) for source in run.sources]
        sizes = [len(parts.training) for parts in self._parts]
        self._order = Order(sizes, run.gates.sampler == "balanced", run.loop.seed)
        askable = [0 if source.unlabelled else size for source, size in zip(run.sources, sizes, strict=True)]
        self._draw = CompositeDraw(askable, run.gates.composites, run.gates.composite_parts, run.loop.seed)

    def training(self, step: int, rank: int, world: int) -> list[Batch]:
        """The batches that worker ``rank`` of ``world`` passes in step number ``step``, one an accumulation."""
        loop = self._run.loop
        start = step * loop.accumulation * world * loop.micro_batch
        places = range(start, start + loop.accumulation * world * loop.micro_batch)
        return [
            self._batch([self._sample(place) for place in places[first : first + loop.micro_batch]])
            for first in range(rank * loop.micro_batch, len(places), world * loop.micro_batch)
        ]

    def held_out(self, rank: int, world: int) -> list[Batch]:
        """The worker's share of the held-out rows, all routed by the gates; every worker gets equally many batches."""
        size, limit = self._run.loop.micro_batch, self._run.gates.hold_out_rows
        samples = [
            self._single(row, expert, forced=False)
            for expert, parts in zip(self._experts, self._parts, strict=True)
            for row in parts.held_out[:limit]
        ]
        if not samples:
            return []
        filler = replace(samples[0], real=False)
        samples += [filler] * (-len(samples) % (size * world))
        own = samples[rank::world]
        return [self._batch(own[first : first + size]) for first in range(0, len(own), size)]

    def _read(self, source: Source) -> _Parts:
        rows: list[Row] = [*(read_texts if source.unlabelled else read_task)(source.path)]
        training, held_out = split(rows, self._run.gates.hold_out)
        return _Parts(training[: self._run.gates.rows or None], held_out)

    def _sample(self, place: int) -> Sample:
        forced = is_forced(place, len(self._parts), self._run.gates.teacher_forced)
        parts = self._draw(place, self._order(place))
        rows = [self._parts[source].training[row] for source, row in parts]
        experts = [self._experts[source] for source, _ in parts]
        if len(parts) == 1:
            return self._single(rows[0], experts[0], forced)
        questions = [row for row in rows if isinstance(row, TaskRow)]
        ids, owners = encode_composite(self._tokenizer, questions, experts)
        most = self._run.gates.max_tokens
        return Sample(ids.cut(most), owners.cut(most), forced)

    def _single(self, row: Row, expert: int, forced: bool) -> Sample:
        tokenizer = self._tokenizer
        ids = Halves([], tokenizer(row).input_ids) if isinstance(row, str) else encode(tokenizer, row)
        ids = ids.cut(self._run.gates.max_tokens)
        return Sample(ids, Halves([expert] * len(ids.prompt), [expert] * len(ids.answer)), forced)

    def _batch(self, samples: list[Sample]) -> Batch:
        pad_id = self._tokenizer.pad_token_id
        pad_id = self._tokenizer.eos_token_id if pad_id is None else pad_id
        return collate(samples, pad_id, self._run.gates.count_prompt)
