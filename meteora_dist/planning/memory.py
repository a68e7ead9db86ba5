"""What each rank of a mesh holds: base model, experts, gates and KV cache.

Shapes: H_n, O_n input and output width of linear n, E experts, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from meteora_dist.engine.mesh import Mesh
from meteora_dist.errors import PlanError
from meteora_dist.planning.shapes import LinearShape, ModelShape

_BYTES = {"float32": 4, "bfloat16": 2}
GATE_BYTES = 4
"""Gates are fp32, whatever the model is."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What is to be served.

    Attributes:
        experts: E.
        rank: R, of every expert.
        dtype: Of weights, activations and KV cache.
        kv_tokens: Tokens the KV cache of a tp group has room for.
        top_k: Experts a token uses.
        targets: Linears every expert adapts, by the last part of their names; None for all.
        routers: Whether the bank has layer routers, for ``auto-sequence``.
        expert_dtype: Of the experts; None for ``dtype``. CPUs keep experts that are stored in bfloat16 so.
    """

    experts: int
    rank: int
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    kv_tokens: int = 32_768
    top_k: int = 2
    targets: frozenset[str] | None = None
    routers: bool = False
    expert_dtype: Literal["float32", "bfloat16"] | None = None

    def __post_init__(self) -> None:
        """Refuses numbers that mean nothing.

        Raises:
            PlanError: Names the number.
        """
        for name, least in {"experts": 1, "rank": 1, "kv_tokens": 0, "top_k": 1}.items():
            if getattr(self, name) < least:
                raise PlanError(f"{name} is {getattr(self, name)}; it must be at least {least}")

    @property
    def number_bytes(self) -> int:
        """Bytes of a number of ``dtype``."""
        return _BYTES[self.dtype]

    @property
    def expert_number_bytes(self) -> int:
        """Bytes of a number of an expert."""
        return _BYTES[self.expert_dtype or self.dtype]

    def groups(self, shape: ModelShape) -> tuple[tuple[LinearShape, ...], ...]:
        """The targeted linears of a layer, those that share an input together.

        Raises:
            PlanError: A target is no linear of the model.
        """
        if self.targets is None:
            return shape.groups
        names = {linear.name for group in shape.groups for linear in group}
        if not self.targets or (unknown := sorted(self.targets - names)):
            raise PlanError(f"targets are {unknown if self.targets else 'none'}; they must be some of {sorted(names)}")
        kept = [tuple(linear for linear in group if linear.name in self.targets) for group in shape.groups]
        return tuple(group for group in kept if group)


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes on the fullest rank.

    Attributes:
        base: Its part of the base model.
        bank: Its part of the experts.
        gates: Gates of all experts, those of row-parallel linears split over the tp group; and routers, if any.
        kv: Its part of the KV cache.
    """

    base: int
    bank: int
    gates: int
    kv: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.base + self.bank + self.gates + self.kv


def kv_bytes_per_token(shape: ModelShape, demand: Demand, tp: int) -> int:
    """Bytes a token of context takes in one rank's KV cache."""
    return 2 * shape.layers * (shape.kv_heads // tp) * shape.head_dim * demand.number_bytes


def bank_bytes(shape: ModelShape, demand: Demand) -> int:
    """Bytes of all experts: R (H_n + O_n) numbers an expert and linear."""
    widths = sum(linear.in_features + linear.out_features for group in demand.groups(shape) for linear in group)
    return shape.layers * demand.experts * demand.rank * widths * demand.expert_number_bytes


def gate_parameters(shape: ModelShape, demand: Demand, tp: int = 1) -> int:
    """Numbers of all gates on one rank: E H_n a linear."""
    widths = sum(linear.local(tp)[0] for group in demand.groups(shape) for linear in group)
    return shape.layers * demand.experts * widths


def router_parameters(shape: ModelShape, demand: Demand) -> int:
    """Numbers of the layer routers, whole on every rank: E H a layer."""
    return shape.layers * demand.experts * shape.hidden if demand.routers else 0


def rank_memory(shape: ModelShape, demand: Demand, mesh: Mesh) -> RankMemory:
    """What the fullest rank of ``mesh`` holds; it is the one that the experts left over by a division go to."""
    return RankMemory(
        base=shape.parameters(mesh.tp) * demand.number_bytes,
        bank=_bank_numbers(shape, demand, mesh) * demand.expert_number_bytes,
        gates=(gate_parameters(shape, demand, mesh.tp) + router_parameters(shape, demand)) * GATE_BYTES,
        kv=kv_bytes_per_token(shape, demand, mesh.tp) * demand.kv_tokens,
    )


def _bank_numbers(shape: ModelShape, demand: Demand, mesh: Mesh) -> int:
    """Of every pair a tp group splits one matrix by features and the other by rank."""
    ranks = -(-demand.experts // mesh.ep) * demand.rank
    own_ranks = -(-ranks // mesh.tp)
    numbers = 0
    for group in demand.groups(shape):
        for linear in group:
            in_features, out_features = linear.local(mesh.tp)
            by_features, by_rank = (in_features, out_features) if linear.row_parallel else (out_features, in_features)
            numbers += ranks * by_features + own_ranks * by_rank
    return shape.layers * numbers
