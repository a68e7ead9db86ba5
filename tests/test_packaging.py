"""What is declared, what is pinned and what is installed agree."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import meteora_dist

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
UNCONSTRAINED = {"torch", "triton"}  # see requirements.txt and requirements-cpu.txt


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def declared() -> list[Requirement]:
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return [Requirement(line) for group in groups for line in group]


@pytest.mark.parametrize("requirement", declared(), ids=str)
def test_every_dependency_is_pinned_within_its_range(requirement: Requirement) -> None:
    name = canonicalize_name(requirement.name)
    if name in UNCONSTRAINED:
        assert name not in pins()
        assert requirement.specifier.contains(importlib.metadata.version(name), prereleases=True)
    else:
        assert requirement.specifier.contains(pins()[name])


def test_no_pin_reaches_torch_or_what_its_cuda_builds_bring() -> None:
    assert not [name for name in pins() if name in UNCONSTRAINED or name.startswith("nvidia-")]


def test_version_is_the_packages_own() -> None:
    assert importlib.metadata.version("meteora-dist") == meteora_dist.__version__
