"""Which ep x tp layouts of some GPUs fit, best first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from meteora_dist.engine.mesh import Mesh
from meteora_dist.errors import PlanError
from meteora_dist.planning.memory import Demand, RankMemory, kv_bytes_per_token, rank_memory
from meteora_dist.planning.shapes import ModelShape
from meteora_dist.planning.sizes import show_bytes
from meteora_dist.planning.wire import ExchangeWire, base_wire, exchange_wire


@dataclass(frozen=True, slots=True)
class Hardware:
    """What there is.

    Attributes:
        gpus: How many GPUs, one a rank.
        memory: Bytes of each.
        headroom: Part of it kept for activations, workspaces and the allocator.
    """

    gpus: int
    memory: int
    headroom: float = 0.1

    def __post_init__(self) -> None:
        """Refuses numbers that mean nothing.

        Raises:
            PlanError: Names the number.
        """
        if self.gpus < 1 or self.memory < 1 or not 0 <= self.headroom < 1:
            raise PlanError(
                f"{self.gpus} GPUs of {self.memory} bytes with a headroom of {self.headroom}: there must be at least "
                "one GPU with some memory, and a headroom from 0 to below 1"
            )

    @property
    def usable(self) -> int:
        """Bytes a rank may plan with."""
        return int(self.memory * (1 - self.headroom))


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to use the GPUs, whether it fits or not.

    Attributes:
        mesh: Its axes.
        memory: Bytes on the fullest rank.
        kv_room: Tokens of KV cache that would just fit on a tp group; below the demand where it does not fit.
        exchanges: Bytes a token costs one rank at each group of linears of one layer.
        base_wire: Bytes a token costs one rank in the base model's own collectives, all layers.
        wire: Bytes a token costs all ranks of its tp group, all layers, exchanges and base model.
        refusal: Why it cannot be; None when it fits.
    """

    mesh: Mesh
    memory: RankMemory
    kv_room: int
    exchanges: tuple[ExchangeWire, ...]
    base_wire: float
    wire: float
    refusal: str | None


@dataclass(frozen=True, slots=True)
class Plan:
    """All layouts of some GPUs.

    Attributes:
        fitting: Fewest bytes on the wire a token first; then least memory.
        refused: The others, nearest to fitting first.
    """

    fitting: tuple[Layout, ...]
    refused: tuple[Layout, ...]


def plan(shape: ModelShape, demand: Demand, hardware: Hardware, ep: int | None = None, tp: int | None = None) -> Plan:
    """Every layout of all the GPUs; with ``ep`` or ``tp`` given, only those, and with both, that one.

    Raises:
        PlanError: The GPUs cannot be divided so, or no layout fits; says what the nearest one would need.
    """
    layouts = [_layout(shape, demand, hardware, mesh) for mesh in _meshes(hardware.gpus, ep, tp)]
    fitting = sorted((one for one in layouts if one.refusal is None), key=lambda one: (one.wire, one.memory.total))
    refused = sorted((one for one in layouts if one.refusal is not None), key=lambda one: one.memory.total)
    if not fitting:
        nearest = next((one for one in refused if shape.refusal(one.mesh.tp) is None), refused[0])
        raise PlanError(f"nothing fits; the nearest, ep {nearest.mesh.ep} x tp {nearest.mesh.tp}: {nearest.refusal}")
    return Plan(tuple(fitting), tuple(refused))


def _meshes(gpus: int, ep: int | None, tp: int | None) -> Iterator[Mesh]:
    for name, value in (("ep", ep), ("tp", tp)):
        if value is not None and value < 1:
            raise PlanError(f"{name} is {value}; it must be at least 1")
    if ep is not None and tp is not None:
        if ep * tp > gpus:
            raise PlanError(f"ep {ep} x tp {tp} needs {ep * tp} GPUs; there are {gpus}")
        yield Mesh(ep, tp)
        return
    given = ep or tp or 1
    if gpus % given:
        raise PlanError(f"{'ep' if ep else 'tp'} {given} does not divide {gpus} GPUs")
    for size in range(1, gpus + 1):
        if gpus % size == 0 and tp in (None, size) and ep in (None, gpus // size):
            yield Mesh(gpus // size, size)


def _layout(shape: ModelShape, demand: Demand, hardware: Hardware, mesh: Mesh) -> Layout:
    memory = rank_memory(shape, demand, mesh)
    per_token = kv_bytes_per_token(shape, demand, mesh.tp)
    room = hardware.usable - (memory.total - memory.kv)
    exchanges = tuple(exchange_wire(group, demand, mesh) for group in demand.groups(shape))
    base = base_wire(shape, demand, mesh)
    return Layout(
        mesh=mesh,
        memory=memory,
        kv_room=max(0, room // per_token) if per_token else 0,
        exchanges=exchanges,
        base_wire=base,
        wire=mesh.tp * (shape.layers * sum(exchange.total for exchange in exchanges) + base),
        refusal=shape.refusal(mesh.tp) or _shortage(memory, hardware),
    )


def _shortage(memory: RankMemory, hardware: Hardware) -> str | None:
    missing = memory.total - hardware.usable
    if missing <= 0:
        return None
    parts = ", ".join(f"{name} {show_bytes(getattr(memory, name))}" for name in ("base", "bank", "gates", "kv"))
    return (
        f"a rank needs {show_bytes(memory.total)} ({parts}), {show_bytes(missing)} more than the "
        f"{show_bytes(hardware.usable)} usable of {show_bytes(hardware.memory)}"
    )
