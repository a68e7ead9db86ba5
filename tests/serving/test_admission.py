"""Bounded waiting and fair shares: worked examples, then what holds for every history."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meteora_dist.errors import InvalidRequest, Overloaded
from meteora_dist.serving.admission import Admission, FairQueue, Ticket


def ask(queue: FairQueue, key: str, cost: int = 1, places: int = 1) -> Ticket:
    return queue.ask(key, cost, places, lambda: None)


def states(*tickets: Ticket) -> list[str]:
    return [ticket.state for ticket in tickets]


def test_the_first_run_the_next_wait_and_one_more_is_refused() -> None:
    queue = FairQueue(max_live=2, max_waiting=1)
    first, second, third = (ask(queue, "a") for _ in range(3))
    assert states(first, second, third) == ["live", "live", "waiting"]
    with pytest.raises(Overloaded, match="2 answers are under way and 1 requests wait"):
        ask(queue, "a")
    queue.leave(second)
    assert states(first, second, third) == ["live", "over", "live"]
    assert (queue.live, queue.waiting) == (2, 0)


def test_who_leaves_the_queue_makes_room_in_it() -> None:
    queue = FairQueue(max_live=1, max_waiting=1)
    live, gone = ask(queue, "a"), ask(queue, "a")
    queue.leave(gone)
    waiting = ask(queue, "b")
    queue.leave(live)
    assert states(live, gone, waiting) == ["over", "over", "live"]


def test_callers_take_turns_whoever_asked_first() -> None:
    queue = FairQueue(max_live=1, max_waiting=10)
    live = ask(queue, "greedy", 5)
    flood = [ask(queue, "greedy", 5) for _ in range(3)]
    late = [ask(queue, "modest", 5) for _ in range(2)]
    order = []
    for _ in range(5):
        queue.leave(live)
        (live,) = (ticket for ticket in [*flood, *late] if ticket.state == "live")
        order.append(live.key)
    assert order == ["modest", "greedy", "modest", "greedy", "greedy"]


def test_turns_are_counted_in_tokens_and_what_was_not_used_is_given_back() -> None:
    queue = FairQueue(max_live=1, max_waiting=20)
    live = ask(queue, "long", 100)
    tickets = [ask(queue, "long", 100) for _ in range(2)] + [ask(queue, "short", 10) for _ in range(12)]
    order = []

    def next_one(live: Ticket) -> Ticket:
        queue.leave(live)
        (live,) = (ticket for ticket in tickets if ticket.state == "live")
        order.append(live.key)
        return live

    for _ in range(11):
        live = next_one(live)
    assert order == 10 * ["short"] + ["long"], "100 tokens of each; then who asked first"
    # This long request ends after one token, so its caller's account is at 101, and not at 200.
    live.spent = 1
    next_one(next_one(live))
    assert order[-2:] == ["short", "long"]


def test_rest_earns_no_credit() -> None:
    queue = FairQueue(max_live=1, max_waiting=10)
    for _ in range(50):
        queue.leave(ask(queue, "busy", 10))
    live = ask(queue, "busy", 10)
    tickets = [ask(queue, key, 10) for key in 4 * ("rested",) + 4 * ("busy",)]
    order = []
    for _ in range(4):
        queue.leave(live)
        (live,) = (ticket for ticket in tickets if ticket.state == "live")
        order.append(live.key)
    assert order.count("busy") >= 1, "fifty rounds of rest would have bought all four turns"


def test_a_full_queue_makes_room_for_the_caller_with_fewer_requests() -> None:
    queue = FairQueue(max_live=1, max_waiting=3)
    ask(queue, "greedy")
    flood = [ask(queue, "greedy") for _ in range(3)]
    modest = ask(queue, "modest")
    assert states(*flood, modest) == ["waiting", "waiting", "refused", "waiting"]
    for key in ("modest", "greedy"):
        with pytest.raises(Overloaded):
            ask(queue, key)


def test_nobody_overtakes_who_needs_several_places() -> None:
    queue = FairQueue(max_live=2, max_waiting=5)
    first, second = ask(queue, "a"), ask(queue, "a")
    both = ask(queue, "b", places=2)
    small = ask(queue, "a")
    queue.leave(first)
    assert states(both, small) == ["waiting", "waiting"]
    queue.leave(second)
    assert states(both, small) == ["live", "waiting"]
    with pytest.raises(InvalidRequest, match="asks for 3 answers, but this service generates 2 at once"):
        ask(queue, "a", places=3)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.sampled_from("abc"), st.integers(1, 50), st.integers(1, 3)),
        st.tuples(st.just("leave"), st.integers(0, 99), st.integers(0, 50), st.none()),
    ),
    max_size=80,
)


@settings(max_examples=200, deadline=None)
@given(STEPS, st.integers(3, 5), st.integers(0, 6))
def test_bounds_hold_places_are_used_and_everybody_is_served(steps: list, max_live: int, max_waiting: int) -> None:
    queue = FairQueue(max_live, max_waiting)
    told: Counter[int] = Counter()
    tickets: list[Ticket] = []
    for kind, first, second, third in steps:
        if kind == "ask":
            number = len(tickets)
            try:
                tickets.append(queue.ask(first, second, third, lambda number=number: told.update([number])))
            except Overloaded:
                # Refused only when there was no room: neither to run at once, nor to wait.
                assert queue.waiting == max_waiting
                assert max_waiting > 0 or queue.live + third > max_live
        elif tickets:
            ticket = tickets[first % len(tickets)]
            ticket.spent = min(second, ticket.cost)
            queue.leave(ticket)
        by_state = Counter(ticket.state for ticket in tickets)
        assert queue.waiting == by_state["waiting"] <= max_waiting
        assert queue.live == sum(ticket.places for ticket in tickets if ticket.state == "live") <= max_live
        heads = [next(t for t in tickets if t.state == "waiting" and t.key == key) for key in _keys(tickets)]
        assert not heads or any(queue.live + head.places > max_live for head in heads), "a place is idle"
    for _ in tickets:
        for ticket in tickets:
            if ticket.state == "live":
                queue.leave(ticket)
    assert (queue.live, queue.waiting) == (0, 0)
    left_waiting = [number for number, ticket in enumerate(tickets) if told[number] == 0]
    assert all(tickets[number].state == "over" for number in left_waiting)
    assert max(told.values(), default=0) <= 1


def _keys(tickets: list[Ticket]) -> set[str]:
    return {ticket.key for ticket in tickets if ticket.state == "waiting"}


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from("abcd"), st.integers(1, 60), min_size=2), st.integers(1, 4), st.integers(0, 99))
def test_callers_who_always_want_more_get_equal_shares(costs: dict[str, int], max_live: int, seed: int) -> None:
    """However unequal their requests and whichever end first: no caller gets ahead by more than one request."""
    queue, dice = FairQueue(max_live, max_waiting=99), random.Random(seed)
    served = dict.fromkeys(costs, 0)
    tickets: list[Ticket] = []

    def more(key: str) -> None:
        def granted() -> None:
            served[key] += costs[key]

        tickets.append(queue.ask(key, costs[key], 1, granted))

    for _ in range(max_live + 1):
        for key in costs:
            more(key)
    before = served.copy()
    for _ in range(200):
        done = dice.choice([ticket for ticket in tickets if ticket.state == "live"])
        queue.leave(done)
        tickets.remove(done)
        more(done.key)
        shares = [served[key] - before[key] for key in costs]
        assert max(shares) - min(shares) <= max(before.values()) + max(costs.values())


async def test_waiting_callers_who_go_away_leave_the_queue() -> None:
    admission = Admission(max_live=1, max_waiting=1)

    async def hold(until: asyncio.Event) -> None:
        async with admission.admitted("a", 1):
            await until.wait()

    end = asyncio.Event()
    running = asyncio.ensure_future(hold(end))
    await asyncio.sleep(0)
    gone = asyncio.ensure_future(hold(end))
    await asyncio.sleep(0)
    assert (admission.live, admission.waiting) == (1, 1)
    gone.cancel()
    await asyncio.wait([gone])
    assert (admission.live, admission.waiting) == (1, 0)
    patient = asyncio.ensure_future(hold(end))
    await asyncio.sleep(0)
    end.set()
    await asyncio.gather(running, patient)
    assert (admission.live, admission.waiting) == (0, 0)


async def test_who_is_displaced_is_told_at_once() -> None:
    admission = Admission(max_live=1, max_waiting=2)
    async with admission.admitted("greedy", 1):
        waiting = [asyncio.ensure_future(admission.admitted("greedy", 1).__aenter__()) for _ in range(2)]
        await asyncio.sleep(0)
        modest = asyncio.ensure_future(admission.admitted("modest", 1).__aenter__())
        with pytest.raises(Overloaded, match="others wait with fewer requests"):
            await waiting[1]
    assert (await modest).state == "live"
    waiting[0].cancel()
