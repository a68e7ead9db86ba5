"""Text whose tokens wear the colour of their expert."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from meteora_dist.reports.palette import colour_of


class Coloured(NamedTuple):
    """A piece of text.

    Attributes:
        text: The piece.
        expert: Number of its expert; None for none.
        said: What it says under the pointer.
    """

    text: str
    expert: int | None
    said: str


def coloured(pieces: Iterable[Coloured]) -> str:
    """The text, every piece underlined in its expert's colour."""
    return f'<div class="text">{"".join(map(_span, pieces))}</div>'


def legend(names: Sequence[str], numbers: Iterable[int]) -> str:
    """The colours of the experts of these numbers."""
    keys = (
        f'<span class="key"><i style="background:{colour_of(number)}"></i>{escape(names[number])}</span>'
        for number in numbers
    )
    return f"<p>{''.join(keys)}</p>"


def _span(piece: Coloured) -> str:
    if piece.expert is None:
        return escape(piece.text)
    style = f"border-color:{colour_of(piece.expert)}"
    return f'<span class="token" style="{style}" title="{escape(piece.said)}">{escape(piece.text)}</span>'
