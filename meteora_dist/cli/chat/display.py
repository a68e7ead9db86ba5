"""How the chat prints: tokens in the colours of their experts as they arrive, then who wrote how much."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from meteora_dist.client import Piece
from meteora_dist.reports.palette import colour_of


class AnswerDisplay:
    """Prints one answer piece by piece.

    Attributes:
        text: The answer so far.
    """

    def __init__(self, console: Console) -> None:
        """Nothing is printed yet."""
        self.text = ""
        self._console = console
        self._experts: Sequence[str] = ()
        self._tokens: Counter[int] = Counter()
        self._weights: list[float] = []

    def show(self, piece: Piece) -> None:
        """Prints what is new."""
        self.text += piece.text
        routing = piece.routing
        if routing is None:
            self._console.print(Text(piece.text), end="", soft_wrap=True)
            return
        self._experts = routing.experts
        line = Text()
        for token in routing.tokens:
            expert = token.dominating
            self._tokens[-1 if expert is None else expert] += 1
            weights = self._weights or [0.0] * len(token.shares)
            self._weights = [weight + share for weight, share in zip(weights, token.shares, strict=True)]
            line.append(token.text, style="" if expert is None else colour_of(expert))
        # Stop texts and characters of several tokens: what is shown is what was answered.
        if line.plain != piece.text:
            line = Text(piece.text, style=line.spans[-1].style if line.spans else "")
        self._console.print(line, end="", soft_wrap=True)

    def end(self) -> None:
        """Ends the line, and tells who watches which experts wrote it, most tokens first."""
        self._console.print()
        total = self._tokens.total()
        if not (total and self._console.is_terminal):
            return
        legend = Text()
        for number, count in self._tokens.most_common():
            if number < 0:
                legend.append(f"■ no expert: {count} tokens  ", style="dim")
                continue
            share = self._weights[number] / total
            legend.append("■ ", style=colour_of(number))
            legend.append(f"{self._experts[number]}: {count} tokens, {share:.0%} of the weight  ", style="dim")
        self._console.print(legend, soft_wrap=True)
