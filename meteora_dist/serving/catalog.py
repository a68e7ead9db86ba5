"""What a request's ``model`` may name, and the routing it stands for."""

from __future__ import annotations

from dataclasses import dataclass

from meteora_dist.bank import BankManifest
from meteora_dist.errors import ExpertNotFound
from meteora_dist.moe.routing import BASE, RoutingChoice, named
from meteora_dist.serving.request import TextRequest

AUTO_MODEL = "auto"
BASE_MODEL = "base"


@dataclass(frozen=True, slots=True)
class Catalog:
    """The served models.

    Attributes:
        manifest: The bank behind them.
    """

    manifest: BankManifest

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts, in the order of routing shares."""
        return tuple(expert.name for expert in self.manifest.experts)

    @property
    def models(self) -> tuple[str, ...]:
        """Every name a request may use."""
        return (AUTO_MODEL, BASE_MODEL, *self.experts)

    def routing(self, request: TextRequest) -> RoutingChoice:
        """The routing a request asks for.

        Raises:
            ExpertNotFound: Its model is not served; the message lists those that are.
        """
        self.check(request.model)
        if request.model == BASE_MODEL:
            return BASE
        if request.model != AUTO_MODEL:
            return named(self.experts.index(request.model))
        defaults = self.manifest.routing
        return RoutingChoice(
            mode="auto",
            top_k=min(request.top_k or defaults.top_k, len(self.experts)),
            temperature=request.gate_temperature or defaults.temperature,
        )

    def check(self, model: str) -> None:
        """Raises ExpertNotFound for a model that is not served."""
        if model not in self.models:
            message = f"there is no model {model!r} here; served are {', '.join(self.models)}"
            raise ExpertNotFound(message, "model")
