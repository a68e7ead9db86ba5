"""What administrators ask for, whatever protocol they use: experts by name, adapters by path below a root."""

from __future__ import annotations

import logging
from collections.abc import Awaitable
from typing import TypeVar

from meteora_dist.bank import BankManifest, ExpertEntry
from meteora_dist.errors import CheckpointError, InvalidRequest
from meteora_dist.serving.experts import ExpertAdmin, ExpertStatus
from meteora_dist.serving.keys import Caller
from meteora_dist.serving.replicas import ReplicaState
from meteora_dist.serving.sharing import Sharing
from meteora_dist.serving.sources import Sources

logger = logging.getLogger(__name__)

Outcome = TypeVar("Outcome")


class AdminService:
    """Expert administration for callers: every method demands the key of an administrator.

    Each raises Forbidden without one, and otherwise as the method of ``ExpertAdmin`` does; what is wrong with an
    adapter is an InvalidRequest that names the file below its root, and no other path.
    """

    def __init__(self, experts: ExpertAdmin, sharing: Sharing, sources: Sources) -> None:
        self._experts = experts
        self._sharing = sharing
        self._sources = sources

    @property
    def manifest(self) -> BankManifest:
        """Of the newest generation."""
        return self._experts.manifest

    @property
    def replicas(self) -> tuple[ReplicaState, ...]:
        """Those who share the bank, this one first."""
        return self._sharing.states

    async def add(self, caller: Caller, name: str, adapter: str, expected: int | None) -> BankManifest:
        """Adds the expert ``name`` from a folder below a root, and returns the new generation."""
        caller.demand_admin()
        return await self._told(caller, f"add {name}", self._experts.add(name, self._sources.expert(adapter), expected))

    async def replace(self, caller: Caller, name: str, adapter: str, expected: int | None) -> BankManifest:
        """Puts another adapter in the place of an expert's."""
        caller.demand_admin()
        change = self._experts.replace(name, self._sources.expert(adapter), expected)
        return await self._told(caller, f"replace {name}", change)

    async def remove(self, caller: Caller, name: str, expected: int | None) -> BankManifest:
        """Removes an expert."""
        caller.demand_admin()
        return await self._told(caller, f"remove {name}", self._experts.remove(name, expected))

    async def validate(self, caller: Caller, name: str, adapter: str) -> ExpertEntry:
        """What the expert would be, if it could be added or put in the place of the one of that name."""
        caller.demand_admin()
        return await self._told(caller, None, self._experts.validate(name, self._sources.expert(adapter)))

    async def list(self, caller: Caller) -> tuple[ExpertStatus, ...]:
        """The experts as they are served now."""
        caller.demand_admin()
        return await self._experts.list()

    async def rebalance(self, caller: Caller) -> int:
        """Evens out the load of the groups, at every replica; returns how many adapters have moved at this one."""
        caller.demand_admin()
        return await self._told(caller, "rebalance", self._experts.rebalance())

    async def _told(self, caller: Caller, change: str | None, doing: Awaitable[Outcome]) -> Outcome:
        try:
            outcome = await doing
        except CheckpointError as error:
            shown = self._sources.shown(error.path)
            if shown is None:
                raise
            raise InvalidRequest(f"{shown}: {error.args[1]}", "adapter") from None
        if change is not None:
            logger.info("%s: %s; generation %d", caller.name, change, self._experts.manifest.generation)
        return outcome
