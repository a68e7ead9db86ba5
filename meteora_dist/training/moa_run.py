"""From a bank or adapters, and data sets, to a bank with trained routers: what comes before the workers, and after."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file

from meteora_dist.adapters import Adapter
from meteora_dist.bank import Bank, fingerprint
from meteora_dist.bank.write import check_new
from meteora_dist.errors import InvalidRequest
from meteora_dist.model.fit import check_adapters
from meteora_dist.training.moa_bank import first_bank, trained_experts, write_trained
from meteora_dist.training.run_folder import REPORT_ONLY, TRAINED_FILE, claim
from meteora_dist.training.settings import LoopSettings, MoaRun, MoaSettings
from meteora_dist.training.sources import find_adapters, find_sources


@dataclass(frozen=True, slots=True)
class MoaRequest:
    """What is asked for.

    Attributes:
        base: Folder of the base model.
        data: Folder with one data set for each expert, ``<expert>.jsonl`` or ``<expert>.jsonl.gz``.
        out: Where the bank goes; nothing may be there yet.
        folder: Of the run.
        bank: What training starts from.
        adapters: Or a folder with one PEFT adapter for each expert.
        base_id: Name of the base model, for people, with ``adapters``; None for the folder's name.
        trained: Names of the experts to train; all without any.
        loop: The loop's options.
        moa: The objective's options.
    """

    base: Path
    data: Path
    out: Path
    folder: Path
    bank: Path | None = None
    adapters: Path | None = None
    base_id: str | None = None
    trained: tuple[str, ...] = ()
    loop: LoopSettings = field(default_factory=LoopSettings)
    moa: MoaSettings = field(default_factory=MoaSettings)


class MoaTraining:
    """One run, from its request to its bank.

    Attributes:
        run: What the workers are given.
    """

    def __init__(self, request: MoaRequest) -> None:
        """Checks all that can be checked without the model's weights.

        Raises:
            MeteoraError: Something is missing, damaged, or does not go together; says what and where.
        """
        self._request = request
        if (request.bank is None) == (request.adapters is None):
            raise InvalidRequest("the run starts from --bank or from --adapters: name one of them")
        check_new(request.out, ())
        old = None if request.bank is None else Bank.open(request.bank)
        adapters = _adapters(request, old)
        trained = trained_experts(tuple(adapters), request.trained)
        check_adapters(request.base, adapters)
        # An expert without rows, and that gets none, can be no answer: its domain teaches nobody.
        routable = set() if old is None else {e.name for e in old.manifest.experts if e.router == "trained"}
        taught = [name for name in adapters if name in routable or name in trained]
        sources = find_sources(request.data, taught, (), every=False)
        recipe = {
            "base": fingerprint(request.base),
            "adapters": {name: adapter.digest for name, adapter in adapters.items()},
            "bank": None if old is None else old.manifest.model_dump(mode="json"),
            "data": {source.expert: source.sha256 for source in sources},
            "trained": trained,
            "loop": request.loop.model_dump(mode="json", exclude=REPORT_ONLY),
            "moa": request.moa.model_dump(mode="json"),
        }
        self._lock = claim(request.folder, recipe)
        draft = request.folder.resolve() / "draft" if old is None else old.path.resolve()
        if not draft.exists():
            first_bank(draft, request.base, request.base_id or request.base.resolve().name, adapters)
        self.run = MoaRun(
            base=request.base.resolve(),
            draft=draft,
            folder=request.folder.resolve(),
            sources=sources,
            trained=trained,
            loop=request.loop,
            moa=request.moa,
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
        return write_trained(self._request.out, self.run, load_file(self.run.folder / TRAINED_FILE))


def _adapters(request: MoaRequest, old: Bank | None) -> dict[str, Adapter]:
    """The experts' adapters by name, in the order of the bank."""
    if old is not None:
        old.check_base(request.base)
        return dict(zip(old.names, old.adapters, strict=True))
    assert request.adapters is not None, "one of both was named"
    return find_adapters(request.adapters, ())
