"""Memory per rank: by hand on a tiny shape, by DESIGN's figure, and as a property of every layout."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meteora_dist.engine.mesh import Mesh
from meteora_dist.errors import PlanError
from meteora_dist.planning.known import KNOWN
from meteora_dist.planning.memory import Demand, bank_bytes, gate_parameters, rank_memory
from meteora_dist.planning.shapes import ModelShape
from meteora_dist.planning.sizes import parse_bytes, show_bytes

# One layer: q and o are 8 x 8, k and v 8 -> 4, gate and up 8 -> 12, down 12 -> 8.
TINY = ModelShape(hidden=8, mlp=12, layers=1, heads=4, kv_heads=2, head_dim=2, vocabulary=10)


def test_gates_of_llama_3_8b_with_28_experts() -> None:
    assert gate_parameters(KNOWN["Llama-3.1-8B"], Demand(experts=28, rank=8)) == 34_865_152


@pytest.mark.parametrize("mesh", [Mesh(ep=1, tp=1), Mesh(ep=2, tp=2)])
def test_routers_are_whole_on_every_rank(mesh: Mesh) -> None:
    without, with_them = (
        rank_memory(TINY, Demand(experts=6, rank=1, routers=routers), mesh) for routers in (False, True)
    )
    assert with_them.total - without.total == with_them.gates - without.gates == 6 * 8 * 4


def test_a_bank_by_hand() -> None:
    # R (H + O) numbers: q 16, k 12, v 12, o 16, gate 20, up 20, down 20, together 116; 3 experts of rank 5, 2 bytes.
    assert bank_bytes(TINY, Demand(experts=3, rank=5)) == 116 * 3 * 5 * 2


def test_experts_may_have_a_type_of_their_own() -> None:
    demand = Demand(experts=3, rank=5, dtype="float32", expert_dtype="bfloat16")
    assert bank_bytes(TINY, demand) == rank_memory(TINY, demand, Mesh()).bank == 116 * 3 * 5 * 2
    assert rank_memory(TINY, demand, Mesh()).base == 4 * TINY.parameters(tp=1)


def test_a_rank_of_two_by_two_by_hand() -> None:
    # 6 experts of rank 1 in fp32: a group holds 3 ranks of a linear, of which the fuller rank of the group has 2.
    # Column-parallel, A by rank and B by output: q 2*8 + 3*4, k and v 2*8 + 3*2, gate and up 2*8 + 3*6.
    # Row-parallel, A by input and B by rank: o 3*4 + 2*8, down 3*6 + 2*8.
    memory = rank_memory(TINY, Demand(experts=6, rank=1, dtype="float32", kv_tokens=100), Mesh(ep=2, tp=2))
    assert memory.bank == 4 * (28 + 2 * 22 + 2 * 34 + 28 + 34)
    # Gates of all 6: five linears read 8 numbers, o reads its half of 8, down its half of 12.
    assert memory.gates == 4 * 6 * (5 * 8 + 4 + 6)
    # Keys and values of one of the two heads, 2 numbers each.
    assert memory.kv == 100 * 2 * 2 * 4
    assert memory.base == 4 * TINY.parameters(tp=2)
    assert memory.total == memory.base + memory.bank + memory.gates + memory.kv


@given(shares=st.integers(1, 40), rank=st.integers(1, 64), ep=st.integers(1, 5), tp=st.sampled_from([1, 2]))
def test_the_bank_is_split_evenly_when_it_divides(shares: int, rank: int, ep: int, tp: int) -> None:
    demand = Demand(experts=shares * ep * tp, rank=rank)
    assert rank_memory(TINY, demand, Mesh(ep, tp)).bank * ep * tp == bank_bytes(TINY, demand)


@given(experts=st.integers(64, 2000), ep=st.integers(1, 3), tp=st.sampled_from([1, 3]))
def test_what_is_left_over_costs_little(experts: int, ep: int, tp: int) -> None:
    shape, demand = KNOWN["SmolLM2-135M"], Demand(experts=experts, rank=8)
    even = bank_bytes(shape, demand) / (ep * tp)
    # At most one expert of a group and one rank of a linear more than an even share.
    assert even <= rank_memory(shape, demand, Mesh(ep, tp)).bank <= even * (1 + (8 + tp) * ep / (8 * experts))


def test_only_targeted_linears_count() -> None:
    demand = Demand(experts=2, rank=1, targets=frozenset({"q_proj", "down_proj"}))
    assert bank_bytes(TINY, demand) == 2 * 2 * (16 + 20)
    assert gate_parameters(TINY, demand) == 2 * (8 + 12)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"experts": 0}, "experts is 0; it must be at least 1"),
        ({"rank": -1}, "rank is -1"),
        ({"top_k": 0}, "top_k is 0"),
        ({"kv_tokens": -5}, "kv_tokens is -5; it must be at least 0"),
    ],
)
def test_numbers_that_mean_nothing(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Demand(**({"experts": 1, "rank": 1} | wrong))


@pytest.mark.parametrize("targets", [{"lm_head"}, set()])
def test_targets_must_be_linears_of_the_model(targets: set[str]) -> None:
    with pytest.raises(PlanError, match=r"they must be some of .*'down_proj'"):
        bank_bytes(TINY, Demand(experts=1, rank=1, targets=frozenset(targets)))


def test_sizes_as_people_write_them() -> None:
    texts = ["80GiB", "1.5 MiB", "2gb", "17", "3 B"]
    assert [parse_bytes(text) for text in texts] == [80 * 2**30, 3 * 2**19, 2 * 10**9, 17, 3]
    assert [show_bytes(count) for count in (80 * 2**30, 1536, 12)] == ["80 GiB", "1.5 KiB", "12 B"]


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "80 gibibyte", "1e9"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(PlanError, match="is no size in bytes; write one like 80GiB"):
        parse_bytes(text)
