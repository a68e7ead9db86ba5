"""Ray actors in the bundles of a placement group."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from meteora_cluster.member import Member
from meteora_cluster.placement import Resources


def create(
    member: type[Member],
    arguments: Mapping[int, tuple[Any, ...]],
    rank: Resources,
    placement: PlacementGroup,
    max_concurrency: int,
    env: Mapping[str, str] | None = None,
) -> dict[int, ActorHandle[Any]]:
    """Starts one actor for each rank in ``arguments``, and returns them by rank, at once.

    Args:
        member: The class of all.
        arguments: Constructor arguments, by rank.
        rank: What each takes of its bundle.
        placement: Where they live, rank i in bundle i.
        max_concurrency: Calls one of them serves at a time.
        env: Environment variables of their processes.
    """
    actor_class: Any = ray.remote(member)
    return {
        index: actor_class.options(
            num_cpus=rank.cpus,
            num_gpus=rank.gpus,
            max_restarts=0,
            max_concurrency=max_concurrency,
            runtime_env={"env_vars": dict(env)} if env else None,
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=index),
        ).remote(*values)
        for index, values in arguments.items()
    }


def kill(actor: ActorHandle[Any]) -> None:
    """Lets Ray end an actor; does nothing when it has ended already."""
    with suppress(RayActorError, ValueError):
        ray.kill(actor)
