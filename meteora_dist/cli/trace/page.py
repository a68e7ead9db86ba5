"""A traced answer as one HTML page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from meteora_dist.client import RoutingTrace, TokenRouting
from meteora_dist.reports.charts import Cell, cells
from meteora_dist.reports.page import note, page, section, table
from meteora_dist.reports.palette import colour_of
from meteora_dist.reports.tokens import Coloured, coloured, legend

_NAMED = 3
_SHOWN_CHARS = 14
_NOTHING = Cell("", 0.0, "")


def trace_page(prompt: str, model: str, trace: RoutingTrace) -> str:
    """The page.

    Args:
        prompt: The question.
        model: As it was asked for.
        trace: Of the answer; maps of layers are drawn when it has them.
    """
    tokens, names = trace.tokens, trace.experts
    used = [
        number
        for number, _ in Counter(token.dominating for token in tokens if token.dominating is not None).most_common()
    ]
    columns = [shown(token) for token in tokens]
    parts = [
        note(f"model {model}, {len(tokens)} tokens; dominating expert: {trace.dominating or 'none'}"),
        section("Question", coloured([Coloured(prompt, None, "")])),
        section(
            "Answer, each token by the expert with its largest share",
            coloured(Coloured(token.text, token.dominating, _said(token, names)) for token in tokens),
            legend(names, used),
        ),
        section("Experts", table(("expert", "tokens it dominates", "mean share"), _totals(trace))),
        section("Share of each expert by token", cells(names, columns, _share_rows(trace))),
    ]
    layers = max((len(token.layer_experts) for token in tokens), default=0)
    if layers:
        parts.append(
            section(
                "The dominating expert of each layer, by token; the stronger, the larger its share",
                cells([f"layer {layer}" for layer in range(layers)], columns, _layer_rows(trace, layers)),
                legend(names, sorted({number for token in tokens for number in token.layer_experts if number >= 0})),
            )
        )
    return page("Who wrote what", parts)


def shown(token: TokenRouting) -> str:
    """A token as the name of a column."""
    text = token.text.replace("\n", "⏎").strip() or "·"
    return text[:_SHOWN_CHARS]


def _said(token: TokenRouting, names: Sequence[str]) -> str:
    order = sorted(range(len(names)), key=lambda number: -token.shares[number])
    return ", ".join(f"{names[number]} {token.shares[number]:.0%}" for number in order[:_NAMED])


def _totals(trace: RoutingTrace) -> list[tuple[str, int, str]]:
    counts = Counter(token.dominating for token in trace.tokens)
    sums = [sum(token.shares[number] for token in trace.tokens) for number in range(len(trace.experts))]
    rows = [
        (name, counts[number], f"{sums[number] / max(1, len(trace.tokens)):.1%}")
        for number, name in enumerate(trace.experts)
    ]
    return sorted(rows, key=lambda row: -row[1])


def _share_rows(trace: RoutingTrace) -> list[list[Cell]]:
    return [
        [
            Cell(colour_of(number), token.shares[number], f"{shown(token)}: {name} {token.shares[number]:.0%}")
            for token in trace.tokens
        ]
        for number, name in enumerate(trace.experts)
    ]


def _layer_rows(trace: RoutingTrace, layers: int) -> list[list[Cell]]:
    return [[_layer_cell(trace.experts, token, layer) for token in trace.tokens] for layer in range(layers)]


def _layer_cell(names: Sequence[str], token: TokenRouting, layer: int) -> Cell:
    number = token.layer_experts[layer] if layer < len(token.layer_experts) else -1
    if number < 0:
        return _NOTHING
    share = token.layer_shares[layer]
    return Cell(colour_of(number), share, f"layer {layer}, {shown(token)}: {names[number]} {share:.0%}")
