"""Compiles C for the processor it runs on, once: libraries are kept in the user's cache.

A library's name is a hash of its sources, the compiler, its flags and the processor, so that machines that share a home
never load one another's instructions. It appears whole, under a name that was not there, whoever else builds it too.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fopenmp", "-fPIC", "-shared", "-Wno-psabi")
COMPILERS = ("gcc", "cc", "clang")
SECONDS = 120


class CannotCompile(Exception):
    """There is no library, and the message says why."""


def compiled(main: Path, others: Sequence[Path] = ()) -> ctypes.CDLL:
    """The library of a C source, compiled now unless it was before.

    Args:
        main: The source.
        others: Files it includes.

    Raises:
        CannotCompile: There is no compiler or no place for the result, or it failed.
    """
    compiler = _compiler()
    build = [str(compiler), str(compiler.stat().st_mtime_ns), *FLAGS, processor()]
    parts = [*(file.read_bytes() for file in (main, *others)), *(part.encode() for part in build)]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()
    folder, name = _folder(), f"{main.stem}-{digest[:32]}.so"
    if not (folder / name).exists():
        _build(compiler, main, folder / name)
    try:
        return ctypes.CDLL(str(folder / name))
    except OSError as error:
        raise CannotCompile(f"{folder / name} cannot be loaded: {error}") from error


def processor() -> str:
    """What decides which instructions ``-march=native`` uses."""
    known = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "CPU part", "Features")
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        first = []
    return "\n".join([os.uname().machine, *(line for line in first if line.split(":")[0].strip() in known)])


def _compiler() -> Path:
    for name in (os.environ.get("CC"), *COMPILERS):
        if name and (found := shutil.which(name)):
            return Path(found).resolve()
    raise CannotCompile(f"there is no C compiler, none of {', '.join(COMPILERS)}")


def _folder() -> Path:
    """``$METEORA_CACHE/kernels`` or ``~/.cache/meteora/kernels``: nobody else's, for what lies there is run."""
    folder = Path(os.environ.get("METEORA_CACHE") or "~/.cache/meteora").expanduser().absolute() / "kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError) as error:
        raise CannotCompile(f"{folder} cannot be made: {error}") from error
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise CannotCompile(f"{folder} must belong to this user, and no other may write to it")
    return folder


def _build(compiler: Path, source: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as scratch:
        made = Path(scratch) / target.name
        command = [str(compiler), *FLAGS, "-o", str(made), str(source), "-lm"]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CannotCompile(f"{' '.join(command)}: {error}") from error
        if result.returncode:
            raise CannotCompile(f"{' '.join(command)}: exit code {result.returncode}: {result.stderr.strip()}")
        made.replace(target)
