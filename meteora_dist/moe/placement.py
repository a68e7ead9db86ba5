"""Which expert-parallel rank owns which expert: pure functions, no process group."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Placement:
    """A map from experts to ranks.

    Attributes:
        owner: ``owner[e]`` is the rank that holds expert e.
        local_id: ``local_id[e]`` is its index among that rank's experts.
        ranks: How many ranks there are.
    """

    owner: tuple[int, ...]
    local_id: tuple[int, ...]
    ranks: int

    def experts_of(self, rank: int) -> tuple[int, ...]:
        """The experts a rank holds, in the order of their local ids."""
        return tuple(expert for expert, owner in enumerate(self.owner) if owner == rank)


def contiguous(num_experts: int, ranks: int) -> Placement:
    """Runs of neighbouring experts, as even as can be; the first ranks take the remainder.

    Five experts on two ranks: rank 0 holds 0, 1, 2 and rank 1 holds 3, 4.
    """
    share, rest = divmod(num_experts, ranks)
    sizes = [share + (rank < rest) for rank in range(ranks)]
    return Placement(
        owner=tuple(rank for rank, size in enumerate(sizes) for _ in range(size)),
        local_id=tuple(index for size in sizes for index in range(size)),
        ranks=ranks,
    )
