"""Everything that is wrong with a bank, where ``Bank.open`` stops at the first fault."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from meteora_dist.adapters import Adapter, AdapterReader
from meteora_dist.bank.bank import EXPERTS_FOLDER, MANIFEST_FILE, Bank, open_expert, open_gates
from meteora_dist.bank.manifest import BankManifest, ExpertEntry, read_manifest
from meteora_dist.bank.routers import open_routers
from meteora_dist.errors import MeteoraError


def faults_of(path: Path, base: Path | None = None, checked: Callable[[str], None] = lambda what: None) -> list[str]:
    """What is wrong with the bank in the folder ``path``, a line each; nothing for a sound one.

    Every header and digest is checked, those of the experts' weights too. Without a sound bank.json nothing else can
    be judged; gates are judged when all experts are sound, because their shapes depend on them.

    Args:
        path: The bank's folder.
        base: Folder of the base model it must be for; None to leave that out.
        checked: Told of every part that was looked at: an expert's name, ``gates`` or ``routers``.
    """
    faults: list[str] = []

    def trying(what: str, check: Callable[[], object]) -> None:
        try:
            check()
        except MeteoraError as fault:
            faults.append(str(fault))
        checked(what)

    try:
        manifest = read_manifest(path / MANIFEST_FILE)
    except MeteoraError as fault:
        return [str(fault)]
    experts: dict[str, Adapter] = {}
    reader = AdapterReader()

    def open_one(entry: ExpertEntry) -> None:
        experts[entry.name] = open_expert(path, manifest, entry, reader)

    for entry in manifest.experts:
        trying(entry.name, partial(open_one, entry))
    if len(experts) == len(manifest.experts):
        trying("gates", lambda: open_gates(path, manifest, experts))
    trying("routers", lambda: open_routers(path, manifest))
    faults += [f"{stray}: bank.json lists no such expert" for stray in _strays(path, manifest)]
    if base is not None and not faults:
        trying("base model", lambda: Bank.open(path, hashing=False).check_base(base))
    return faults


def _strays(path: Path, manifest: BankManifest) -> list[Path]:
    """What lies among the experts and is none."""
    names = {entry.name for entry in manifest.experts}
    folder = path / EXPERTS_FOLDER
    return sorted(found for found in folder.iterdir() if found.name not in names) if folder.is_dir() else []
