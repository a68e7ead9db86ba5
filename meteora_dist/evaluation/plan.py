"""What an evaluation is asked to do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from meteora_dist.bank import Bank
from meteora_dist.engine.config import EngineConfig
from meteora_dist.errors import EvaluationError
from meteora_dist.evaluation.lorahub import HubSearch
from meteora_dist.evaluation.methods import Method
from meteora_dist.evaluation.suite import Task
from meteora_dist.model.load import Dtype


@dataclass(frozen=True, slots=True)
class CompositeKind:
    """Composite questions of ``n`` sub-questions after ``shots`` worked examples."""

    n: int
    shots: int

    @property
    def name(self) -> str:
        """For people and files."""
        return f"composite-{self.n} {self.shots}-shot"


@dataclass(frozen=True, slots=True)
class Machine:
    """How the model is run: numbers, torch threads, requests in a batch, and most tokens of prompt and answer."""

    dtype: Dtype = "float32"
    threads: int = 1
    batch: int = 6
    max_len: int = 4096


@dataclass(frozen=True, slots=True)
class EvalPlan:
    """One evaluation.

    Attributes:
        model: Folder of the base model.
        banks: Folders of banks by label. Several that differ only in their gates, trained with different seeds, show
            how much the seed matters.
        out: Folder of cells, derived adapters and results.
        methods: What is compared.
        tasks: What it is compared on.
        adapters: Further PEFT adapters by method name.
        composites: Kinds of composite questions.
        composite_rows: Questions of each kind.
        composite_methods: Names of the methods that are asked them; all methods if empty.
        max_tokens: Most tokens of an answer; of a composite one, so many for each sub-question.
        seed: Of composites, DARE, LoraHub and bootstraps.
        perplexity: Whether gold answers are passed over as well.
        gates: Whether choices of gates are counted, and one sequence drawn.
        density: Share of entries that TIES and DARE keep.
        merge_rank: Rank of what they leave.
        hub: LoraHub's search.
        machine: How the model is run.
    """

    model: Path
    banks: Mapping[str, Path]
    out: Path
    methods: tuple[Method, ...]
    tasks: tuple[Task, ...]
    adapters: Mapping[str, Path] = field(default_factory=dict)
    composites: tuple[CompositeKind, ...] = ()
    composite_rows: int = 24
    composite_methods: tuple[str, ...] = ()
    max_tokens: int = 24
    seed: int = 0
    perplexity: bool = False
    gates: bool = False
    density: float = 0.2
    merge_rank: int = 64
    hub: HubSearch = field(default_factory=HubSearch)
    machine: Machine = field(default_factory=Machine)

    def config(self, bank: Path) -> EngineConfig:
        """The engine of a bank."""
        machine = self.machine
        cache: int = EngineConfig.model_fields["kv_cache_tokens"].default
        return EngineConfig(
            model=self.model,
            bank=bank,
            dtype=machine.dtype,
            threads=machine.threads,
            max_batch_requests=machine.batch,
            max_model_len=machine.max_len,
            kv_cache_tokens=max(cache, machine.max_len),
            share_prefixes=True,
        )

    def asks_composites(self, method: Method) -> bool:
        """Whether a method is asked composite questions; one that is told the task cannot be."""
        return not method.one_task and (not self.composite_methods or method.name in self.composite_methods)

    def check(self) -> dict[str, Bank]:
        """Opens the banks, and looks for what would end the evaluation half-way.

        Raises:
            CheckpointError: A bank is damaged or of another base model.
            EvaluationError: A task lacks its expert or enough training rows, or a name is used twice.
        """
        if strange := sorted(set(self.composite_methods) - {method.name for method in self.methods}):
            raise EvaluationError(f"composite questions are to be asked of {strange[0]}, which is none of the methods")
        if useless := [m.name for m in self.methods if m.one_task and m.name in self.composite_methods]:
            raise EvaluationError(f"method {useless[0]} is told the task, and cannot be asked composite questions")
        banks = {label: Bank.open(path) for label, path in self.banks.items()}
        first, *others = banks.values()
        first.check_base(self.model)
        for bank in others:
            if (bank.names, bank.digests) != (first.names, first.digests):
                raise EvaluationError(
                    f"{bank.path} and {first.path} hold other experts; banks of one evaluation differ in gates alone"
                )
        kinds = {method.kind for method in self.methods}
        for task in self.tasks:
            if "oracle" in kinds and task.name not in first.names:
                raise EvaluationError(
                    f"method oracle needs an expert called {task.name}, like the task; {first.path} has "
                    f"{', '.join(first.names)}"
                )
            if "lorahub" in kinds and len(task.training) < self.hub.examples:
                raise EvaluationError(
                    f"method lorahub needs {self.hub.examples} training rows; task {task.name} has {len(task.training)}"
                )
        return banks


def context_length(model: Path, most: int) -> int:
    """``most``, or what the model's positions allow if that is less."""
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # Loading the model will say what is wrong with it.
        return most
    return min(most, int(config.get("max_position_embeddings", most)))
