"""Which resources a world asks Ray for: pure functions over plain numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from meteora_cluster.errors import PlacementError

_RAY_DECIMALS = 4
"""Ray counts resources in steps of 1e-4."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What one process reserves.

    Attributes:
        cpus: CPU cores, fractions allowed.
        gpus: GPUs, fractions allowed.
    """

    cpus: float = 0.0
    gpus: float = 0.0

    def __add__(self, other: Resources) -> Resources:
        return Resources(self.cpus + other.cpus, self.gpus + other.gpus)

    def bundle(self) -> dict[str, float]:
        """As a placement group bundle; resources of 0 are left out."""
        named = {"CPU": round(self.cpus, _RAY_DECIMALS), "GPU": round(self.gpus, _RAY_DECIMALS)}
        return {name: amount for name, amount in named.items() if amount}


def world_bundles(ranks: int, rank: Resources, driver: Resources | None = None) -> list[dict[str, float]]:
    """One bundle a rank, in rank order; bundle 0 also holds the process that drives the world.

    Args:
        ranks: Size of the world, at least 1.
        rank: What every rank reserves.
        driver: What the driving process reserves beside rank 0; nothing by default.

    Raises:
        ValueError: No ranks, or a rank that reserves nothing.
    """
    if ranks < 1:
        raise ValueError(f"a world has at least one rank, not {ranks}")
    if not rank.bundle():
        raise ValueError("a rank must reserve CPUs or GPUs: an empty bundle cannot be placed")
    first = rank + (driver or Resources())
    return [first.bundle(), *(rank.bundle() for _ in range(ranks - 1))]


def check_bundles(present: Sequence[Mapping[str, float]], needed: Sequence[Mapping[str, float]]) -> None:
    """Checks that a placement group has one big enough bundle for every rank.

    Args:
        present: Bundles of the group, in order.
        needed: Bundles of the world, in rank order.

    Raises:
        PlacementError: A bundle is missing or too small; the message names it.
    """
    if len(present) != len(needed):
        raise PlacementError(
            f"the placement group has {len(present)} bundles, but a world of {len(needed)} needs one each"
        )
    for rank, (has, wants) in enumerate(zip(present, needed, strict=True)):
        short = {name: amount for name, amount in wants.items() if has.get(name, 0.0) < amount}
        if short:
            raise PlacementError(f"bundle {rank} is {dict(has)}, but rank {rank} needs {dict(wants)}")
