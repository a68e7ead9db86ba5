"""Which layouts fit, in which order, and what is said of those that do not."""

from __future__ import annotations

import pytest

from meteora_dist.errors import PlanError
from meteora_dist.planning.known import KNOWN
from meteora_dist.planning.layouts import Hardware, plan
from meteora_dist.planning.memory import Demand

LLAMA_8B, LLAMA_70B, SMOL = KNOWN["Llama-3.1-8B"], KNOWN["Llama-3.1-70B"], KNOWN["SmolLM2-135M"]
GIB = 2**30


def axes(layouts):
    return [(one.mesh.ep, one.mesh.tp) for one in layouts]


def test_every_layout_of_the_gpus_is_there_and_the_least_traffic_comes_first() -> None:
    result = plan(LLAMA_8B, Demand(1000, 16), Hardware(8, 80 * GIB))
    assert sorted(axes(result.fitting)) == [(1, 8), (2, 4), (4, 2), (8, 1)]
    wires = [one.wire for one in result.fitting]
    assert wires == sorted(wires)
    # What a layout says of itself adds up: all layers, all ranks of the group.
    for one in result.fitting:
        layer = sum(exchange.total for exchange in one.exchanges)
        assert one.wire == pytest.approx(one.mesh.tp * (32 * layer + one.base_wire))


def test_what_does_not_fit_says_by_how_much() -> None:
    result = plan(LLAMA_70B, Demand(64, 16), Hardware(4, 80 * GIB))
    assert axes(result.fitting) == [(1, 4)]
    assert axes(result.refused) == [(2, 2), (4, 1)]
    refusal = result.refused[0].refusal
    assert refusal is not None
    # 70.55e9 parameters of 2 bytes, halved, are 65.7 GiB.
    assert "base 65.71 GiB" in refusal
    assert "more than the 72 GiB usable of 80 GiB" in refusal


def test_kv_room_is_exact() -> None:
    hardware = Hardware(2, 80 * GIB)
    room = plan(LLAMA_8B, Demand(64, 16), hardware).fitting[0].kv_room
    assert plan(LLAMA_8B, Demand(64, 16, kv_tokens=room), hardware, tp=2).fitting[0].kv_room == room
    with pytest.raises(PlanError, match="tp 2: a rank needs"):
        plan(LLAMA_8B, Demand(64, 16, kv_tokens=room + 1), hardware, tp=2)


def test_nothing_fits() -> None:
    with pytest.raises(PlanError, match=r"nothing fits; the nearest, ep 1 x tp 2: a rank needs .* than the 36 GiB"):
        plan(LLAMA_70B, Demand(64, 16), Hardware(2, 40 * GIB))


def test_heads_decide_which_tp_can_be() -> None:
    result = plan(SMOL, Demand(8, 8), Hardware(6, 24 * GIB))
    assert sorted(axes(result.fitting)) == [(2, 3), (6, 1)]
    assert {one.refusal for one in result.refused} == {
        "tp 2 does not divide the 9 attention heads",
        "tp 6 does not divide the 9 attention heads",
    }
    with pytest.raises(PlanError, match=r"ep 3 x tp 2: tp 2 does not divide the 9 attention heads"):
        plan(SMOL, Demand(8, 8), Hardware(6, 24 * GIB), tp=2)


def test_given_axes() -> None:
    demand, hardware = Demand(8, 8), Hardware(6, 24 * GIB)
    assert axes(plan(SMOL, demand, hardware, ep=2).fitting) == [(2, 3)]
    assert axes(plan(SMOL, demand, hardware, tp=1).fitting) == [(6, 1)]
    assert axes(plan(SMOL, demand, hardware, ep=4, tp=1).fitting) == [(4, 1)]


@pytest.mark.parametrize(
    ("ep", "tp", "message"),
    [
        (4, None, "ep 4 does not divide 6 GPUs"),
        (None, 4, "tp 4 does not divide 6 GPUs"),
        (3, 3, "ep 3 x tp 3 needs 9 GPUs; there are 6"),
        (0, None, "ep is 0; it must be at least 1"),
    ],
)
def test_axes_that_cannot_be(ep: int | None, tp: int | None, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan(SMOL, Demand(8, 8), Hardware(6, 24 * GIB), ep, tp)


@pytest.mark.parametrize("wrong", [{"gpus": 0}, {"memory": 0}, {"headroom": 1.0}, {"headroom": -0.1}])
def test_hardware_that_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(PlanError, match="there must be at least one GPU"):
        Hardware(**({"gpus": 1, "memory": GIB} | wrong))
