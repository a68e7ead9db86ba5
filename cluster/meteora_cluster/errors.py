"""What can go wrong with a group of ranks."""

from __future__ import annotations

from collections.abc import Mapping


class ClusterError(Exception):
    """Base of everything this package raises on purpose."""


class PlacementError(ClusterError):
    """The cluster, or the placement group handed in, has no room for the world."""


class RankFailed(ClusterError):
    """One or more ranks failed.

    Attributes:
        reasons: What each failed rank said, by rank.
    """

    def __init__(self, doing: str, reasons: Mapping[int, str]) -> None:
        self.doing = doing
        self.reasons = dict(reasons)
        said = "; ".join(f"rank {rank}: {reason}" for rank, reason in sorted(self.reasons.items()))
        super().__init__(f"{doing}: {said}")

    def __reduce__(self) -> tuple[type[RankFailed], tuple[str, dict[int, str]]]:
        return type(self), (self.doing, self.reasons)


class RankTimeout(ClusterError):
    """Some ranks were not ready in time."""
