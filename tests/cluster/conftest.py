"""One small Ray for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from meteora_cluster.local import local_ray


@pytest.fixture(scope="module")
def own_ray(ray_home: Path) -> Iterator[None]:
    """A Ray with two logical CPUs that is gone, with all its processes, when the folder's tests are done."""
    with local_ray(cpus=2):
        yield
    assert not ray.is_initialized()
