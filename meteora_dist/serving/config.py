"""What a service is built from: the engine and the limits around it."""

from __future__ import annotations

from pathlib import Path

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError, field_validator

from meteora_cluster.placement import Resources
from meteora_dist.engine.config import EngineConfig


class ServiceConfig(EngineConfig):
    """One replica of the service: its engine, its share of the machine, its limits. These are the ``args`` in YAML.

    Attributes:
        max_live_requests: Requests under way at once, waiting ones included; one more is refused as overload.
        replica_cpus: CPUs reserved for the replica, which speaks HTTP and gRPC and tokenizes.
        rank_cpus: CPUs reserved for each rank.
        rank_gpus: GPUs reserved for each rank.
        start_timeout_s: Seconds the ranks get to load and meet.
    """

    max_live_requests: PositiveInt = 128
    replica_cpus: NonNegativeFloat = 0.2
    rank_cpus: NonNegativeFloat = 0.8
    rank_gpus: NonNegativeFloat = 0.0
    start_timeout_s: PositiveFloat = 600.0

    @field_validator("model", "bank")
    @classmethod
    def _absolute(cls, path: Path) -> Path:
        # Ray's workers may run in another folder than the one the path was written for.
        return path.absolute()

    @classmethod
    def around(cls, engine: EngineConfig) -> ServiceConfig:
        """A service with default limits around an engine; a service's own configuration stays as it is."""
        return engine if isinstance(engine, cls) else cls.model_validate(engine.model_dump())

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
