"""The adapters and data sets of a run, found in their folders and checked before any worker starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from meteora_dist.adapters import Adapter, read_adapter
from meteora_dist.adapters.adapter import CONFIG_FILE
from meteora_dist.errors import AdapterError, DatasetError, ExpertNotFound
from meteora_dist.evaluation.tasks import read_task
from meteora_dist.training.settings import Source

SUFFIXES = (".jsonl", ".jsonl.gz")


def find_adapters(folder: Path, names: Sequence[str]) -> dict[str, Adapter]:
    """The adapters in the folders ``folder/<name>``; of every folder there is, by name, when ``names`` is empty.

    Raises:
        ExpertNotFound: There is no adapter of that name.
        AdapterError: There is none at all, or one is damaged.
    """
    found = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_FILE}"))
    if not found:
        raise AdapterError(folder, f"holds no adapter; it must hold folders, each with {CONFIG_FILE}")
    if unknown := [name for name in names if name not in found]:
        raise ExpertNotFound(f"there is no adapter {unknown[0]!r} in {folder}; there are {', '.join(found)}")
    return {name: read_adapter(folder / name) for name in names or found}


def find_sources(folder: Path, trained: Sequence[str], others: Sequence[str], every: bool) -> tuple[Source, ...]:
    """The data sets ``folder/<expert>.jsonl`` or ``.jsonl.gz``, each read once to check it.

    Args:
        folder: Of the data sets.
        trained: Experts that need one.
        others: Experts whose rows are used where there are any; at least one has to have some, if there are others.
        every: Whether every data set must belong to one of these experts.

    Raises:
        DatasetError: One is missing, damaged, or belongs to no expert.
    """
    files = {path.name.split(".jsonl")[0]: path for path in sorted(folder.glob("*.jsonl*")) if _is_data(path)}
    for name in trained:
        if name not in files:
            raise DatasetError(folder / f"{name}.jsonl", f"expert {name} needs a data set, this or {name}.jsonl.gz")
    known = [*others, *trained]
    if every and (strangers := [path for name, path in files.items() if name not in known]):
        raise DatasetError(strangers[0], f"belongs to no expert; the experts are {', '.join(known)}")
    if others and not files.keys() & set(others):
        raise DatasetError(
            folder, f"a new expert learns to stay silent from the others' rows: it needs one of {', '.join(others)}"
        )
    sources = tuple(Source.of(name, files[name]) for name in known if name in files)
    for source in sources:
        read_task(source.path)
    return sources


def _is_data(path: Path) -> bool:
    return path.name.endswith(SUFFIXES)
