"""Bytes on the wire per token: by hand, by enumeration, and the bounds the design sets."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from meteora_dist.engine.mesh import Mesh
from meteora_dist.moe.placement import contiguous
from meteora_dist.planning.known import KNOWN
from meteora_dist.planning.memory import Demand
from meteora_dist.planning.shapes import ModelShape
from meteora_dist.planning.wire import Spread, base_wire, exchange_wire, uniform_spread

TINY = ModelShape(hidden=8, mlp=12, layers=1, heads=4, kv_heads=2, head_dim=2, vocabulary=10)


def enumerated(experts: int, linears: int, top_k: int, ep: int) -> tuple[float, float]:
    """(fanout, rows) over every choice of every linear, averaged over the sending groups."""
    home = [owners[0] for owners in contiguous(experts, ep).owners]
    remote = rows = count = 0
    for choice in product(combinations(range(experts), top_k), repeat=linears):
        groups = {home[expert] for picked in choice for expert in picked}
        for sender in range(ep):
            remote += len(groups - {sender})
            rows += len(groups)
            count += 1
    return remote / count, rows / count


def test_two_groups_by_hand() -> None:
    # 4 experts, 2 a group, top-2 of one linear: of the 6 pairs, 5 have an expert in any given group.
    spread = uniform_spread(experts=4, linears=1, top_k=2, ep=2)
    assert (spread.fanout, spread.rows) == pytest.approx((5 / 6, 10 / 6))


@pytest.mark.parametrize("case", [(4, 1, 2, 2), (5, 1, 2, 2), (5, 2, 2, 3), (3, 3, 1, 2), (2, 1, 2, 3), (4, 2, 2, 1)])
def test_the_spread_is_what_enumeration_gives(case: tuple[int, int, int, int]) -> None:
    spread = uniform_spread(*case)
    assert (spread.fanout, spread.rows) == pytest.approx(enumerated(*case))


def test_exchanges_by_hand() -> None:
    # ep 2 x tp 2 in bf16, top-2 of 6 experts of rank 5; every token goes to half a remote group and one group in all.
    demand, mesh, spread = Demand(experts=6, rank=5), Mesh(2, 2), Spread(fanout=0.5, rows=1.0)
    qkv, o, _, down = (exchange_wire(group, demand, mesh, spread) for group in TINY.groups)
    assert qkv.linears == ("q_proj", "k_proj", "v_proj")
    # Full x of 8 numbers and 3 x 2 slots there; half of each output, 4 + 2 + 2 numbers, back.
    assert (qkv.dispatch, qkv.combine) == (0.5 * (8 * 2 + 6 * 8), 0.5 * 8 * 2)
    # 3 linears, 2 slots, 5 numbers in fp32; column-parallel gates see the whole input, so no logits travel.
    assert (qkv.rank_space, qkv.gate_logits) == (3 * 2 * 5 * 4, 0)
    # Row-parallel: half of x, all of y, and the logits of all 6 experts.
    assert (o.dispatch, o.combine) == (0.5 * (4 * 2 + 2 * 8), 0.5 * 8 * 2)
    assert (o.rank_space, o.gate_logits) == (2 * 5 * 4, 6 * 4)
    assert down.dispatch == 0.5 * (6 * 2 + 2 * 8)
    assert qkv.total == qkv.dispatch + qkv.combine + qkv.rank_space


def test_one_rank_sends_nothing() -> None:
    demand = Demand(experts=6, rank=5)
    assert [exchange_wire(group, demand, Mesh()).total for group in TINY.groups] == [0, 0, 0, 0]
    assert base_wire(TINY, demand, Mesh(ep=4, tp=1)) == 0


def test_the_base_model_reduces_its_hidden_state() -> None:
    # After the embedding and twice a layer 8 numbers, and half of the 10 logits, in bf16.
    assert base_wire(TINY, Demand(experts=1, rank=1), Mesh(tp=2)) == (3 * 8 + 5) * 2


@pytest.mark.parametrize("experts", [28, 128])
def test_rank_space_is_a_twentieth_of_moving_tokens(experts: int) -> None:
    shape, demand = KNOWN["Llama-3.1-8B"], Demand(experts=experts, rank=16)
    for group in shape.groups:
        rank_space = exchange_wire(group, demand, Mesh(tp=4)).total
        tokens = exchange_wire(group, demand, Mesh(ep=4)).total
        assert 0 < rank_space <= tokens / 20
