"""Bytes on the wire, measured on one layer of Llama-3-8B's shape, against what planning says (oracle: arithmetic)."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from meteora_dist.engine.mesh import Mesh
from meteora_dist.moe.dispatcher import AllToAllDispatcher, Dispatcher, LocalDispatcher, targets_of
from meteora_dist.moe.experts import stack_experts
from meteora_dist.moe.layer import GroupState, RoutedGroup, RoutingContext
from meteora_dist.moe.placement import contiguous
from meteora_dist.moe.routing import RoutingChoice, plan_step
from meteora_dist.moe.sharding import GroupShape
from meteora_dist.moe.tensor_parallel import TensorParallel
from meteora_dist.moe.wire import ExchangeKind, Wire
from meteora_dist.planning.known import KNOWN
from meteora_dist.planning.memory import Demand
from meteora_dist.planning.shapes import LinearShape
from meteora_dist.planning.wire import ExchangeWire, Spread, exchange_wire
from meteora_kernels.routed_lora.stack import LoraPart
from tests.support.ranks import run_ranks

SHAPE = KNOWN["Llama-3.1-8B"]
DEMAND = Demand(experts=16, rank=8, top_k=2)
TOKENS = 128
KINDS: tuple[ExchangeKind, ...] = ("dispatch", "combine", "rank_space", "gate_logits")
MESHES = [Mesh(ep=1, tp=4), Mesh(ep=4, tp=1), Mesh(ep=2, tp=2)]


class Traffic(NamedTuple):
    """What a rank's exchanges at one group took, per token of its own: bytes by kind, remote and computed rows."""

    bytes: dict[str, float]
    fanout: float
    rows: float


def routed_group(linears: tuple[LinearShape, ...], mesh: Mesh, rank: int, world: DeviceMesh, wire: Wire) -> RoutedGroup:
    """The exchanges of a layer's group with random gates and experts, without its base linears."""
    shape = GroupShape(
        names=tuple(linear.name for linear in linears),
        in_features=linears[0].in_features,
        out_features=tuple(linear.out_features for linear in linears),
        split="inputs" if linears[0].row_parallel else "outputs",
        tp=mesh.tp,
        tp_rank=mesh.tp_rank(rank),
    )
    placement = contiguous(DEMAND.experts, mesh.ep)

    def part(linear: int, slot: int) -> LoraPart:
        cut = shape.cut(linear, DEMAND.rank, str(slot))
        rows_a, rows_b = (len(range(DEMAND.rank)[ranks]) for ranks in (cut.ranks_a, cut.ranks_b))
        a_RH = torch.zeros(rows_a, shape.local_inputs, dtype=torch.bfloat16)
        b_RO = torch.zeros(rows_b, shape.local_outputs[linear], dtype=torch.bfloat16)
        return LoraPart(a_RH, b_RO, 1.0, DEMAND.rank, cut.ranks_a.start, cut.ranks_b.start)

    group = mesh.ep_rank(rank)
    experts = [tuple(part(n, slot) for n in range(len(linears))) for slot in placement.slots_of(group)]
    gates = torch.randn(len(linears) * DEMAND.experts, shape.in_features, generator=torch.Generator().manual_seed(1))
    state = GroupState(
        gates=(gates[:, shape.inputs].contiguous(),),
        absent=(None,),
        targets_DG=targets_of(placement, group),
        stack=stack_experts(experts, shape, torch.bfloat16, torch.device("cpu")),
    )
    dispatcher: Dispatcher = AllToAllDispatcher(world["ep"].get_group(), wire) if mesh.ep > 1 else LocalDispatcher()
    add_up = TensorParallel(world["tp"], wire).add_up if mesh.tp > 1 else None
    context = RoutingContext()
    context.step = plan_step([RoutingChoice(top_k=DEMAND.top_k)], [TOKENS], DEMAND.experts, DEMAND.top_k)
    return RoutedGroup(shape, state, dispatcher, context, add_up)


