"""Colours of experts, in reports and on the terminal."""

from __future__ import annotations

OKABE_ITO = ("#e69f00", "#56b4e9", "#009e73", "#d55e00", "#cc79a7", "#0072b2", "#f0e442", "#999999")
"""Told apart with any kind of colour vision (Okabe and Ito, 2008), grey in the place of their black."""


def colour_of(number: int) -> str:
    """Of an expert or a curve, as ``#rrggbb``; they repeat after eight, so that a name or number stands beside them."""
    return OKABE_ITO[number % len(OKABE_ITO)]
