"""Checks of what is installed: Python, packages, the build of torch, Triton."""

from __future__ import annotations

import importlib.metadata
import sys
from importlib import import_module
from pathlib import Path

from packaging.requirements import Requirement

from meteora_dist.cli.doctor.finding import Finding

_OLDEST_PYTHON = (3, 11)
_DISTRIBUTION = "meteora-dist"
_CUDA_BUILD = "install a CUDA build of torch: https://pytorch.org/get-started/locally"


def check_python() -> Finding:
    """Its version, and the system it runs on."""
    found = f"Python {sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro} on {sys.platform}"
    if sys.version_info < _OLDEST_PYTHON:
        return Finding("python", "failure", found, "use Python 3.11 or newer")
    if sys.platform != "linux":
        return Finding("python", "failure", found, "use Linux")
    return Finding("python", "ok", found)


def check_packages() -> Finding:
    """Whether all that this package needs is installed in a version it works with."""
    wrong = []
    requirements = [Requirement(text) for text in importlib.metadata.requires(_DISTRIBUTION) or ()]
    needed = [one for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    # Triton has a check of its own: without a GPU nothing asks for it.
    for requirement in (one for one in needed if one.name != "triton"):
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is installed, {requirement.specifier} is needed")
    if wrong:
        return Finding("packages", "failure", "; ".join(wrong), f"pip install --upgrade {_DISTRIBUTION}")
    ray, transformers = (importlib.metadata.version(name) for name in ("ray", "transformers"))
    return Finding("packages", "ok", f"{len(needed)} as needed, ray {ray} and transformers {transformers} among them")


def check_torch(devices: Path = Path("/dev")) -> Finding:
    """Whether this build of torch can use the GPUs of this machine.

    Args:
        devices: Where the system shows them.
    """
    import torch

    build = f"torch {torch.__version__}, built for {_built_for(torch.version.cuda, torch.version.hip)}"
    gpus = gpus_of(devices)
    if not gpus:
        return Finding("torch", "ok", f"{build}; no GPU here, the CPU does it all")
    if torch.version.cuda is None:
        return Finding("torch", "failure", f"{build}, but this machine has {gpus} NVIDIA GPU(s)", _CUDA_BUILD)
    if not torch.cuda.is_available():
        cure = "update the driver, or install a build of torch for an older CUDA; `nvidia-smi` says what the driver can"
        return Finding("torch", "failure", f"{build}, cannot use the {gpus} NVIDIA GPU(s) here", cure)
    major, minor = torch.cuda.get_device_capability()
    known = torch.cuda.get_arch_list()
    if not any(arch.startswith(f"sm_{major}") for arch in known):
        what = f"{build}, has no code for this GPU (sm_{major}{minor}), only for {', '.join(known)}"
        return Finding("torch", "failure", what, _CUDA_BUILD)
    return Finding("torch", "ok", f"{build}; {torch.cuda.device_count()} x {torch.cuda.get_device_name()}")


def check_triton(devices: Path = Path("/dev")) -> Finding:
    """Whether there is Triton where kernels need it: on a GPU.

    Args:
        devices: Where the system shows its GPUs.
    """
    try:
        version = import_module("triton").__version__
    except ImportError as cause:
        if not gpus_of(devices):
            return Finding("triton", "ok", "not installed; without a GPU nothing needs it")
        what = f"cannot be imported ({cause}), and the kernels of this machine's GPU are written in it"
        return Finding(
            "triton", "failure", what, "pip install 'triton>=3.7,<4', or a CUDA build of torch, which has it"
        )
    return Finding("triton", "ok", f"triton {version}")


def gpus_of(devices: Path) -> int:
    """How many NVIDIA GPUs the system shows."""
    return len(list(devices.glob("nvidia[0-9]*")))


def _built_for(cuda: str | None, hip: str | None) -> str:
    if cuda:
        return f"CUDA {cuda}"
    return f"ROCm {hip}" if hip else "the CPU"
