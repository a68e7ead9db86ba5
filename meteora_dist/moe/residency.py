"""What a world of ranks holds, and how it comes to hold something else: data that travels to every rank.

Every change is a step from one residency to the next, whatever it is for: a new bank generation, an old one that no
request uses any more, another placement. A rank works out by itself what it has to load and what it forgets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from meteora_dist.bank import Bank
from meteora_dist.moe.balance import initial
from meteora_dist.moe.placement import Placement
from meteora_dist.moe.roster import Roster, carry_over, resident, roster_of


@dataclass(frozen=True, slots=True)
class Residency:
    """The live generations, and who holds their adapters.

    Attributes:
        roster: Slots and live generations.
        placement: Of the slots on expert-parallel groups.
        folders: The bank's folder for each live generation.
    """

    roster: Roster
    placement: Placement
    folders: Mapping[int, Path]

    @classmethod
    def of(cls, bank: Bank, groups: int) -> Residency:
        """One generation, the bytes of its adapters spread evenly over ``groups`` expert-parallel groups."""
        number = bank.manifest.generation
        roster = roster_of({number: bank.digests})
        size_of = {adapter.digest: adapter.parameters for adapter in bank.adapters}
        placement = initial([size_of[digest] for digest in roster.slots], groups)
        return cls(roster, placement, {number: bank.path})

    def with_bank(self, bank: Bank) -> Residency:
        """With one more generation; what is resident stays where it is.

        Raises:
            ValueError: The bank's generation is not above the live ones.
        """
        number = bank.manifest.generation
        return self._to(self.roster.with_generation(number, bank.digests), {**self.folders, number: bank.path})

    def without(self, number: int) -> Residency:
        """Without a generation that no request uses any more.

        Raises:
            ValueError: It is not live, or the only one.
        """
        roster = self.roster.without_generation(number)
        return self._to(roster, {live: folder for live, folder in self.folders.items() if live != number})

    def placed(self, placement: Placement) -> Residency:
        """With the same slots on other groups.

        Raises:
            ValueError: ``placement`` is for another number of slots or groups.
        """
        if (len(placement.owners), placement.groups) != (len(self.roster.slots), self.placement.groups):
            raise ValueError(
                f"a placement of {len(placement.owners)} slots on {placement.groups} groups does not fit "
                f"{len(self.roster.slots)} slots on {self.placement.groups}"
            )
        return replace(self, placement=placement)

    def held_by(self, group: int) -> tuple[str, ...]:
        """Digests of the adapters that an expert-parallel group holds, in the order of their local ids."""
        return resident(self.roster, self.placement, group)

    def _to(self, roster: Roster, folders: Mapping[int, Path]) -> Residency:
        return Residency(roster, carry_over(self.roster, self.placement, roster), folders)
