"""What a request's ``model`` may name, and the routing it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meteora_dist.bank import BankManifest
from meteora_dist.errors import ExpertNotFound, InvalidRequest
from meteora_dist.moe.routing import BASE, RoutingChoice
from meteora_dist.serving.keys import Caller
from meteora_dist.serving.selection import CHOOSING, Selection


@dataclass(frozen=True, slots=True)
class Catalog:
    """The models that one bank generation serves. Routing and shares made from it count in that generation's order.

    Attributes:
        manifest: Of the generation.
    """

    manifest: BankManifest

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts, in the order of routing shares."""
        return tuple(expert.name for expert in self.manifest.experts)

    @property
    def models(self) -> tuple[str, ...]:
        """Every name a request may use."""
        return (*CHOOSING, *self.experts)

    def routing(self, selection: Selection) -> RoutingChoice:
        """The routing a selection of served experts stands for; that of ``auto-sequence`` is how its vote is routed."""
        if selection.mode == "base" or (selection.mode == "auto-sequence" and self.manifest.routers is not None):
            return BASE
        if selection.experts:
            return RoutingChoice("fixed", experts=tuple((self.experts.index(name), w) for name, w in selection.experts))
        defaults = self.manifest.routing
        return RoutingChoice(
            mode="auto",
            top_k=min(selection.top_k or defaults.top_k, len(self.experts)),
            temperature=selection.temperature or defaults.temperature,
        )

    def check_selection(self, selection: Selection, caller: Caller) -> None:
        """Checks what a caller wants to act.

        Raises:
            Forbidden: The caller may not use one of its models.
            ExpertNotFound: One is not served.
            InvalidRequest: It says how routers vote, and there are none.
        """
        self.check(selection.models, caller)
        if selection.vote is not None and self.manifest.routers is None:
            raise InvalidRequest(
                "routing.vote is for a bank with routers, and this one has none; its gates vote", "routing.vote"
            )

    def models_of(self, caller: Caller) -> tuple[str, ...]:
        """Every name a request of this caller may use."""
        return tuple(model for model in self.models if caller.may_use(model))

    def check(self, models: Sequence[str], caller: Caller) -> None:
        """Checks names that a caller gives.

        Raises:
            Forbidden: The caller may not use one of them.
            ExpertNotFound: One is not served; the message lists those that are, and that the caller may use.
        """
        caller.demand(*models)
        for model in models:
            if model not in self.models:
                served = ", ".join(self.models_of(caller))
                raise ExpertNotFound(f"there is no model {model!r} here; served are {served}", "model")
