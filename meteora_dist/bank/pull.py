"""A bank from elsewhere: a folder, a Hugging Face repository, or whatever fsspec reads (S3, Google Cloud Storage).

Only the files that bank.json lists are fetched, into a folder beside the bank's place. It is moved there when every
digest is right, so a fetch that breaks off leaves nothing.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from meteora_dist.adapters.adapter import CONFIG_FILE, WEIGHTS_FILE
from meteora_dist.bank.bank import EXPERTS_FOLDER, MANIFEST_FILE, Bank
from meteora_dist.bank.gates import GATES_FILE
from meteora_dist.bank.manifest import BankManifest, read_manifest
from meteora_dist.bank.routers import ROUTERS_FILE
from meteora_dist.bank.write import check_new
from meteora_dist.errors import BankError

Fetch = Callable[[str], None]
"""Brings the file of this name, relative to the bank, to the same name in the workshop."""

_HUB = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/]+))?(?:/(?P<folder>.+?))?/?")


def pull_bank(source: str, path: Path, fetched: Callable[[int, int], None] = lambda done, of: None) -> Bank:
    """Fetches a bank, checks it and moves it to ``path``.

    Args:
        source: ``hf://owner/name``, ``hf://owner/name@revision``, either with ``/folder/inside``, a URL of a protocol
            fsspec knows, or a local folder.
        path: Where it goes; nothing may be there yet.
        fetched: Told, after each file but bank.json, how many of how many are there.

    Raises:
        BankError: ``path`` exists, a file cannot be had, or the bank is damaged.
        AdapterError: An expert is damaged or asks for something unsupported.
    """
    check_new(path, ())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as workshop:
            folder = Path(workshop) / "bank"
            fetch = _from_hub(source, folder) if source.startswith("hf://") else _from_files(source, folder)
            fetch(MANIFEST_FILE)
            names = list(_files(read_manifest(folder / MANIFEST_FILE)))
            for done, name in enumerate(names, 1):
                fetch(name)
                fetched(done, len(names))
            bank = Bank.open(folder)
            os.rename(folder, path)
    except (OSError, _Unreachable) as cause:
        raise BankError(path, f"cannot be pulled from {source}: {_line(cause)}") from cause
    return bank.moved_to(path)


class _Unreachable(Exception):
    """Something cannot be had; says what and why."""


def _files(manifest: BankManifest) -> Iterable[str]:
    """All but bank.json; names of experts were checked, so none leads elsewhere."""
    yield GATES_FILE
    if manifest.routers is not None:
        yield ROUTERS_FILE
    for entry in manifest.experts:
        yield from (f"{EXPERTS_FOLDER}/{entry.name}/{file}" for file in (CONFIG_FILE, WEIGHTS_FILE))


def _from_hub(source: str, folder: Path) -> Fetch:
    """Every file from one commit, so that a push under way cannot mix two banks."""
    place = _HUB.fullmatch(source)
    if place is None:
        raise _Unreachable("that is no place in the hub; write hf://owner/name or hf://owner/name@revision")
    from huggingface_hub import HfApi, hf_hub_download

    repo, inside = place["repo"], f"{place['folder']}/" if place["folder"] else ""
    try:
        commit = HfApi().repo_info(repo, revision=place["revision"]).sha
    # Of several packages' kinds: the hub's, its HTTP client's, the system's.
    except Exception as cause:
        raise _Unreachable(f"it cannot be had: {_line(cause)}") from cause

    def fetch(name: str) -> None:
        try:
            found = hf_hub_download(repo, inside + name, revision=commit, local_dir=folder.parent / "hub")
        except Exception as cause:
            raise _Unreachable(f"{name} cannot be had: {_line(cause)}") from cause
        _target(folder, name)
        os.rename(found, folder / name)

    return fetch


def _from_files(source: str, folder: Path) -> Fetch:
    """Through fsspec; a place without a protocol is a local folder."""
    from fsspec.core import url_to_fs

    try:
        system, root = url_to_fs(source)
    # An ImportError names the package that this protocol needs.
    except (ImportError, ValueError) as cause:
        raise _Unreachable(_line(cause)) from cause

    def fetch(name: str) -> None:
        target = _target(folder, name)
        try:
            system.get_file(f"{root.rstrip('/')}/{name}", str(target))
        except FileNotFoundError as cause:
            raise _Unreachable(f"it has no {name}") from cause
        # The packages for S3 and others raise errors of their own.
        except Exception as cause:
            raise _Unreachable(f"{name} cannot be had: {_line(cause)}") from cause

    return fetch


def _target(folder: Path, name: str) -> Path:
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _line(cause: BaseException) -> str:
    """The first line of what an error says, or its name."""
    return next(iter(str(cause).strip().splitlines()), type(cause).__name__)
