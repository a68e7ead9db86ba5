"""What a service is built from: the engine and the limits around it."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError, field_validator, model_validator

from meteora_cluster.heartbeat import Heartbeat
from meteora_cluster.placement import Resources
from meteora_dist.engine.config import EngineConfig, expanded

STARTING_ANSWER_S = 30.0
"""Seconds a rank gets to answer while it starts: imports of large libraries may hold up everything else in it."""


class ServiceConfig(EngineConfig):
    """One replica of the service: its engine, its share of the machine, its limits. These are the ``args`` in YAML.

    Attributes:
        max_live_requests: Requests under way at once, waiting ones included; one more is refused as overload.
        replica_cpus: CPUs reserved for the replica, which speaks HTTP and gRPC and tokenizes.
        rank_cpus: CPUs reserved for each rank.
        rank_gpus: GPUs reserved for each rank.
        start_timeout_s: Seconds the ranks get to load and meet, when the replica starts and at every rebuild.
        heartbeat_s: Seconds between two questions to each rank how it is.
        heartbeat_timeout_s: Seconds a rank gets to answer: one that is stopped is noticed, and the world rebuilt,
            within ``heartbeat_s + heartbeat_timeout_s``. A killed or failing one is noticed at once.
        stall_timeout_s: Seconds a rank with work may take for one step before it counts as hanging; far longer than
            the longest forward pass, the first one with its compilations included.
        max_rebuilds: Rebuilds in a row after which the world must have produced a token of a request again; otherwise
            the replica's health check fails, and Serve replaces it.
        standby: Whether each rank has a second process that waits to take its place, with all libraries imported: a
            rebuild then takes the time of loading alone. Costs the memory of the libraries, some 400 MB a rank.
        rebuild_wait_s: Seconds that new requests, and changes of the experts, wait for a world that is being rebuilt,
            before they are refused.
        generations: Folder in which the service keeps the generations of the bank that changes of the experts make;
            every rank must see it. None for one beside the bank, with its name and ``-generations``, where a
            generation shares unchanged files with the bank by hard links. It belongs to one replica.
    """

    max_live_requests: PositiveInt = 128
    replica_cpus: NonNegativeFloat = 0.2
    rank_cpus: NonNegativeFloat = 0.8
    rank_gpus: NonNegativeFloat = 0.0
    start_timeout_s: PositiveFloat = 600.0
    heartbeat_s: PositiveFloat = 1.0
    heartbeat_timeout_s: PositiveFloat = 5.0
    stall_timeout_s: PositiveFloat = 120.0
    max_rebuilds: PositiveInt = 3
    rebuild_wait_s: NonNegativeFloat = 30.0
    standby: bool = False
    generations: Path | None = None

    @field_validator("model", "bank")
    @classmethod
    def _absolute(cls, path: Path) -> Path:
        # Ray's workers may run in another folder than the one the path was written for.
        return path.absolute()

    @field_validator("generations")
    @classmethod
    def _place(cls, path: Path | None) -> Path | None:
        return None if path is None else expanded(path).absolute()

    @model_validator(mode="after")
    def _standby_without_device(self) -> Self:
        if self.standby and self.rank_gpus:
            raise ValueError("standby is for ranks without GPUs: Ray gives a GPU to one process at a time")
        return self

    @classmethod
    def around(cls, engine: EngineConfig) -> ServiceConfig:
        """A service with default limits around an engine; a service's own configuration stays as it is."""
        return engine if isinstance(engine, cls) else cls.model_validate(engine.model_dump())

    @property
    def heartbeat(self) -> Heartbeat:
        """How closely the ranks are watched."""
        return Heartbeat(self.heartbeat_s, self.heartbeat_timeout_s, self.stall_timeout_s)

    @property
    def starting_heartbeat(self) -> Heartbeat:
        """How closely they are watched while they start."""
        return Heartbeat(self.heartbeat_s, max(self.heartbeat_timeout_s, STARTING_ANSWER_S), self.start_timeout_s)

    @property
    def generations_folder(self) -> Path:
        """Where the generations of the bank are kept."""
        return self.generations or self.bank.with_name(f"{self.bank.name}-generations")

    @property
    def rank(self) -> Resources:
        """What each rank reserves."""
        return Resources(self.rank_cpus, self.rank_gpus)

    @property
    def replica(self) -> Resources:
        """What the replica itself reserves."""
        return Resources(self.replica_cpus)


def faults(error: ValidationError) -> str:
    """Every field at fault with what is wrong with it, in one line."""
    return "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
