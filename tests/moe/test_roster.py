"""Slots and generations on paper: adapters are single letters."""

from __future__ import annotations

import pytest

from meteora_dist.moe.placement import Placement, contiguous
from meteora_dist.moe.roster import Roster, Transition, carry_over, resident, roster_of, transition


def test_generations_share_slots() -> None:
    first = roster_of({1: "abc"})
    assert first == Roster(("a", "b", "c"), {1: (0, 1, 2)})
    both = first.with_generation(2, "adc")
    assert both == Roster(("a", "b", "c", "d"), {1: (0, 1, 2), 2: (0, 3, 2)})
    assert both.newest == 2
    assert both.adapters == {1: ("a", "b", "c"), 2: ("a", "d", "c")}
    assert both.without_generation(1) == Roster(("a", "d", "c"), {2: (0, 1, 2)})
    assert both.without_generation(2) == first


def test_one_adapter_under_two_names_takes_one_slot() -> None:
    assert roster_of({4: "aba"}) == Roster(("a", "b"), {4: (0, 1, 0)})


def test_a_generation_between_two_others_can_go() -> None:
    # Generation 2 added c and d; 3 removed a and c again, 2 alone needs c.
    three = roster_of({1: "ab", 2: "abcd", 3: "bd"})
    assert three == Roster(("a", "b", "c", "d"), {1: (0, 1), 2: (0, 1, 2, 3), 3: (1, 3)})
    assert three.without_generation(2) == Roster(("a", "b", "d"), {1: (0, 1), 3: (1, 2)})


def test_impossible_changes_are_refused() -> None:
    roster = roster_of({3: "ab"})
    for number in (2, 3):
        with pytest.raises(ValueError, match=f"generation {number} cannot follow generation 3"):
            roster.with_generation(number, "a")
    for number in (3, 9):
        with pytest.raises(ValueError, match=rf"generation {number} cannot be dropped from the live generations \[3\]"):
            roster.without_generation(number)


def test_what_a_rank_does() -> None:
    # Group 1 of two holds c and d; then b goes away, e arrives, and d is to live on both groups.
    before, after = roster_of({1: "abcd"}), roster_of({2: "acde"})
    held = resident(before, contiguous(4, 2), 1)
    assert held == ("c", "d")
    wanted = resident(after, Placement(((0,), (0,), (0, 1), (1,)), 2), 1)
    assert wanted == ("d", "e")
    assert transition(held, wanted) == Transition(load=("e",), keep=("d",), forget=("c",))
    assert transition(held, held) == Transition(load=(), keep=held, forget=())


def test_carried_over_adapters_stay_and_new_ones_fill_up() -> None:
    # Groups hold a b | c d. Without b and with e, f: e goes to group 0, which is the emptier one, then f as well as
    # both are even and ties go to the lower group.
    before = roster_of({1: "abcd"})
    after = roster_of({2: "efacd"})
    assert carry_over(before, contiguous(4, 2), after).owners == ((0,), (0,), (0,), (1,), (1,))
    # A replicated slot stays replicated, and counts in both groups.
    spread = Placement(((0, 1), (0,), (1,), (1,)), 2)
    assert carry_over(before, spread, roster_of({2: "acde"})).owners == ((0, 1), (1,), (1,), (0,))


def test_adding_and_removing_brings_back_the_first_roster() -> None:
    roster, placement = roster_of({1: "abcd"}), contiguous(4, 2)
    for number in range(1, 20):
        more = roster.with_generation(number + 1, [*roster.adapters[number], "x"] if number % 2 else "abcd")
        less = more.without_generation(number)
        placement = carry_over(more, carry_over(roster, placement, more), less)
        roster = less
    assert roster == Roster((*"abcd", "x"), {20: (0, 1, 2, 3, 4)})
    assert placement.owners == ((0,), (0,), (1,), (1,), (0,))
