"""Which expert-parallel group holds which slot: pure functions, no process group.

A slot is one adapter that is resident in the world. A group holds its slots whole, split over its tp ranks.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Placement:
    """A map from slots to expert-parallel groups.

    Attributes:
        owners: ``owners[s]`` are the groups that hold slot s, ascending; several where it is replicated.
        groups: How many groups there are.
    """

    owners: tuple[tuple[int, ...], ...]
    groups: int

    def __post_init__(self) -> None:
        """Refuses a slot that nobody holds, and groups that do not exist.

        Raises:
            ValueError: Names the slot and its owners.
        """
        for slot, owners in enumerate(self.owners):
            if not owners or list(owners) != sorted(set(owners)) or not 0 <= owners[0] <= owners[-1] < self.groups:
                raise ValueError(
                    f"slot {slot} is placed on {list(owners)}; owners must be one or more of the groups 0 to "
                    f"{self.groups - 1}, ascending"
                )

    def slots_of(self, group: int) -> tuple[int, ...]:
        """The slots a group holds, in the order of their local ids there."""
        return tuple(slot for slot, owners in enumerate(self.owners) if group in owners)

    def local_ids(self, group: int, absent: int) -> tuple[int, ...]:
        """For every slot, its index among the slots of ``group``, or ``absent`` where the group lacks it."""
        local = {slot: index for index, slot in enumerate(self.slots_of(group))}
        return tuple(local.get(slot, absent) for slot in range(len(self.owners)))

    def targets(self, sender: int) -> tuple[int, ...]:
        """For every slot, the group that computes it for tokens of group ``sender``.

        That is the sender itself where it holds a copy; the other senders take turns over the copies, and start at
        another copy for every slot.
        """
        return tuple(
            sender if sender in owners else owners[(_turn(sender, owners) + slot) % len(owners)]
            for slot, owners in enumerate(self.owners)
        )


def contiguous(num_slots: int, groups: int) -> Placement:
    """Runs of neighbouring slots, as even as can be; the first groups take the remainder. For unknown loads.

    Five slots on two groups: group 0 holds 0, 1, 2 and group 1 holds 3, 4.
    """
    share, rest = divmod(num_slots, groups)
    return Placement(
        owners=tuple((group,) for group in range(groups) for _ in range(share + (group < rest))), groups=groups
    )


def _turn(sender: int, owners: tuple[int, ...]) -> int:
    """The sender's number among the groups without a copy."""
    return sender - sum(owner < sender for owner in owners)
