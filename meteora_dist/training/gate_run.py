"""From a base model, adapters and data sets to a bank with trained gates: what comes before the workers, and after.

Shapes: E experts, A of them with trained rows, H input features of a linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from meteora_dist.adapters import Adapter, read_adapter
from meteora_dist.adapters.write import write_null
from meteora_dist.bank import Bank, BankEdit, NewExpert, RoutingDefaults, edit_bank, fingerprint, write_bank
from meteora_dist.bank.gates import model_order
from meteora_dist.bank.write import check_new
from meteora_dist.errors import InvalidRequest, TrainingError
from meteora_dist.model.fit import check_adapters
from meteora_dist.training.data import read_texts
from meteora_dist.training.run_folder import REPORT_ONLY, TRAINED_FILE, claim
from meteora_dist.training.settings import GateRun, GateSettings, LoopSettings, Source
from meteora_dist.training.sources import find_adapters, find_sources
from meteora_dist.training.trained_experts import write_trained_adapter

NULL_EXPERT = "null"
"""The expert that adds nothing, for text that belongs to no other one."""


@dataclass(frozen=True, slots=True)
class GateRequest:
    """What is asked for.

    Attributes:
        base: Folder of the base model.
        adapters: Folder with one PEFT adapter for each expert, in a folder of the expert's name.
        data: Folder with one data set for each expert, ``<expert>.jsonl`` or ``<expert>.jsonl.gz``.
        out: Where the bank goes; nothing may be there yet.
        folder: Of the run.
        base_id: Name of the base model, for people; None for the folder's name.
        experts: Which experts, in the order of the bank; empty for all in ``adapters``, by name.
        bank: A bank that ``add`` joins; None for a new bank.
        add: Experts that join it; only their gate rows are trained.
        unlabelled: File of texts that belong to no expert; it adds the null expert.
        loop: The loop's options.
        gates: The gates' options.
    """

    base: Path
    adapters: Path
    data: Path
    out: Path
    folder: Path
    base_id: str | None = None
    experts: tuple[str, ...] = ()
    bank: Path | None = None
    add: tuple[str, ...] = ()
    unlabelled: Path | None = None
    loop: LoopSettings = field(default_factory=LoopSettings)
    gates: GateSettings = field(default_factory=GateSettings)


class GateTraining:
    """One run, from its request to its bank.

    Attributes:
        run: What the workers are given.
    """

    def __init__(self, request: GateRequest) -> None:
        """Checks all that can be checked without the model's weights, and writes the draft of the bank.

        Raises:
            MeteoraError: Something is missing, damaged, or does not go together; says what and where.
        """
        self._request = request
        self._old = None if request.bank is None else Bank.open(request.bank)
        check_new(request.out, ())
        self._check_options()
        self._adapters = self._joining()
        old = {} if self._old is None else dict(zip(self._old.names, self._old.adapters, strict=True))
        check_adapters(request.base, {**old, **self._adapters})
        sources = find_sources(request.data, tuple(self._adapters), tuple(old), every=not request.experts)
        if request.unlabelled is not None:
            read_texts(request.unlabelled)
            sources += (Source.of(NULL_EXPERT, request.unlabelled, unlabelled=True),)
        if request.gates.composites and sum(not source.unlabelled for source in sources) < 2:
            raise TrainingError("composites ask rows of several experts in one: they need two data sets at least")
        self._lock = claim(request.folder, self._recipe(sources))
        if request.unlabelled is not None:
            self._adapters[NULL_EXPERT] = self._null([*old.values(), *self._adapters.values()])
        self.run = GateRun(
            base=request.base.resolve(),
            draft=self._draft(request.folder.resolve() / "draft"),
            folder=request.folder.resolve(),
            sources=sources,
            trained=tuple(self._adapters),
            loop=request.loop,
            gates=request.gates,
        )

    @property
    def done(self) -> bool:
        """Whether the workers have finished already."""
        return (self.run.folder / TRAINED_FILE).exists()

    def publish(self) -> Bank:
        """Writes the bank from what the workers have left.

        Raises:
            BankError: It cannot be written.
        """
        trained = load_file(self.run.folder / TRAINED_FILE)
        rows = {name.removeprefix("gate."): row for name, row in trained.items() if name.startswith("gate.")}
        return self._write(self._request.out, rows, self._folders(trained))

    def _check_options(self) -> None:
        request = self._request
        if bool(request.add) and request.bank is None:
            raise TrainingError("--add needs the bank that the experts join: --bank")
        if request.bank is None:
            return
        if not request.add and request.unlabelled is None:
            raise TrainingError("--bank is for experts that join it: name them with --add, or give --null-text")
        if request.experts:
            raise TrainingError("--expert chooses the experts of a new bank; those that join one are named with --add")
        if request.gates.lora_learning_rate is not None:
            raise TrainingError(
                "experts that join a bank have only their gate rows trained: leave lora_learning_rate out"
            )
        assert self._old is not None, "a bank was named"
        self._old.check_base(request.base)
        joining = (*request.add, *([NULL_EXPERT] if request.unlabelled is not None else []))
        if known := [name for name in joining if name in self._old.names]:
            raise InvalidRequest(f"the bank has an expert {known[0]!r} already; it has {', '.join(self._old.names)}")

    def _joining(self) -> dict[str, Adapter]:
        """The adapters whose gate rows are trained, without the null expert's."""
        request = self._request
        if self._old is not None and not request.add:
            return {}
        found = find_adapters(request.adapters, request.experts if self._old is None else request.add)
        if NULL_EXPERT in found and request.unlabelled is not None:
            raise TrainingError(
                f"there is an adapter named {NULL_EXPERT!r} already: leave --null-text out, or rename it"
            )
        return found

    def _recipe(self, sources: tuple[Source, ...]) -> dict[str, Any]:
        request, old = self._request, self._old
        return {
            "base": fingerprint(request.base),
            "adapters": {name: adapter.digest for name, adapter in self._adapters.items()},
            "data": {source.expert: source.sha256 for source in sources},
            "bank": None if old is None else [old.manifest.gate_digest, *old.digests],
            "loop": request.loop.model_dump(mode="json", exclude=REPORT_ONLY),
            "gates": request.gates.model_dump(mode="json"),
        }

    def _null(self, others: list[Adapter]) -> Adapter:
        linear = model_order({linear for adapter in others for linear in adapter.shapes})[0]
        shape = next(adapter.shapes[linear] for adapter in others if linear in adapter.shapes)
        folder = self._request.folder / NULL_EXPERT
        return read_adapter(write_null(folder, linear, shape.in_features, shape.out_features))

    def _draft(self, path: Path) -> Path:
        """A bank of all experts, its untrained rows as training starts from them; made once a run."""
        if not path.exists():
            generator = torch.Generator().manual_seed(self._request.loop.seed)
            rows = {}
            for linear, width in self._widths().items():
                zeros_AH = torch.zeros(len(self._adapters), width)
                rows[linear] = (
                    zeros_AH if self._request.gates.init == "zeros" else zeros_AH.normal_(generator=generator)
                )
            self._write(path, rows, {name: adapter.path for name, adapter in self._adapters.items()})
        return path

    def _widths(self) -> dict[str, int]:
        """Input features of every linear that has a gate."""
        adapters = [*(self._old.adapters if self._old else ()), *self._adapters.values()]
        widths = {linear: shape.in_features for adapter in adapters for linear, shape in adapter.shapes.items()}
        return {linear: widths[linear] for linear in model_order(widths)}

    def _write(self, path: Path, rows: Mapping[str, Tensor], folders: Mapping[str, Path]) -> Bank:
        """The bank with these rows, [A, H] by linear, for the trained experts."""
        request = self._request
        if self._old is None:
            base_id = request.base_id or request.base.resolve().name
            routing = RoutingDefaults(top_k=request.gates.top_k)
            return write_bank(path, request.base, base_id, folders, rows, routing)
        joining = {}
        for index, (name, folder) in enumerate(folders.items()):
            file = request.folder / f"{path.name}-rows-{name}.safetensors"
            save_file({linear: row_AH[index].contiguous() for linear, row_AH in rows.items()}, file)
            joining[name] = NewExpert(folder, file)
        return edit_bank(self._old, BankEdit(add=joining), path)

    def _folders(self, trained: Mapping[str, Tensor]) -> dict[str, Path]:
        """Folder of every trained expert's adapter: its own, or one with the matrices that were trained."""
        if self._request.gates.lora_learning_rate is None:
            return {name: adapter.path for name, adapter in self._adapters.items()}
        folder = self.run.folder / "adapters"
        return {
            name: write_trained_adapter(folder / name, name, adapter, trained)
            for name, adapter in self._adapters.items()
        }
