"""A bank on its base model, as evaluation uses it: asked through the engine, or passed over with given tokens.

The engine's model reads a paged cache and cannot make a plain pass, so the two take turns in memory, and neither is
loaded before it is needed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from meteora_dist.bank import Bank
from meteora_dist.engine.config import EngineConfig
from meteora_dist.engine.rank import RankEngine
from meteora_dist.engine.request import GenerationRequest, TokenEvent, Voters
from meteora_dist.errors import PromptTooLong
from meteora_dist.model.load import load_base, torch_dtype
from meteora_dist.moe.inject import inject
from meteora_dist.moe.routed_model import RoutedModel
from meteora_dist.moe.routers import elect
from meteora_dist.moe.routing import BASE, RoutingChoice, named

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """One greedy answer.

    Attributes:
        ids: Its tokens.
        shares: Each expert's share of the gate weight over them, adding up to 1; zeros under mode ``base``.
    """

    ids: Ids
    shares: tuple[float, ...]


class Subject:
    """One bank of one model. Close it when done: both ways of use hold memory."""

    def __init__(self, config: EngineConfig) -> None:
        """Loads nothing yet."""
        self._config = config
        self._engine: RankEngine | None = None
        self._routed: RoutedModel | None = None
        self._asked = 0
        self.bank = Bank.open(config.bank)

    def answers(
        self, prompts: Sequence[Ids], choice: RoutingChoice, max_tokens: int, vote: bool
    ) -> list[Answer | None]:
        """Greedy answers in order; None where prompt and answer exceed the context.

        Args:
            prompts: Token ids.
            choice: Of all of them.
            max_tokens: Most tokens of an answer.
            vote: Whether ``choice`` only routes the prompt, and the expert that is elected on it serves alone.
        """
        return asyncio.run(self._gather(self.start(), prompts, choice, max_tokens, vote))

    def start(self) -> RankEngine:
        """The engine, started if it is not."""
        if self._engine is None:
            self._routed = None
            self._engine = RankEngine(self._config)
        return self._engine

    @property
    def routed(self) -> RoutedModel:
        """The model for plain passes, loaded on demand."""
        if self._routed is None:
            self._stop()
            dtype = torch_dtype(self._config.dtype)
            self._routed = inject(load_base(self._config.model, dtype), self.bank, dtype)
        return self._routed

    def close(self) -> None:
        """Frees what is loaded."""
        self._stop()
        self._routed = None

    def _stop(self) -> None:
        if self._engine is not None:
            self._engine.stop()
            self._engine = None

    async def _gather(
        self, engine: RankEngine, prompts: Sequence[Ids], choice: RoutingChoice, max_tokens: int, vote: bool
    ) -> list[Answer | None]:
        async def one(prompt: Ids) -> Answer | None:
            with contextlib.suppress(PromptTooLong):
                routing = named(await self._elected(engine, prompt, choice)) if vote else choice
                events = await self._events(engine, prompt, routing, max_tokens)
                return Answer(tuple(e.token_id for e in events), _mean([e.shares or () for e in events]))
            return None

        return list(await asyncio.gather(*map(one, prompts)))

    async def _elected(self, engine: RankEngine, prompt: Ids, choice: RoutingChoice) -> int:
        """The expert that the layers' routers choose for the prompt; without any, that with the most gate weight."""
        manifest = self.bank.manifest
        if manifest.routers is not None:
            # Routers are trained on the states of the base model.
            (event,) = await self._events(engine, prompt, BASE, 1, "routers")
            return elect(event.votes or (), manifest.routing.vote)
        (event,) = await self._events(engine, prompt, choice, 1, "gates")
        shares = event.shares or ()
        return shares.index(max(shares))

    async def _events(
        self, engine: RankEngine, prompt: Ids, routing: RoutingChoice, max_tokens: int, vote: Voters | None = None
    ) -> list[TokenEvent]:
        self._asked += 1
        request = GenerationRequest(f"eval-{self._asked}", prompt, max_tokens, routing=routing, trace=True, vote=vote)
        return [event async for event in engine.generate(request)]


def _mean(shares: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(sum(column) / len(shares) for column in zip(*shares, strict=True))
