"""How a bank routes data sets, as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence

from meteora_dist.evaluation.routing import Example, RoutingSummary
from meteora_dist.reports.charts import Cell, Curve, cells, lines
from meteora_dist.reports.page import note, page, section, table
from meteora_dist.reports.palette import colour_of
from meteora_dist.reports.tokens import Coloured, coloured, legend


def routing_page(title: str, found: RoutingSummary, setting: str) -> str:
    """The page.

    Args:
        title: Its heading.
        found: What was counted.
        setting: What was counted how, in a line.
    """
    names = found.experts
    tasks = [one.task for one in found.tasks]
    layers = [f"layer {layer}" for layer in range(len(found.load))]
    entropies = [Curve("all tasks", [(float(layer), value) for layer, value in enumerate(found.layer_entropy)])]
    parts = [
        note(setting),
        section(
            "Tasks and the experts their gates choose, % of first choices",
            cells(tasks, names, _map([one.chosen for one in found.tasks], names, tasks)),
            table(("task", "rows", *names, "entropy"), _confusion(found)),
            note(
                "Over all tokens of prompt and gold answer, all layers and linears; in brackets the choices for tokens "
                "of the answer alone. Entropy: of the softmax over all experts, 1 for evenly spread."
            ),
        ),
        section("Load of the experts by layer", cells(layers, names, _map(found.load, names, layers))),
        section("Entropy by layer", lines("Mean entropy of the gates", "layer", "of ln E", entropies)),
        *(section(f"Example: {one.task}", *_shown(one.example, names)) for one in found.tasks),
    ]
    return page(title, parts)


def _confusion(found: RoutingSummary) -> list[list[str]]:
    return [
        [
            *(one.task, str(one.rows)),
            *(f"{100 * a:.1f} ({100 * b:.1f})" for a, b in zip(one.chosen, one.answer_chosen, strict=True)),
            f"{one.entropy:.3f}",
        ]
        for one in found.tasks
    ]


def _map(shares_by_row: Sequence[Sequence[float]], names: Sequence[str], row_names: Sequence[str]) -> list[list[Cell]]:
    """Cells as strong as their part of the largest share."""
    most = max((share for shares in shares_by_row for share in shares), default=0.0) or 1.0
    return [
        [
            Cell(colour_of(number), share / most, f"{row_name}: {names[number]} {share:.1%}")
            for number, share in enumerate(shares)
        ]
        for row_name, shares in zip(row_names, shares_by_row, strict=True)
    ]


def _shown(example: Example, names: Sequence[str]) -> list[str]:
    """Prompt and answer, every token by the expert that most gates choose for it."""
    pieces = []
    for token, votes in zip(example.tokens, example.votes, strict=True):
        number = max(range(len(votes)), key=lambda one: votes[one])
        pieces.append(Coloured(token, number, f"{names[number]} {votes[number]:.0%} of the gates"))
    used = sorted({piece.expert for piece in pieces if piece.expert is not None})
    prompt, answer = pieces[: example.prompt_tokens], pieces[example.prompt_tokens :]
    return [coloured(prompt), note("and its gold answer"), coloured(answer), legend(names, used)]
