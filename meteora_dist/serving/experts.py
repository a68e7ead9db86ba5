"""Experts that come, go and move while the service answers."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from dataclasses import dataclass

from meteora_dist.bank import Bank, BankEdit, BankManifest, ExpertEntry, NewExpert, edit_bank, preview
from meteora_dist.errors import AdapterError, CheckpointError, EngineUnavailable, MeteoraError, StaleGeneration
from meteora_dist.model.load import torch_dtype
from meteora_dist.moe.balance import Demands, rebalanced
from meteora_dist.moe.experts import held_bytes
from meteora_dist.moe.residency import Residency
from meteora_dist.serving.background import Background
from meteora_dist.serving.catalog import Catalog
from meteora_dist.serving.generations import Generations
from meteora_dist.serving.service import TextService
from meteora_dist.serving.world import World

logger = logging.getLogger(__name__)

_AGAIN_S = 1.0
"""Between two tries to retire a generation, when a rank is lost at the first."""


@dataclass(frozen=True, slots=True)
class ExpertStatus:
    """One expert of the newest generation, as it is served now.

    Attributes:
        entry: What bank.json says of it: name, digest, rank, targets, where its gate rows are from.
        groups: The expert-parallel groups that hold it.
        resident_bytes: Its matrices on all ranks together.
        requests: Calls that chose it by name or in a blend, since the service started.
        routed: How often tokens were routed to its adapter, once for every linear, since the ranks started.
    """

    entry: ExpertEntry
    groups: tuple[int, ...]
    resident_bytes: int
    requests: int
    routed: int


class ExpertAdmin:
    """Changes the bank of a running service. Changes are made one after another, each whole or not at all.

    A change makes the next generation of the bank, here and, once it is published, at every replica that shares it. New
    requests use it as soon as all ranks have it; each request under way finishes with its own. A generation that no
    request uses any more leaves the ranks. A change that has begun is brought to its end even if the caller is
    cancelled.
    """

    def __init__(self, world: World, service: TextService, generations: Generations, bank: Bank) -> None:
        """Takes over.

        Args:
            world: The ranks; they hold ``bank``.
            service: Gets a new catalog with every generation.
            generations: Where they are kept, for all replicas.
            bank: What is served now.
        """
        self._world = world
        self._service = service
        self._generations = generations
        self._newest = bank
        self._banks = {bank.manifest.generation: bank}
        self._opening: tuple[int, ...] = ()
        self._editing = asyncio.Lock()
        self._background = Background()

    @property
    def manifest(self) -> BankManifest:
        """Of the newest generation."""
        return self._newest.manifest

    @property
    def serving(self) -> int:
        """Number of the newest generation."""
        return self.manifest.generation

    @property
    def needed(self) -> tuple[int, ...]:
        """Numbers of the generations whose files are in use: ranks that are rebuilt read them again."""
        return tuple(sorted({*self.live, *self._opening}))

    @property
    def live(self) -> tuple[int, ...]:
        """Numbers of the generations that the ranks hold, oldest first."""
        return tuple(sorted(self._world.residency.folders))

    async def add(self, name: str, expert: NewExpert, expected: int | None = None) -> BankManifest:
        """Adds an expert; it comes last.

        Args:
            name: Of the expert.
            expert: Its adapter and, possibly, its gate rows; copied.
            expected: The generation that the caller takes for the newest; None for whichever is.

        Returns:
            The new generation, which new requests use from now on.

        Raises:
            StaleGeneration: The newest generation is another one than ``expected``, or another replica has published
                one meanwhile.
            InvalidRequest: There is an expert of that name.
            CheckpointError: Adapter or gate rows are damaged or do not fit, or files cannot be written.
            EngineUnavailable: A rank was lost before all were ready, or the newest generation of another replica cannot
                be loaded here. In each of these cases nothing has changed.
        """
        return await self._background.finish(self._edit(BankEdit(add={name: expert}), expected))

    async def replace(self, name: str, expert: NewExpert, expected: int | None = None) -> BankManifest:
        """Puts another adapter in the place of an expert's; as ``add``, but for ExpertNotFound without that name."""
        return await self._background.finish(self._edit(BankEdit(replace={name: expert}), expected))

    async def remove(self, name: str, expected: int | None = None) -> BankManifest:
        """Removes an expert; raises as ``replace`` does, and InvalidRequest for the last one."""
        return await self._background.finish(self._edit(BankEdit(remove=(name,)), expected))

    async def validate(self, name: str, expert: NewExpert) -> ExpertEntry:
        """Checks what ``add``, or ``replace`` where there is one of that name, would check before anything is loaded.

        Returns:
            What bank.json would say of the expert.

        Raises:
            InvalidRequest: No expert may be called so.
            CheckpointError: Adapter or gate rows are damaged or do not fit.
        """
        return await asyncio.to_thread(self._check, self._newest, name, expert)

    async def rebalance(self) -> int:
        """Moves experts to other groups, so that their loads since the ranks started are even; at every replica.

        Returns:
            How many adapters have moved here; 0 when it would gain too little, see ``meteora_dist.moe.balance``.

        Raises:
            CheckpointError: An adapter can no longer be read, and nothing has changed; or the others cannot be told.
            EngineUnavailable: A rank was lost before all were ready; nothing has changed.
        """
        moved = await self.rebalance_here()
        await asyncio.to_thread(self._generations.call_rebalance)
        return moved

    async def rebalance_here(self) -> int:
        """As ``rebalance``, for this replica alone."""
        return await self._background.finish(self._rebalance())

    async def follow(self) -> None:
        """Serves the newest generation that a replica has published.

        Raises:
            CheckpointError: It cannot be read. The service is not ready, and goes on with what it has.
            EngineUnavailable: A rank was lost before all were ready; likewise.
        """
        await self._background.finish(self._follow())

    async def list(self) -> tuple[ExpertStatus, ...]:
        """The experts of the newest generation, in its order; raises EngineUnavailable when a rank is lost."""
        loads, residency, bank = await self._loads(), self._world.residency, self._newest
        owners_of = dict(zip(residency.roster.slots, residency.placement.owners, strict=True))
        config = self._world.blueprint.config
        dtype, device_type = torch_dtype(config.dtype), "cuda" if config.rank_gpus else "cpu"
        return tuple(
            ExpertStatus(
                entry=entry,
                groups=owners_of[entry.digest],
                resident_bytes=held_bytes(adapter, dtype, device_type) * len(owners_of[entry.digest]),
                requests=self._service.requests[entry.name],
                routed=loads[entry.digest],
            )
            for entry, adapter in zip(bank.manifest.experts, bank.adapters, strict=True)
        )

    @staticmethod
    def _check(bank: Bank, name: str, expert: NewExpert) -> ExpertEntry:
        """What an expert would be; raises for what is wrong with it, before any rank has to find that out."""
        entry, adapter = preview(bank, name, expert)
        if unrouted := [linear for linear in adapter.shapes if linear not in bank.linears]:
            raise AdapterError(
                adapter.path,
                f"adapts {unrouted[0]}, which no expert of the bank does; start the service with a bank that has it",
            )
        return entry

    async def _edit(self, edit: BankEdit, expected: int | None) -> BankManifest:
        async with self._editing:
            await self._catch_up_for_an_edit()
            before = self.manifest.generation
            if expected is not None and expected != before:
                raise StaleGeneration(
                    f"this change is for generation {expected} of the bank, but the newest is {before}: "
                    "look at it, and try again",
                    "generation",
                )
            for name, expert in {**edit.add, **edit.replace}.items():
                await asyncio.to_thread(self._check, self._newest, name, expert)
            bank = await asyncio.to_thread(edit_bank, self._newest, edit, self._generations.place(before + 1))
            try:
                await self._publish(bank)
            except BaseException:
                await asyncio.to_thread(self._generations.remove, bank.path)
                raise
            self._serve(bank)
            return bank.manifest

    async def _publish(self, bank: Bank) -> None:
        """Gives a generation to the ranks, then to all replicas; otherwise these ranks are as they were."""
        await self._load(bank)
        try:
            await asyncio.to_thread(self._generations.publish, bank)
        except MeteoraError:
            await self._retire(bank.manifest.generation)
            raise

    async def _load(self, bank: Bank) -> None:
        number = bank.manifest.generation
        self._banks[number] = bank
        try:
            await self._world.change(lambda now: now.with_bank(bank))
        except BaseException:
            del self._banks[number]
            raise

    def _serve(self, bank: Bank) -> None:
        """New requests use a generation that the ranks hold."""
        before, self._newest = self.serving, bank
        self._service.catalog, self._service.missing = Catalog(bank.manifest), None
        self._background.start(self._retire(before))

    async def _follow(self) -> None:
        async with self._editing:
            await self._catch_up()

    async def _catch_up(self) -> None:
        published = await asyncio.to_thread(self._generations.newest)
        if published <= self.serving:
            return
        self._opening = (published,)
        try:
            bank = await asyncio.to_thread(self._generations.open, published)
            await self._load(bank)
        except BaseException:
            self._service.missing = published
            raise
        finally:
            self._opening = ()
        self._serve(bank)

    async def _catch_up_for_an_edit(self) -> None:
        try:
            await self._catch_up()
        except CheckpointError as error:
            logger.error("a change has to wait: %s", error)
            raise EngineUnavailable(
                f"this replica cannot load generation {self._service.missing} of the bank, which is the newest: "
                "try again at another one"
            ) from None

    async def _retire(self, number: int) -> None:
        """Drops a generation that new requests no longer use, after the last one that does."""
        await self._world.unused(number)
        while self._world.state != "failed":
            try:
                await self._world.change(lambda now: now.without(number))
            except EngineUnavailable:
                # The next crew holds it as well.
                await asyncio.sleep(_AGAIN_S)
                continue
            del self._banks[number]
            return

    async def _rebalance(self) -> int:
        # An edit brings adapters whose sizes are not known here.
        async with self._editing:
            loads, size_of = await self._loads(), self._sizes()
            moved: list[str] = []

            def step(now: Residency) -> Residency:
                slots, groups = now.roster.slots, now.placement.groups
                sizes = tuple(size_of[digest] for digest in slots)
                demands = Demands(tuple(loads[digest] for digest in slots), sizes, groups)
                then = now.placed(rebalanced(now.placement, demands))
                before_and_after = zip(slots, now.placement.owners, then.placement.owners, strict=True)
                moved.extend(digest for digest, before, after in before_and_after if before != after)
                return then

            await self._world.change(step)
            return len(moved)

    async def _loads(self) -> Counter[str]:
        """How often each adapter was routed to, by digest: the sum over one rank of each group."""
        reports, mesh = await self._world.reports(), self._world.blueprint.config.mesh
        loads: Counter[str] = Counter()
        for driver in mesh.drivers:
            loads.update(reports[driver].loads)
        return loads

    def _sizes(self) -> dict[str, int]:
        """Numbers in each adapter of a live generation, by digest."""
        return {adapter.digest: adapter.parameters for bank in self._banks.values() for adapter in bank.adapters}
