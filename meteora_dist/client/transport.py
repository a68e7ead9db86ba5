"""What a protocol must be able to do for the client."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from meteora_dist.client.answers import Piece, Reply
from meteora_dist.client.question import Question


class Transport(Protocol):
    """One protocol to one service. Every method raises ``Failed``; none tries again or watches the clock."""

    async def models(self) -> tuple[str, ...]:
        """Every name that ``model`` may have, blends aside."""

    async def generate(self, question: Question) -> Reply:
        """The whole answers."""

    def stream(self, question: Question) -> AsyncGenerator[Piece, None]:
        """The answers piece by piece; the last piece has the usage. Closing it cancels the call."""

    async def close(self) -> None:
        """Ends every connection."""
