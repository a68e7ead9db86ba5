"""From counts of ranks to metrics: two groups of one rank, experts a and b on the first, c on the second.

a look           rank 0 counts        rank 1 counts       two linears, so half of it are tokens
first            a 8, b 0, c 2        a 4, b 2, c 0       a 6, b 1, c 1
second           a 8, b 0, c 6        a 4, b 2, c 0       c 2
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from meteora_dist.engine.mesh import Mesh
from meteora_dist.engine.report import RankReport
from meteora_dist.moe.placement import Placement
from meteora_dist.moe.residency import Residency
from meteora_dist.moe.roster import roster_of
from meteora_dist.observability import metrics
from meteora_dist.observability.memory import MemoryRecorder
from meteora_dist.observability.ranks import ExpertLabels, Growth, Losses, RankMeter, Serving, group_loads, imbalance


def counted(uses: Mapping[str, int], dispatched: int = 0) -> RankReport:
    return RankReport(
        expert_bytes=1000,
        gate_bytes=10,
        loads=uses,
        linears=2,
        active=2,
        waiting=1,
        cache_used=0.25,
        exchanged_bytes={"dispatch": dispatched, "combine": 0},
        exchange_s={"dispatch": dispatched / 100, "combine": 0.0},
    )


def serving(names: str = "abc", owners: tuple[tuple[int, ...], ...] = ((0,), (0,), (1,))) -> Serving:
    experts = tuple(SimpleNamespace(name=name, digest=f"digest-{name}") for name in names)
    manifest: Any = SimpleNamespace(generation=7, experts=experts)
    roster = roster_of({7: [expert.digest for expert in experts]})
    return Serving(manifest, 9, Residency(roster, Placement(owners, 2), {7: Path("bank")}))


def uses(a: int, b: int, c: int) -> dict[str, int]:
    return {"digest-a": a, "digest-b": b, "digest-c": c}


def meter(limit: int = 9) -> tuple[RankMeter, MemoryRecorder]:
    record = MemoryRecorder()
    return RankMeter(record, Mesh(ep=2), limit), record


def test_experts_get_the_tokens_of_all_groups_and_each_only_once() -> None:
    watch, record = meter()
    watch.look([counted(uses(8, 0, 2)), counted(uses(4, 2, 0))], serving())
    tokens = {name: record.value(metrics.EXPERT_TOKENS, expert=name) for name in "abc"}
    assert tokens == {"a": 6, "b": 1, "c": 1}
    # The busiest expert has 6 of 8, the busiest group 7 of 8.
    assert record.value(metrics.EXPERT_IMBALANCE) == pytest.approx(6 / (8 / 3))
    assert record.value(metrics.GROUP_IMBALANCE) == pytest.approx(7 / 4)
    watch.look([counted(uses(8, 0, 6)), counted(uses(4, 2, 0))], serving())
    assert record.value(metrics.EXPERT_TOKENS, expert="c") == 3
    assert record.value(metrics.EXPERT_TOKENS, expert="a") == 6
    assert record.value(metrics.GROUP_IMBALANCE) == 2
    watch.look([counted(uses(8, 0, 6)), counted(uses(4, 2, 0))], serving())
    assert record.value(metrics.GROUP_IMBALANCE) == 0


def test_ranks_of_a_tp_group_count_the_same_tokens() -> None:
    record = MemoryRecorder()
    RankMeter(record, Mesh(ep=1, tp=2), 9).look([counted(uses(8, 0, 0))] * 2, serving(owners=((0,),) * 3))
    assert record.value(metrics.EXPERT_TOKENS, expert="a") == 4


def test_every_rank_has_its_queue_cache_bytes_and_exchanges() -> None:
    watch, record = meter()
    ranks = [counted({}, dispatched=100), counted({}, dispatched=300)]
    watch.look(ranks, serving())
    watch.look([counted({}, dispatched=150), ranks[1]], serving())
    assert record.value(metrics.RANK_REQUESTS, rank="1", state="active") == 2
    assert record.value(metrics.RANK_REQUESTS, rank="1", state="waiting") == 1
    assert record.value(metrics.KV_CACHE_USED, rank="0") == 0.25
    assert record.value(metrics.BANK_BYTES, rank="0", part="experts") == 1000
    assert record.value(metrics.EXCHANGE_BYTES, rank="0", kind="dispatch") == 150
    assert record.value(metrics.EXCHANGE_BYTES, rank="1", kind="dispatch") == 300
    assert record.value(metrics.EXCHANGE_SECONDS, rank="0", kind="dispatch") == pytest.approx(1.5)
    assert record.value(metrics.BANK_GENERATION) == 7
    assert record.value(metrics.BANK_NEWEST_GENERATION) == 9
    assert record.value(metrics.BANK_EXPERTS) == 3


def test_new_ranks_count_from_zero() -> None:
    watch, record = meter()
    watch.losses(Losses())
    watch.look([counted(uses(8, 0, 0), 100), counted({}, 100)], serving())
    watch.losses(Losses(lost=1, rebuilt=1, failed=2, rebuild_s=2.5))
    # More than the lost ranks had counted, and all of it is new.
    watch.look([counted(uses(10, 0, 0), 150), counted({}, 100)], serving())
    assert record.value(metrics.EXPERT_TOKENS, expert="a") == 9
    assert record.value(metrics.EXCHANGE_BYTES, rank="0", kind="dispatch") == 250
    assert record.value(metrics.RANK_LOSSES) == 1
    assert record.value(metrics.REBUILDS, outcome="ok") == 1
    assert record.value(metrics.REBUILDS, outcome="failed") == 2
    assert record.value(metrics.REBUILD_SECONDS) == 2.5


def test_an_expert_that_is_replaced_keeps_its_name_and_its_count() -> None:
    watch, record = meter()
    watch.look([counted({"digest-a": 8}), counted({})], serving("ab", ((0,), (1,))))
    after: Any = SimpleNamespace(generation=8, experts=(SimpleNamespace(name="a", digest="new"),))
    roster = roster_of({7: ["digest-a"], 8: ["new"]})
    now = Serving(after, 9, Residency(roster, Placement(((0,), (1,)), 2), {}))
    watch.look([counted({"digest-a": 10, "new": 6}), counted({})], now)
    assert record.value(metrics.EXPERT_TOKENS, expert="a") == 4 + 1 + 3
    assert record.value(metrics.BANK_LIVE_GENERATIONS) == 2


def test_labels_are_bounded_by_all_names_that_ever_were() -> None:
    labels = ExpertLabels(2)
    assert [labels.of(name) for name in ("a", "b", "c", "a", "d")] == ["a", "b", "other", "a", "other"]
    watch, record = meter(limit=1)
    watch.look([counted(uses(8, 2, 2)), counted({})], serving())
    assert record.value(metrics.EXPERT_TOKENS, expert="a") == 4
    assert record.value(metrics.EXPERT_TOKENS, expert="other") == 2


def test_a_copied_expert_loads_its_groups_evenly() -> None:
    now = serving(owners=((0, 1), (0,), (1,)))
    assert group_loads({"digest-a": 4.0, "digest-b": 1.0}, now.residency) == [3, 2]
    assert imbalance([2, 2]) == 1
    assert imbalance([0, 0]) == 0


def test_a_counter_that_has_begun_anew_counts_whole() -> None:
    growth = Growth[str]()
    assert growth.since_last({"x": 5}) == {"x": 5}
    assert growth.since_last({"x": 7, "y": 1}) == {"x": 2, "y": 1}
    assert growth.since_last({"x": 3, "y": 1}) == {"x": 3, "y": 0}
