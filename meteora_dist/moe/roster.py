"""Which adapters are resident in the world, and which bank generations use them: pure data, no tensor.

A slot is one adapter, known by its digest. Generations that have an adapter in common share its slot, whatever the
adapter is called there and wherever it stands in their order.

    generation 1 has the adapters a b c; generation 2, made by replacing b, has a d c
    roster of 1:        slots a b c      1 -> 0 1 2
    roster of 1 and 2:  slots a b c d    1 -> 0 1 2    2 -> 0 3 2
    roster of 2:        slots a d c      2 -> 0 1 2
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from meteora_dist.moe.placement import Placement


@dataclass(frozen=True, slots=True)
class Roster:
    """The slots of the world and the live generations, oldest first.

    Attributes:
        slots: Digest of the adapter in each slot.
        generations: For each live generation, by its number, the slot of every expert in the bank's order.
    """

    slots: tuple[str, ...]
    generations: Mapping[int, tuple[int, ...]]

    @property
    def newest(self) -> int:
        """Number of the generation that new requests use."""
        return max(self.generations)

    @property
    def adapters(self) -> dict[int, tuple[str, ...]]:
        """For each live generation the digests of its experts, in the bank's order."""
        return {number: tuple(self.slots[slot] for slot in experts) for number, experts in self.generations.items()}

    def with_generation(self, number: int, adapters: Sequence[str]) -> Roster:
        """The roster with one more generation; the slots so far keep their numbers.

        Args:
            number: Of the new generation, above all live ones.
            adapters: Digests of its experts, in the bank's order.

        Raises:
            ValueError: ``number`` is not above the live generations.
        """
        if number <= self.newest:
            raise ValueError(f"generation {number} cannot follow generation {self.newest}")
        return roster_of({**self.adapters, number: adapters})

    def without_generation(self, number: int) -> Roster:
        """The roster without a generation; slots that no other one uses disappear, and later ones move up.

        Raises:
            ValueError: ``number`` is not live, or the only one.
        """
        adapters = self.adapters
        if number not in adapters or len(adapters) == 1:
            raise ValueError(f"generation {number} cannot be dropped from the live generations {sorted(adapters)}")
        del adapters[number]
        return roster_of(adapters)


@dataclass(frozen=True, slots=True)
class Transition:
    """What a rank does to get from one set of resident adapters to another, by digest.

    Attributes:
        load: To be read from disk.
        keep: In memory already.
        forget: Freed.
    """

    load: tuple[str, ...]
    keep: tuple[str, ...]
    forget: tuple[str, ...]


def roster_of(adapters: Mapping[int, Sequence[str]]) -> Roster:
    """The roster of live generations, given the digests of each one's experts. A slot stands where first needed."""
    ordered = {number: tuple(adapters[number]) for number in sorted(adapters)}
    slots = tuple(dict.fromkeys(digest for digests in ordered.values() for digest in digests))
    slot_of = {digest: slot for slot, digest in enumerate(slots)}
    return Roster(slots, {number: tuple(slot_of[digest] for digest in digests) for number, digests in ordered.items()})


def resident(roster: Roster, placement: Placement, group: int) -> tuple[str, ...]:
    """Digests of the adapters that an expert-parallel group holds, in the order of their local ids."""
    return tuple(roster.slots[slot] for slot in placement.slots_of(group))


def transition(before: Sequence[str], after: Sequence[str]) -> Transition:
    """How a rank that holds the adapters ``before`` comes to hold ``after``, each in the order of its local ids."""
    held, wanted = frozenset(before), frozenset(after)
    return Transition(
        load=tuple(digest for digest in after if digest not in held),
        keep=tuple(digest for digest in after if digest in held),
        forget=tuple(digest for digest in before if digest not in wanted),
    )


def carry_over(before: Roster, placement: Placement, after: Roster) -> Placement:
    """A placement of ``after`` in which every adapter stays where it is; each new one goes to the emptiest group.

    Args:
        before: The roster that ``placement`` belongs to.
        placement: Of its slots.
        after: The roster to place.
    """
    owners_of = dict(zip(before.slots, placement.owners, strict=True))
    sizes = [sum(group in owners_of.get(digest, ()) for digest in after.slots) for group in range(placement.groups)]
    owners = []
    for digest in after.slots:
        if digest not in owners_of:
            emptiest = sizes.index(min(sizes))
            sizes[emptiest] += 1
            owners_of[digest] = (emptiest,)
        owners.append(owners_of[digest])
    return Placement(tuple(owners), placement.groups)
