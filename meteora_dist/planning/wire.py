"""What one token puts on the wire in the exchanges of a layer.

Shapes: N linears of a group that share an input, H their input width, O_n their output widths, E experts, K slots a
token, R rank; on one rank of a tp group, H and O_n are that rank's parts. b bytes a number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from meteora_dist.engine.mesh import Mesh
from meteora_dist.moe.placement import contiguous
from meteora_dist.planning.memory import Demand
from meteora_dist.planning.shapes import LinearShape, ModelShape

SLOT_BYTES = 8
"""An expert id and a weight, four bytes each."""
RANK_SPACE_BYTES = 4
"""Rank-sized vectors and gate logits are reduced in fp32."""


@dataclass(frozen=True, slots=True)
class Spread:
    """How the tokens of a group are spread over the ep groups, on average over tokens.

    Attributes:
        fanout: Other groups a token goes to.
        rows: All groups that compute for a token, its own included.
    """

    fanout: float
    rows: float


@dataclass(frozen=True, slots=True)
class ExchangeWire:
    """Bytes one token makes one rank hand to collectives, at the linears of one group in one layer.

    Attributes:
        linears: Names of the group's linears.
        dispatch: Token rows to other ep groups: ``fanout (H b + 8 N K)``.
        combine: Deltas back from them: ``fanout sum(O_n) b``.
        rank_space: Rank-sized vectors, reduced inside the tp group: ``4 N K R`` a row.
        gate_logits: Logits of row-parallel gates, reduced inside the tp group: ``4 N E``.
    """

    linears: tuple[str, ...]
    dispatch: float
    combine: float
    rank_space: float
    gate_logits: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.dispatch + self.combine + self.rank_space + self.gate_logits


def uniform_spread(experts: int, linears: int, top_k: int, ep: int) -> Spread:
    """The spread when every linear picks K different experts evenly and independently, and groups hold equal shares.

    Real gates agree more with each other, so they spread less: this is the upper end of what is to be expected.
    """
    top_k = min(top_k, experts)
    placement = contiguous(experts, ep)
    held = [len(placement.slots_of(group)) for group in range(ep)]
    hit = [1 - (math.comb(experts - own, top_k) / math.comb(experts, top_k)) ** linears for own in held]
    rows = sum(hit)
    return Spread(fanout=rows - rows / ep, rows=rows)


def exchange_wire(
    group: tuple[LinearShape, ...], demand: Demand, mesh: Mesh, spread: Spread | None = None
) -> ExchangeWire:
    """What one token costs at one group of linears.

    Args:
        group: Linears that share an input.
        demand: What is served.
        mesh: Over how many ranks.
        spread: As measured; None for ``uniform_spread``.
    """
    linears, top_k = len(group), min(demand.top_k, demand.experts)
    if spread is None:
        spread = uniform_spread(demand.experts, linears, top_k, mesh.ep)
    local = [linear.local(mesh.tp) for linear in group]
    split = mesh.tp > 1
    return ExchangeWire(
        linears=tuple(linear.name for linear in group),
        dispatch=spread.fanout * (local[0][0] * demand.number_bytes + linears * top_k * SLOT_BYTES),
        combine=spread.fanout * sum(out for _, out in local) * demand.number_bytes,
        rank_space=split * spread.rows * linears * top_k * demand.rank * RANK_SPACE_BYTES,
        gate_logits=split * group[0].row_parallel * linears * demand.experts * RANK_SPACE_BYTES,
    )


def base_wire(shape: ModelShape, demand: Demand, mesh: Mesh) -> float:
    """Bytes one token makes one rank hand to the base model's own collectives.

    One reduce of the hidden state after the embedding, two in every layer, and the gathered logits.
    """
    if mesh.tp == 1:
        return 0.0
    reduced = (2 * shape.layers + 1) * shape.hidden
    return (reduced + -(-shape.vocabulary // mesh.tp)) * demand.number_bytes
