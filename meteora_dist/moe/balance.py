"""Placements that balance measured load over the groups, within a limit on memory: pure functions.

Memory comes first: no group holds more than ``MEMORY_SLACK`` of an even share, or than what sizes alone make
unavoidable. Within that limit the load of the busiest group is brought down. A worked example: ``docs/placement.md``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from meteora_dist.moe.placement import Placement, contiguous

MEMORY_SLACK = 1.05
"""Bytes a group may hold, of an even share of all bytes."""
MIN_GAIN = 0.02
"""A rebalance moves a slot only if that takes this part of a group's mean load off the busier of two groups."""


@dataclass(frozen=True, slots=True)
class Demands:
    """What the slots ask of the groups that hold them.

    Attributes:
        loads: Tokens routed to each slot, in any unit; all zero when unknown.
        sizes: Bytes of each slot.
        groups: How many groups there are.
        extra_copies: How many copies beyond the first may be made, of the slots with the highest load a copy.
    """

    loads: tuple[float, ...]
    sizes: tuple[int, ...]
    groups: int
    extra_copies: int = 0

    def __post_init__(self) -> None:
        """Refuses what cannot be measured.

        Raises:
            ValueError: Lists of different lengths, negative numbers, or no group.
        """
        if len(self.loads) != len(self.sizes) or min((*self.loads, *self.sizes, self.extra_copies), default=0) < 0:
            raise ValueError("every slot needs one load and one size, and neither they nor the copies may be negative")
        if self.groups < 1:
            raise ValueError(f"there are {self.groups} groups; slots need at least one")

    def copies(self) -> list[int]:
        """How many groups shall hold each slot."""
        copies = [1] * len(self.loads)
        for _ in range(self.extra_copies):
            open_slots = [slot for slot, count in enumerate(copies) if count < self.groups and self.loads[slot] > 0]
            if not open_slots:
                break
            copies[max(open_slots, key=lambda slot: (self.loads[slot] / copies[slot], -slot))] += 1
        return copies


def initial(sizes: Sequence[int], groups: int) -> Placement:
    """A placement for unknown loads: ``contiguous`` where that keeps to the limit on memory, else balanced by size."""
    placement = contiguous(len(sizes), groups)
    demands = Demands((0.0,) * len(sizes), tuple(sizes), groups)
    held = [sum(sizes[slot] for slot in placement.slots_of(group)) for group in range(groups)]
    return placement if max(held) <= _limit(demands, demands.copies()) else balanced(demands)


def balanced(demands: Demands) -> Placement:
    """The best placement found from nothing: hottest slots first, each to the idlest group with room, then swaps."""
    return _place([set() for _ in range(demands.groups)], demands, min_gain=0.0)


def rebalanced(placement: Placement, demands: Demands, min_gain: float = MIN_GAIN) -> Placement:
    """A placement near ``placement`` that suits new loads; slots move one by one, those that help most first.

    Args:
        placement: Where the slots are now; same slots and groups as ``demands``.
        demands: What they ask for now.
        min_gain: See ``MIN_GAIN``; for every slot moved.
    """
    if (len(placement.owners), placement.groups) != (len(demands.loads), demands.groups):
        raise ValueError(
            f"demands of {len(demands.loads)} slots on {demands.groups} groups do not belong to a placement of "
            f"{len(placement.owners)} slots on {placement.groups}"
        )
    return _place([set(placement.slots_of(group)) for group in range(demands.groups)], demands, min_gain)


def _place(held: list[set[int]], demands: Demands, min_gain: float) -> Placement:
    """Brings copies to their number, memory below the limit, and then the busiest group down."""
    copies = demands.copies()
    limit = _limit(demands, copies)
    shares = [load / count for load, count in zip(demands.loads, copies, strict=True)]
    sizes: list[float] = list(demands.sizes)
    _drop_copies(held, shares, copies)
    _add_copies(held, shares, demands.sizes, copies, limit)
    _descend(held, sizes, sizes, float("inf"), min_gain=0.0, enough=limit)
    if max(_totals(held, sizes)) > limit:
        held = _by_size(demands, copies)
    mean = sum(_totals(held, shares)) / demands.groups
    _descend(held, shares, sizes, limit, min_gain * mean, enough=mean)
    owners = tuple(
        tuple(group for group, slots in enumerate(held) if slot in slots) for slot in range(len(demands.loads))
    )
    return Placement(owners, demands.groups)


