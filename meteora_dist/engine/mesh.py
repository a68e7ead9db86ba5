"""The mesh of ranks: which place a rank has on each axis."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mesh:
    """``ep * tp`` ranks; neighbours share an expert-parallel group and split its base model.

    Attributes:
        ep: Expert-parallel groups; each has its own requests and owns a part of the experts.
        tp: Ranks inside a group.
    """

    ep: int = 1
    tp: int = 1

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.ep * self.tp

    @property
    def drivers(self) -> tuple[int, ...]:
        """The ranks that requests are sent to: the first of every group."""
        return tuple(range(0, self.size, self.tp))

    def ep_rank(self, rank: int) -> int:
        """The group that ``rank`` belongs to."""
        return rank // self.tp

    def tp_rank(self, rank: int) -> int:
        """Its place inside the group."""
        return rank % self.tp

    def peers(self, tp_rank: int) -> tuple[int, ...]:
        """The ranks at the same place in every group, which exchange token rows with each other."""
        return tuple(range(tp_rank, self.size, self.tp))
