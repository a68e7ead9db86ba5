"""Placement by load: the worked example of docs/placement.md, then properties against brute force."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meteora_dist.moe.balance import MEMORY_SLACK, Demands, balanced, initial, rebalanced
from meteora_dist.moe.placement import Placement, contiguous

PAGE = Path(__file__).parents[2] / "docs" / "placement.md"

EQUAL = (1, 1, 1, 1, 1, 1)
LOADS = (50.0, 30.0, 20.0, 10.0, 6.0, 4.0)


def loads_of(placement: Placement, loads: tuple[float, ...]) -> list[float]:
    """Load of every group, a replicated slot's spread evenly over its copies."""
    shares = [load / len(owners) for load, owners in zip(loads, placement.owners, strict=True)]
    return [sum(shares[slot] for slot in placement.slots_of(group)) for group in range(placement.groups)]


def held(placement: Placement) -> list[tuple[int, ...]]:
    return [placement.slots_of(group) for group in range(placement.groups)]


def bytes_of(placement: Placement, sizes: tuple[int, ...]) -> list[int]:
    return [sum(sizes[slot] for slot in placement.slots_of(group)) for group in range(placement.groups)]


def test_balanced_from_nothing() -> None:
    # Hottest first: 0 | 1, then 2 to the idler group (50 against 30): 0 | 1 2. At 50 : 50 slot 3 goes where fewer are,
    # 4 to the idler, 5 to the only group with room: 0 3 5 | 1 2 4, 64 : 56. Swapping 3 and 4 moves 4 over.
    placement = balanced(Demands(LOADS, EQUAL, groups=2))
    assert held(placement) == [(0, 4, 5), (1, 2, 3)]
    assert loads_of(placement, LOADS) == [60, 60]


def test_a_rebalance_moves_as_little_as_it_can() -> None:
    # Contiguous is 100 : 20, and each group is full. Swapping 0 and 3 shifts exactly the 40 that are too many.
    placement = rebalanced(contiguous(6, 2), Demands(LOADS, EQUAL, groups=2))
    assert held(placement) == [(1, 2, 3), (0, 4, 5)]
    assert loads_of(placement, LOADS) == [60, 60]


def test_memory_comes_before_load_and_a_copy_is_the_way_out() -> None:
    # Four equal slots on two groups: two each, whatever the loads. 90 + 10 against 20.
    loads = (90.0, 10.0, 10.0, 10.0)
    assert loads_of(balanced(Demands(loads, (1,) * 4, groups=2)), loads) == [100, 20]
    # With one more copy there are five, so a group may hold three: 45 on each side, and the tens spread 2 : 1.
    placement = balanced(Demands(loads, (1,) * 4, groups=2, extra_copies=1))
    assert placement.owners == ((0, 1), (0,), (1,), (0,))
    assert loads_of(placement, loads) == [65, 55]


def test_copies_go_to_the_highest_load_a_copy() -> None:
    # 100 gets its second copy at 100, 60 at 60, then 100 (50 a copy) its third; a fourth group there is not.
    assert Demands((100.0, 60.0, 1.0), (1, 1, 1), groups=3, extra_copies=3).copies() == [3, 2, 1]
    # What nobody uses is never copied.
    assert Demands((5.0, 0.0), (1, 1), groups=2, extra_copies=9).copies() == [2, 1]


def test_unknown_loads_keep_neighbours_together_unless_memory_forbids() -> None:
    assert initial((4,) * 5, 2) == contiguous(5, 2)
    # Contiguous would be 16 : 4; the two large ones must part.
    assert bytes_of(initial((8, 8, 2, 2), 2), (8, 8, 2, 2)) == [10, 10]


def test_what_cooled_down_loses_its_copy() -> None:
    replicated = Placement(((0, 1), (0,), (1,), (1,)), groups=2)
    placement = rebalanced(replicated, Demands((10.0, 90.0, 10.0, 10.0), (1,) * 4, groups=2, extra_copies=1))
    assert placement.owners[1] == (0, 1)
    assert sum(map(len, placement.owners)) == 5


