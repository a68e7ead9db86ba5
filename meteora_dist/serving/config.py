"""What a service is built from: the engine and the limits around it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal, Self

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from meteora_cluster.heartbeat import Heartbeat
from meteora_cluster.placement import Resources
from meteora_dist.engine.config import EngineConfig, expanded
from meteora_dist.serving.limits import MIB, Limits

STARTING_ANSWER_S = 30.0
"""Seconds a rank gets to answer while it starts: imports of large libraries may hold up everything else in it."""


class ServiceConfig(EngineConfig):
    """One replica of the service: its engine, its share of the machine, its limits. These are the ``args`` in YAML.

    Attributes:
        access: ``keys`` lets in callers with an API key of the keys file; ``open`` everybody, under no limit but those
            below. Administration needs the key of an administrator either way.
        expert_roots: Folders below which administrators may name adapters to add; every rank must see them. Without
            any, experts can be removed but not added.
        keys_file: The keys file; None for the one that the environment variable ``METEORA_KEYS_FILE`` names.
        max_live_requests: Answers that are generated at once; a request has one for each prompt, times n.
        max_waiting_requests: Requests that wait for one of those places; one more is refused as overload, at once.
        max_prompt_tokens: Most tokens of a prompt; None for as many as fit into the context.
        max_answer_tokens: Most tokens a request may ask for, and those it gets when it does not say; None for as many
            as fit into the context.
        max_stops: Most stop texts of a request.
        max_stop_chars: Most characters of a stop text.
        max_body_bytes: Most bytes of an HTTP body or a gRPC message.
        max_request_s: Seconds a request gets, waiting included; a stream that takes longer ends with an error. Below
            ``request_timeout_s`` of the Serve configuration, whose proxy otherwise cuts it off without one.
        drain_s: Seconds that calls under way get to end when their replica is stopped.
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
            generation shares unchanged files with the bank by hard links. All replicas share it.
        generations_poll_s: Seconds between two looks at what other replicas have made of the bank.
        metrics_interval_s: Seconds between two looks at what the ranks count.
        max_expert_labels: Most experts that metrics name; those of all others are added up as ``other``.
        playground: Whether ``/`` is a page to try the service with. The page needs no key; what it asks does.
    """

    access: Literal["keys", "open"] = "keys"
    expert_roots: tuple[Path, ...] = ()
    keys_file: Path | None = None
    max_live_requests: PositiveInt = 128
    max_waiting_requests: NonNegativeInt = 128
    max_prompt_tokens: PositiveInt | None = None
    max_answer_tokens: PositiveInt | None = None
    max_stops: NonNegativeInt = 4
    max_stop_chars: PositiveInt = 256
    max_body_bytes: PositiveInt = 4 * MIB
    max_request_s: PositiveFloat = 570.0
    drain_s: PositiveFloat = 30.0
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
    generations_poll_s: PositiveFloat = 1.0
    metrics_interval_s: PositiveFloat = 5.0
    max_expert_labels: NonNegativeInt = 512
    playground: bool = True

    @field_validator("model", "bank")
    @classmethod
    def _absolute(cls, path: Path) -> Path:
        # Ray's workers may run in another folder than the one the path was written for.
        return path.absolute()

    @field_validator("generations", "keys_file")
    @classmethod
    def _place(cls, path: Path | None) -> Path | None:
        return None if path is None else expanded(path).absolute()

    @field_validator("expert_roots")
    @classmethod
    def _roots(cls, roots: tuple[Path, ...]) -> tuple[Path, ...]:
        return tuple(expanded(root).absolute() for root in roots)

    @model_validator(mode="after")
    def _standby_without_device(self) -> Self:
        if self.standby and self.rank_gpus:
            raise ValueError("standby is for ranks without GPUs: Ray gives a GPU to one process at a time")
        return self

    @property
    def limits(self) -> Limits:
        """What bounds requests."""
        return Limits(**{limit.name: getattr(self, limit.name) for limit in dataclasses.fields(Limits)})

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
