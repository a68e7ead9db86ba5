"""The folders of banks that methods run on: the evaluated one, or one derived from it and kept in the output folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from meteora_dist.adapters import read_adapter
from meteora_dist.bank import Bank
from meteora_dist.evaluation.banks import named_bank, prototype_bank
from meteora_dist.evaluation.cells import digest
from meteora_dist.evaluation.merging import MergeRecipe, merge
from meteora_dist.evaluation.methods import Home, Method
from meteora_dist.evaluation.plan import EvalPlan


def home_of(plan: EvalPlan, bank: Bank, home: Home, methods: Sequence[Method], say: Callable[[str], None]) -> Path:
    """The bank that ``methods``, all of one ``home``, run on; made now where it is not there yet.

    Args:
        plan: Of the evaluation.
        bank: The evaluated one.
        home: Where the methods run.
        methods: Those of the plan that run there.
        say: Told of what takes a while.
    """
    if home == "own":
        return bank.path
    work = plan.out / "work"
    if home == "prototypes":
        folder = work / f"prototypes-{digest(bank.digests)[:16]}"
        return folder if folder.is_dir() else prototype_bank(bank, folder).path
    adapters = {method.name: _adapter(plan, bank, method, work, say) for method in methods}
    folder = work / f"named-{digest([(name, read_adapter(path).digest) for name, path in adapters.items()])[:16]}"
    return folder if folder.is_dir() else named_bank(bank, plan.model, adapters, folder).path


def _adapter(plan: EvalPlan, bank: Bank, method: Method, work: Path, say: Callable[[str], None]) -> Path:
    if method.kind == "adapter":
        return plan.adapters[method.name]
    # The names of merges are the kinds of merging.
    recipe = MergeRecipe(method.name, plan.density, plan.merge_rank, plan.seed)  # type: ignore[arg-type]
    folder = work / f"{method.name}-{digest([recipe.identity(), sorted(bank.digests)])[:16]}"
    if not folder.is_dir():
        say(f"merging {len(bank.names)} adapters: {method.name}")
        merge(plan.model, dict(zip(bank.names, bank.adapters, strict=True)), recipe, folder)
    return folder
