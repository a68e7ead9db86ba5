"""What gates are trained on: rows of one expert, and composites of several, some of them teacher-forced."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from meteora_dist.errors import TrainingError
from meteora_dist.evaluation.tasks import TaskRow
from meteora_dist.training.composites import CompositeDraw, encode_composite
from meteora_dist.training.data import Sample, is_forced
from meteora_dist.training.settings import GateRun
from meteora_dist.training.task_data import TaskData


class GateData(TaskData):
    """Batches of every step, and of the held-out rows, which are single ones."""

    def __init__(self, run: GateRun, experts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        """As ``TaskData``.

        Raises:
            DatasetError: A data set is damaged.
            TrainingError: Composites are asked for, and the tokenizer cannot say where its tokens lie in a text.
        """
        gates = run.gates
        if gates.composites and not tokenizer.is_fast:
            raise TrainingError(
                f"composites need a fast tokenizer, which knows where tokens lie in a text; {run.base} has none"
            )
        super().__init__(run, gates, experts, tokenizer, gates.count_prompt)
        self._gates = gates
        askable = [0 if source.unlabelled else size for source, size in zip(run.sources, self._sizes, strict=True)]
        self._draw = CompositeDraw(askable, gates.composites, gates.composite_parts, run.loop.seed)

    def _sample(self, place: int) -> Sample:
        forced = is_forced(place, len(self._parts), self._gates.teacher_forced)
        parts = self._draw(place, self._order(place))
        rows = [self._parts[source].training[row] for source, row in parts]
        experts = [self._experts[source] for source, _ in parts]
        if len(parts) == 1:
            return self._single(rows[0], experts[0], forced)
        questions = [row for row in rows if isinstance(row, TaskRow)]
        ids, owners = encode_composite(self._tokenizer, questions, experts)
        return Sample(ids.cut(self._gates.max_tokens), owners.cut(self._gates.max_tokens), forced)
