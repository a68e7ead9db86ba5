"""What a request's ``model`` may name, and the routing it stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from meteora_dist.bank import BankManifest
from meteora_dist.errors import ExpertNotFound
from meteora_dist.moe.routing import BASE, RoutingChoice
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
        """The routing a selection stands for; that of ``auto-sequence`` is how its vote is routed.

        Raises:
            ExpertNotFound: An expert is not served; the message lists those that are.
        """
        if selection.mode == "base":
            return BASE
        if selection.experts:
            return RoutingChoice("fixed", experts=tuple((self._index(name), w) for name, w in selection.experts))
        defaults = self.manifest.routing
        return RoutingChoice(
            mode="auto",
            top_k=min(selection.top_k or defaults.top_k, len(self.experts)),
            temperature=selection.temperature or defaults.temperature,
        )

    def check(self, model: str) -> None:
        """Raises ExpertNotFound for a model that is not listed."""
        if model not in self.models:
            self._missing(model)

    def _index(self, expert: str) -> int:
        if expert not in self.experts:
            self._missing(expert)
        return self.experts.index(expert)

    def _missing(self, model: str) -> NoReturn:
        message = f"there is no model {model!r} here; served are {', '.join(self.models)}"
        raise ExpertNotFound(message, "model")