def test_a_small_gain_moves_nothing() -> None:
    # 51 : 49; moving the 1 would gain 1 of a mean of 50, just 2 %.
    here = Placement(((0,), (0,), (1,)), groups=2)
    demands = Demands((50.0, 1.0, 49.0), (1, 0, 1), groups=2)
    assert rebalanced(here, demands, min_gain=0.03) == here
    assert held(rebalanced(here, demands, min_gain=0.01)) == [(0,), (1, 2)]


def test_every_figure_of_the_page_is_what_the_code_says() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 1
    exec(compile(blocks[0], str(PAGE), "exec"), {})


SLOTS = st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 64)), max_size=24)


@given(slots=SLOTS, groups=st.integers(1, 5), extra=st.integers(0, 8))
def test_memory_is_balanced_whatever_the_loads(slots: list[tuple[int, int]], groups: int, extra: int) -> None:
    loads, sizes = tuple(float(load) for load, _ in slots), tuple(size for _, size in slots)
    demands = Demands(loads, sizes, groups, extra)
    placement = balanced(demands)
    assert list(map(len, placement.owners)) == demands.copies()
    stored = bytes_of(placement, sizes)
    total, largest = sum(stored), max(sizes, default=0)
    assert max(stored) <= max(MEMORY_SLACK * total / groups, total / groups + largest)


@given(shares=st.integers(1, 6), groups=st.integers(1, 5), data=st.data())
def test_equal_sizes_are_shared_out_evenly(shares: int, groups: int, data: st.DataObject) -> None:
    count = shares * groups
    loads = tuple(data.draw(st.lists(st.floats(0, 1e6), min_size=count, max_size=count)))
    placement = balanced(Demands(loads, (7,) * count, groups))
    assert {len(slots) for slots in held(placement)} == {shares}


@settings(deadline=None)
@given(loads=st.lists(st.integers(0, 100), min_size=2, max_size=8))
def test_close_to_the_best_there_is(loads: list[int]) -> None:
    hot = tuple(map(float, loads))
    most = -(-len(hot) // 2)
    best = min(
        max(sum(load for load, on in zip(hot, side, strict=True) if on == group) for group in (0, 1))
        for side in product((0, 1), repeat=len(hot))
        if len(hot) - most <= sum(side) <= most
    )
    assert max(loads_of(balanced(Demands(hot, (1,) * len(hot), 2)), hot)) <= 4 / 3 * best


@given(slots=SLOTS, groups=st.integers(1, 5), extra=st.integers(0, 4))
def test_a_rebalance_settles(slots: list[tuple[int, int]], groups: int, extra: int) -> None:
    demands = Demands(tuple(float(load) for load, _ in slots), tuple(size for _, size in slots), groups, extra)
    placement = balanced(demands)
    assert rebalanced(placement, demands) == placement


@given(
    before=st.lists(st.integers(0, 1000), min_size=6, max_size=6),
    after=st.lists(st.integers(0, 1000), min_size=6, max_size=6),
    groups=st.integers(1, 3),
)
def test_a_rebalance_never_makes_it_worse(before: list[int], after: list[int], groups: int) -> None:
    start = balanced(Demands(tuple(map(float, before)), EQUAL, groups))
    loads = tuple(map(float, after))
    there = rebalanced(start, Demands(loads, EQUAL, groups))
    worst, was = max(loads_of(there, loads)), max(loads_of(start, loads))
    moved = sum(old != new for old, new in zip(start.owners, there.owners, strict=True))
    assert worst <= was
    # Nothing moves for nothing.
    assert moved == 0 or worst < was or sorted(loads_of(there, loads)) != sorted(loads_of(start, loads))


@pytest.mark.parametrize(
    "wrong",
    [((1.0,), (1, 2), 1, 0), ((-1.0,), (1,), 1, 0), ((1.0,), (-1,), 1, 0), ((1.0,), (1,), 0, 0), ((1.0,), (1,), 1, -1)],
)
def test_demands_that_cannot_be(wrong: tuple[tuple[float, ...], tuple[int, ...], int, int]) -> None:
    with pytest.raises(ValueError, match=r"slot"):
        Demands(*wrong)


def test_a_placement_of_other_slots_is_refused() -> None:
    with pytest.raises(ValueError, match=r"demands of 1 slots on 2 groups .* placement of 3 slots on 2"):
        rebalanced(contiguous(3, 2), Demands((1.0,), (1,), 2))
