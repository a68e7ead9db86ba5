"""A causal language model with routed linears, as one rank holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from meteora_dist.errors import BankError
from meteora_dist.moe.dispatcher import Dispatcher, LocalDispatcher
from meteora_dist.moe.holdings import Holdings, Resident, next_states, resident
from meteora_dist.moe.layer import GroupState, RoutedGroup, RoutingContext
from meteora_dist.moe.residency import Residency
from meteora_dist.moe.routers import LayerRouters, read_routers
from meteora_dist.moe.routing import LiveGeneration
from meteora_dist.moe.wire import Wire


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands among those that share the experts.

    Attributes:
        group: Number of its expert-parallel group.
        dispatcher: Brings rows to the groups that own their experts; by default nothing travels.
        wire: Counts what it hands over; the dispatcher's own.
    """

    group: int = 0
    dispatcher: Dispatcher = field(default_factory=LocalDispatcher)
    wire: Wire = field(default_factory=Wire)


@dataclass(frozen=True, slots=True)
class Prepared:
    """Holdings that a model can be switched to at once.

    Attributes:
        holdings: What will be held.
        states: Of every group, in their order.
        routers: Of the live generations that have some.
    """

    holdings: Holdings
    states: tuple[GroupState, ...]
    routers: Mapping[int, LayerRouters]


class RoutedModel:
    """A causal language model with routed linears.

    Attributes:
        model: The transformers model; its passes are routed by ``context``.
        groups: The routed groups in the order a pass meets them.
        context: How the pass under way is routed.
        dispatcher: Of all groups.
        wire: Counts what this rank hands over in the exchanges of its routed linears.
        holdings: What it holds; ``prepare`` and ``switch`` change it.
        live: The live generations by number, as routing needs them.
        routers: The layer routers of those live generations that have some, by number.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        groups: tuple[RoutedGroup, ...],
        context: RoutingContext,
        place: Place,
        holdings: Holdings,
    ) -> None:
        """Joins what ``inject`` has made."""
        self.model = model
        self.groups = groups
        self.context = context
        self.dispatcher = place.dispatcher
        self.wire = place.wire
        self.holdings = holdings
        self._depth = 1 + max(group.shape.layer for group in groups)
        self.live = holdings.live(self._depth)
        self.routers: Mapping[int, LayerRouters] = _routers(model, holdings, {})
        self._group = place.group

    @property
    def newest(self) -> LiveGeneration:
        """The generation of requests that name none."""
        return self.live[self.holdings.residency.roster.newest]

    @property
    def num_experts(self) -> int:
        """E of the newest generation."""
        return self.newest.num_experts

    @property
    def loads(self) -> dict[str, int]:
        """How often tokens of this rank's requests were routed to each adapter, by digest; for any thread."""
        return self.context.loads.by_adapter()

    @property
    def resident(self) -> Resident:
        """Memory this rank uses for the bank."""
        return resident([group.state for group in self.groups])

    def serve(self, slots: int) -> None:
        """Serves this rank's experts through one whole pass of the other ranks, without a base forward."""
        for group in self.groups:
            group.serve(slots)

    def prepare(self, residency: Residency) -> Prepared:
        """Loads what this rank lacks of ``residency``, while it serves on; for any thread.

        Raises:
            CheckpointError: A bank cannot be read, is another one than announced, or does not fit the loaded model.
        """
        now = self.holdings
        then = Holdings.open(residency, now.banks)
        base = next(iter(now.banks.values())).manifest.base_fingerprint
        for bank in then.banks.values():
            if bank.manifest.base_fingerprint != base:
                raise BankError(bank.path, f"was made for another base model, {bank.manifest.base_model}")
        return Prepared(
            then, next_states(self.groups, now, then, self._group), _routers(self.model, then, self.routers)
        )

    def switch(self, prepared: Prepared) -> None:
        """Puts ``prepared``, which was made from the present holdings, in force: between two passes, on all ranks."""
        for group, state in zip(self.groups, prepared.states, strict=True):
            group.state = state
        self.context.loads.renumber(prepared.holdings.residency.roster.slots)
        self.holdings, self.live = prepared.holdings, prepared.holdings.live(self._depth)
        self.routers = prepared.routers


def _routers(model: PreTrainedModel, holdings: Holdings, known: Mapping[int, LayerRouters]) -> dict[int, LayerRouters]:
    """Of the generations that have some; those that are ``known`` are not read again."""
    found = {number: known.get(number) or read_routers(bank, model) for number, bank in holdings.banks.items()}
    return {number: routers for number, routers in found.items() if routers is not None}
