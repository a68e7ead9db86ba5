"""The Dockerfile builds from what is there, as pinned, and ends as no root. No engine is asked: its text is read."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import PurePosixPath

import pytest

from tests.k8s.conftest import ROOT
from tests.test_packaging import pins

DOCKERFILE = ROOT / "docker" / "Dockerfile"
STEPS = [
    (line.split(maxsplit=1)[0], line.split(maxsplit=1)[1])
    for line in re.sub(r"\\\n\s*", "", DOCKERFILE.read_text()).splitlines()
    if line and not line.startswith("#")
]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Steps of every stage by its name."""
    found: dict[str, list[tuple[str, str]]] = {}
    for instruction, rest in STEPS:
        if instruction == "FROM":
            found[rest.split(" AS ")[1]] = []
        elif found:
            found[[*found][-1]].append((instruction, rest))
    return found


def sources() -> list[str]:
    """What is copied from the checkout."""
    copies = [rest.split() for instruction, rest in STEPS if instruction == "COPY" and "--from=" not in rest]
    return [word for words in copies for word in words[:-1] if not word.startswith("--")]


@pytest.mark.parametrize("source", sorted(set(sources())))
def test_what_is_copied_exists_and_is_not_ignored(source: str) -> None:
    assert (ROOT / source).exists()
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert source in allowed


def test_the_wheel_gets_every_package_and_file_it_is_made_of() -> None:
    copied = {PurePosixPath(source) for source in sources()}
    project = (ROOT / "pyproject.toml").read_text()
    assert 'where = [".", "kernels", "cluster"]' in project
    assert {PurePosixPath(name) for name in ("meteora_dist", "kernels", "cluster", "LICENSE", "NOTICE")} <= copied


def test_base_images_have_the_pinned_ray_and_a_python_of_ours() -> None:
    bases = {name: value for instruction, rest in STEPS if instruction == "ARG" for name, value in [rest.split("=", 1)]}
    for name, flavour in (("RAY_CPU", "cpu"), ("RAY_GPU", "cu*")):
        assert fnmatch(bases[name], f"rayproject/ray:{pins()['ray']}-py311-{flavour}")


def test_every_image_ends_without_root() -> None:
    for name, steps in stages().items():
        users = [rest for instruction, rest in steps if instruction == "USER"]
        assert users[-1] == "1000:100", name
    assert set(stages()) == {"wheel", "cpu", "gpu", "train", "demo"}


def test_every_installation_is_pinned_and_every_image_checked() -> None:
    installs = [part for _, rest in STEPS for part in re.split("&&", rest) if "pip install" in part]
    assert installs
    assert all("--constraint" in install for install in installs)
    for name in ("cpu", "gpu"):
        assert stages()[name][-1] == ("RUN", "bash /tmp/build/check_image.sh")