def _limit(demands: Demands, copies: Sequence[int]) -> float:
    """Bytes a group may hold."""
    total = sum(size * count for size, count in zip(demands.sizes, copies, strict=True))
    unavoidable = max(_totals(_by_size(demands, copies), demands.sizes))
    return max(MEMORY_SLACK * total / demands.groups, unavoidable)


def _by_size(demands: Demands, copies: Sequence[int]) -> list[set[int]]:
    """Slots of every group when only sizes count."""
    held: list[set[int]] = [set() for _ in range(demands.groups)]
    _add_copies(held, demands.sizes, demands.sizes, copies, float("inf"))
    _descend(held, demands.sizes, demands.sizes, float("inf"), min_gain=0.0, enough=0.0)
    return held


def _totals(held: Sequence[set[int]], weights: Sequence[float]) -> list[float]:
    """Sum of the weights in every group."""
    return [sum(weights[slot] for slot in sorted(slots)) for slots in held]


def _drop_copies(held: list[set[int]], shares: Sequence[float], copies: Sequence[int]) -> None:
    for slot, count in enumerate(copies):
        owners = [group for group, slots in enumerate(held) if slot in slots]
        totals = _totals(held, shares)
        for group in sorted(owners, key=lambda group: -totals[group])[: max(0, len(owners) - count)]:
            held[group].remove(slot)


def _add_copies(
    held: list[set[int]], shares: Sequence[float], sizes: Sequence[int], copies: Sequence[int], limit: float
) -> None:
    """Hottest first, each to the idlest group that lacks it and has room; to the emptiest where none has."""
    loads, filled = _totals(held, shares), _totals(held, sizes)
    for slot in sorted(range(len(copies)), key=lambda slot: (-shares[slot], -sizes[slot])):
        lacking = [group for group, slots in enumerate(held) if slot not in slots]
        for _ in range(copies[slot] - (len(held) - len(lacking))):
            roomy = [group for group in lacking if filled[group] + sizes[slot] <= limit]
            group = (
                min(roomy, key=lambda group: (loads[group], filled[group]))
                if roomy
                else min(lacking, key=lambda group: filled[group])
            )
            lacking.remove(group)
            held[group].add(slot)
            loads[group] += shares[slot]
            filled[group] += sizes[slot]


@dataclass(frozen=True, slots=True)
class _Step:
    """``leaves`` goes from the busiest group to another one, which may give ``returns`` back."""

    gain: float
    leaves: int
    returns: int | None


def _descend(
    held: list[set[int]],
    weights: Sequence[float],
    sizes: Sequence[float],
    limit: float,
    min_gain: float,
    enough: float,
) -> None:
    """Moves and swaps slots out of the group with the most weight, until it has ``enough`` or nothing helps."""
    while True:
        totals, filled = _totals(held, weights), _totals(held, sizes)
        busiest = totals.index(max(totals))
        # Sums of floats in another order may differ in their last digits; that is no gain.
        least = max(min_gain, 1e-9 * totals[busiest])
        if totals[busiest] <= enough:
            return
        for other in sorted(range(len(held)), key=lambda group: totals[group]):
            gap, room = totals[busiest] - totals[other], (limit - filled[busiest], limit - filled[other])
            steps = [
                step for step in _steps(held[busiest], held[other], weights, sizes, gap, room) if step.gain > least
            ]
            if steps:
                step = max(steps, key=lambda step: step.gain)
                break
        else:
            return
        held[busiest].remove(step.leaves)
        held[other].add(step.leaves)
        if step.returns is not None:
            held[other].remove(step.returns)
            held[busiest].add(step.returns)


def _steps(
    busy: set[int],
    idle: set[int],
    weights: Sequence[float],
    sizes: Sequence[float],
    gap: float,
    room: tuple[float, float],
) -> Iterator[_Step]:
    """Every move and swap that memory allows, with what it takes off the busier of the two for every slot moved."""
    returns: tuple[int | None, ...] = (None, *sorted(idle - busy))
    for leaving in sorted(busy - idle):
        for coming in returns:
            weight, size = (0.0, 0.0) if coming is None else (weights[coming], sizes[coming])
            shift, grown = weights[leaving] - weight, sizes[leaving] - size
            if 0 < shift < gap and grown <= room[1] and -grown <= room[0]:
                # The busier of the two loses ``shift``, or is now the other one.
                gain = min(shift, gap - shift)
                yield _Step(gain if coming is None else gain / 2, leaving, coming)