def measure(rank: int, mesh: Mesh) -> list[Traffic]:
    """What one pass costs at each group of a layer."""
    world = init_device_mesh("cpu", (mesh.ep, mesh.tp), mesh_dim_names=("ep", "tp"))
    traffic = []
    for linears in DEMAND.groups(SHAPE):
        wire = Wire()
        group = routed_group(linears, mesh, rank, world, wire)
        generator = torch.Generator().manual_seed(10 + mesh.ep_rank(rank))
        x_TH = torch.randn(TOKENS, linears[0].in_features, generator=generator)[:, group.shape.inputs]
        with torch.no_grad():
            assert group(x_TH.to(torch.bfloat16)) is not None
        traffic.append(
            Traffic(
                bytes={kind: wire.bytes(kind) / TOKENS for kind in KINDS},
                fanout=wire.rows("dispatch") / TOKENS,
                rows=wire.rows("rank_space") / TOKENS,
            )
        )
    return traffic


def run_all(rank: int) -> list[list[Traffic]]:
    return [measure(rank, mesh) for mesh in MESHES]


@pytest.fixture(scope="module")
def measured() -> dict[Mesh, list[list[Traffic]]]:
    """By mesh, then rank, then group of linears."""
    by_rank = run_ranks(4, run_all)
    return {mesh: [rank[number] for rank in by_rank] for number, mesh in enumerate(MESHES)}


def mean(ranks: list[Traffic]) -> Traffic:
    count = len(ranks)
    return Traffic(
        bytes={kind: sum(rank.bytes[kind] for rank in ranks) / count for kind in KINDS},
        fanout=sum(rank.fanout for rank in ranks) / count,
        rows=sum(rank.rows for rank in ranks) / count,
    )


@pytest.mark.parametrize("mesh", MESHES)
def test_measured_bytes_are_those_planned(measured: dict[Mesh, list[list[Traffic]]], mesh: Mesh) -> None:
    for number, linears in enumerate(DEMAND.groups(SHAPE)):
        found = mean([rank[number] for rank in measured[mesh]])
        exact = exchange_wire(linears, DEMAND, mesh, Spread(found.fanout, found.rows))
        # Random gates pick evenly, as the plan supposes when nothing was measured.
        assumed = exchange_wire(linears, DEMAND, mesh)
        for kind in KINDS:
            assert found.bytes[kind] == pytest.approx(getattr(exact, kind), rel=1e-6)
            assert found.bytes[kind] == pytest.approx(getattr(assumed, kind), rel=0.05)


def total(wires: list[ExchangeWire], *kinds: str) -> float:
    return sum(getattr(wire, kind) for wire in wires for kind in kinds)


def test_rank_space_costs_a_twentieth_of_the_token_exchange(measured: dict[Mesh, list[list[Traffic]]]) -> None:
    split, spread = Mesh(ep=1, tp=4), Mesh(ep=4, tp=1)
    planned = {mesh: [exchange_wire(linears, DEMAND, mesh) for linears in DEMAND.groups(SHAPE)] for mesh in MESHES}
    inside, across = ("rank_space", "gate_logits"), ("dispatch", "combine")
    assert total(planned[split], *across) == total(planned[spread], *inside) == 0
    assert 20 * total(planned[split], *inside) < total(planned[spread], *across)
    counted = {
        mesh: sum(rank[number].bytes[kind] for rank in measured[mesh] for number in range(4) for kind in kinds)
        for mesh, kinds in ((split, inside), (spread, across))
    }
    assert 0 < 20 * counted[split] < counted[spread]


def test_counts_add_up_by_kind() -> None:
    wire = Wire()
    for kind, rows, nbytes in (("dispatch", 3, 30), ("dispatch", 0, 0), ("combine", 1, 8)):
        with wire.count(kind, rows, nbytes):
            before = wire.seconds
    assert (wire.rows("dispatch"), wire.bytes("dispatch")) == (3, 30)
    assert (wire.rows("combine"), wire.bytes("combine")) == (1, 8)
    assert wire.bytes("rank_space") == 0
    assert wire.seconds > before > 0
    assert wire.seconds == wire.seconds_in("dispatch") + wire.seconds_in("combine")
    assert wire.seconds_in("dispatch") > wire.seconds_in("sizes") == 0
