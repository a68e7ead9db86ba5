"""Checks of what a service needs around it: model, bank, ports, shared memory, and Ray's token."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from meteora_dist.bank.check import faults_of
from meteora_dist.bank.fingerprint import fingerprint
from meteora_dist.bank.manifest import read_manifest
from meteora_dist.cli.doctor.finding import Finding
from meteora_dist.errors import MeteoraError
from meteora_dist.model.demo_model import damage, demo_model_dir
from meteora_dist.planning.sizes import show_bytes
from meteora_dist.serving.ports import is_free

_SHARED_BYTES = 2**30
"""Ray's object store and the exchange between ranks live in shared memory; containers often get 64 MiB."""


def check_model(model: Path | None) -> Finding:
    """Whether the base model is there and whole.

    Args:
        model: Its folder; None for the demo's.
    """
    if model is None:
        folder, wrong = demo_model_dir(), damage(demo_model_dir())
        if wrong is not None:
            return Finding("model", "failure", f"{folder}: {wrong}", "meteora fetch-demo, or name one with --model")
        return Finding("model", "ok", f"{folder}: the demo's")
    try:
        fingerprint(model)
    except MeteoraError as fault:
        return Finding("model", "failure", str(fault), "a folder with config.json and safetensors is needed")
    return Finding("model", "ok", f"{model}: config and headers are sound")


def check_bank(bank: Path, model: Path | None) -> Finding:
    """Whether the bank is sound, digests included, and made for the model.

    Args:
        bank: Its folder.
        model: Of the base model; None for the demo's.
    """
    base = model or demo_model_dir()
    faults = faults_of(bank, base if base.is_dir() else None)
    if not faults:
        return Finding("bank", "ok", f"{bank}: sound, {len(read_manifest(bank / 'bank.json').experts)} experts")
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    cure = f"see `meteora bank validate {bank}`; fetch or build it again, or name another one with --bank"
    return Finding("bank", "failure", f"{faults[0]}{more}", cure)


def check_port(port: int, protocol: str) -> Finding:
    """Whether a service may listen there.

    Args:
        port: The port.
        protocol: Who wants it, ``http`` or ``grpc``.
    """
    if is_free(port):
        return Finding(f"{protocol} port", "ok", f"{port} is free")
    cure = f"end what listens there (`ss -ltnp 'sport = :{port}'`), or serve with another --{protocol}-port"
    return Finding(f"{protocol} port", "failure", f"{port} is in use", cure)


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """Whether there is room in it.

    Args:
        folder: Where it is mounted.
    """
    if not folder.is_dir():
        return Finding("shared memory", "failure", f"there is no {folder}", "mount a tmpfs there")
    free = shutil.disk_usage(folder).free
    if free < _SHARED_BYTES:
        cure = "give the container more: docker run --shm-size=2g, or an emptyDir with medium Memory"
        return Finding("shared memory", "warning", f"{show_bytes(free)} are free in {folder}", cure)
    return Finding("shared memory", "ok", f"{show_bytes(free)} are free in {folder}")


def check_ray_token(environment: Mapping[str, str] = os.environ) -> Finding:
    """Whether everything on this machine that talks to Ray takes the same token.

    Ray takes RAY_AUTH_TOKEN, else the file RAY_AUTH_TOKEN_PATH names, else ~/.ray/auth_token. A process without the
    variables, such as one that was started by a service manager, takes the file in the home folder.

    Args:
        environment: The process's.
    """
    mode, said = environment.get("RAY_AUTH_MODE", "").lower(), environment.get("RAY_AUTH_TOKEN")
    home_file = Path(environment.get("HOME", "~")).expanduser() / ".ray" / "auth_token"
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    sources = {"RAY_AUTH_TOKEN": said} if said is not None else {}
    for file in [*([Path(named)] if named else []), *([home_file] if home_file.exists() else [])]:
        try:
            sources[str(file)] = file.read_text().strip()
        except OSError as cause:
            cure = f"repair it, or remove it and unset RAY_AUTH_TOKEN_PATH: {file}"
            return Finding("ray token", "failure", f"{file} cannot be read ({cause.strerror})", cure)
    if empty := [name for name, token in sources.items() if not token]:
        return Finding("ray token", "failure", f"{empty[0]} holds no token", f"set it or remove it: {empty[0]}")
    if len(set(sources.values())) > 1:
        what = f"{' and '.join(sources)} hold different tokens: processes of one cluster will refuse each other"
        return Finding("ray token", "failure", what, f"make them equal, or keep one; `rm {home_file}` ends the file's")
    if mode == "token" and not sources:
        cure = "set RAY_AUTH_TOKEN, or `ray get-auth-token --generate`"
        return Finding("ray token", "failure", "RAY_AUTH_MODE is token, and there is none", cure)
    return _agreeing(mode, sources, home_file)


def _agreeing(mode: str, sources: Mapping[str, str], home_file: Path) -> Finding:
    """Of tokens that are equal, or of none."""
    if mode == "disabled" and sources:
        what = f"RAY_AUTH_MODE is disabled, but {next(iter(sources))} has a token: a cluster that wants it refuses us"
        return Finding("ray token", "warning", what, "unset RAY_AUTH_MODE, or remove the token")
    if not mode and str(home_file) in sources:
        what = f"{home_file} switches authentication on in every `ray start`"
        return Finding("ray token", "warning", what, "set RAY_AUTH_MODE on all nodes, and give all the same file")
    return Finding(
        "ray token", "ok", f"from {', '.join(sources)}" if sources else "none; `meteora serve` makes its own"
    )
