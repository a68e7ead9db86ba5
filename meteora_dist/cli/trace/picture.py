"""A traced answer as one picture: layers, or experts, by tokens."""

from __future__ import annotations

from pathlib import Path

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from meteora_dist.cli.trace.page import shown
from meteora_dist.client import RoutingTrace
from meteora_dist.reports.palette import colour_of

DPI = 130
_WHITE = (1.0, 1.0, 1.0)

Colour = tuple[float, float, float]


def draw_trace(trace: RoutingTrace, path: Path) -> None:
    """Writes the picture as PNG: a row a layer when the trace has layers, else a row an expert."""
    layers = max((len(token.layer_experts) for token in trace.tokens), default=0)
    rows = _layers(trace, layers) if layers else _experts(trace)
    figure = Figure(figsize=(max(6.0, 0.16 * len(trace.tokens) + 3.5), 2.5 + 0.14 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(rows, aspect="auto", interpolation="none")
    names = [_axis_text(shown(token)) for token in trace.tokens]
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    if layers:
        axes.set_ylabel("layer")
        used = sorted({number for token in trace.tokens for number in token.layer_experts if number >= 0})
        patches = [Patch(color=colour_of(number), label=trace.experts[number]) for number in used]
        figure.legend(handles=patches, loc="outside upper left", ncols=2, fontsize=7)
    else:
        axes.set_yticks(range(len(trace.experts)), list(trace.experts), fontsize=7)
    figure.savefig(path, dpi=DPI, format="png")


def _layers(trace: RoutingTrace, layers: int) -> list[list[Colour]]:
    return [
        [
            _mixed(token.layer_experts[layer], token.layer_shares[layer])
            if layer < len(token.layer_experts)
            else _WHITE
            for token in trace.tokens
        ]
        for layer in range(layers)
    ]


def _experts(trace: RoutingTrace) -> list[list[Colour]]:
    return [[_mixed(number, token.shares[number]) for token in trace.tokens] for number in range(len(trace.experts))]


def _mixed(number: int, share: float) -> Colour:
    """An expert's colour on white, as strong as its share."""
    if number < 0:
        return _WHITE
    red, green, blue = (1 - share * (1 - part) for part in to_rgb(colour_of(number)))
    return red, green, blue


def _axis_text(text: str) -> str:
    """What matplotlib's own font has, and no sign of its mathematics."""
    return "".join(c if c.isascii() and c.isprintable() and c != "$" else "·" for c in text)
