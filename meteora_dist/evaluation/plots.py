"""Results as pictures: a radar of the tasks, bars of composites, curves and a map of what the gates choose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from meteora_dist.evaluation.report import heading
from meteora_dist.evaluation.results import CompositeResult, GateResult, Results, RouteMap, TaskScore

DPI = 130


def draw(found: Results, folder: Path) -> dict[str, str]:
    """Writes all plots to ``folder`` as PNG, and returns the file of each by its title."""
    figures: dict[str, Figure] = {}
    if len({score.task for score in found.scores}) > 2:
        figures["Exact match by task"] = radar(found.scores)
    if found.composites:
        figures["Composite questions"] = composite_bars(found.composites)
    if found.gates:
        figures["Choices of gates"] = gate_curves(found.gates)
    for one in found.maps:
        figures[f"Experts by layer and token, {heading(one.bank, one.method)}, {one.question}"] = route_map(one)
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for number, (title, figure) in enumerate(figures.items(), 1):
        file = folder / f"plot-{number}.png"
        figure.savefig(file, dpi=DPI)
        files[title] = file.name
    return files


def radar(scores: Sequence[TaskScore]) -> Figure:
    """Exact match: a spoke a task, a line a method."""
    tasks = list(dict.fromkeys(score.task for score in scores))
    angles = [2 * math.pi * i / len(tasks) for i in range(len(tasks))]
    figure = Figure(figsize=(10, 8), layout="constrained")
    axes = figure.add_subplot(projection="polar")
    for number, (bank, method) in enumerate(dict.fromkeys((score.bank, score.method) for score in scores)):
        values = {s.task: s.metrics["exact_match"].value for s in scores if (s.bank, s.method) == (bank, method)}
        line = [values[task] for task in tasks]
        style = ("-", "--", ":")[number // 10 % 3]
        axes.plot([*angles, angles[0]], [*line, line[0]], style, label=heading(bank, method))
    axes.set_xticks(angles, [task.replace("_", "\n") for task in tasks], fontsize=8)
    axes.set_ylim(0, 1)
    axes.set_title("Exact match", pad=28)
    figure.legend(loc="outside right upper", fontsize=9)
    return figure


def composite_bars(found: Sequence[CompositeResult]) -> Figure:
    """Attempted and right sub-questions, a group of bars a method, one panel a kind."""
    kinds = list(dict.fromkeys((one.n, one.shots) for one in found))
    figure = Figure(figsize=(1.5 + 5 * len(kinds), 4.5), layout="constrained")
    panels = figure.subplots(1, len(kinds), squeeze=False)[0]
    for axes, (n, shots) in zip(panels, kinds, strict=True):
        own = [one for one in found if (one.n, one.shots) == (n, shots)]
        for offset, label, estimates in (
            (-0.2, "attempted", [one.attempted for one in own]),
            (0.2, "correct", [one.correct for one in own]),
        ):
            values = [estimate.value for estimate in estimates]
            errors = [
                [estimate.value - estimate.low for estimate in estimates],
                [estimate.high - estimate.value for estimate in estimates],
            ]
            axes.bar([i + offset for i in range(len(own))], values, 0.4, yerr=errors, capsize=3, label=label)
        names = [heading(one.bank, one.method) for one in own]
        axes.set_xticks(range(len(own)), names, rotation=40, ha="right", fontsize=8)
        axes.set_ylim(0, n)
        axes.set_title(f"{n} sub-questions, {shots}-shot")
        axes.set_ylabel("sub-questions (mean, 95 %)")
    panels[0].legend()
    return figure


def gate_curves(found: Sequence[GateResult]) -> Figure:
    """Share of gates that name the task's expert, by layer, position and kind of linear."""
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, way in zip(panels, ("layer", "position", "module"), strict=True):
        for one in found:
            counts = {key: right / total for key, (right, total) in one.counts.get(way, {}).items() if total}
            axes.plot(list(counts), list(counts.values()), "o-", ms=3, label=heading(one.bank, one.method))
        axes.set_ylim(0, 1.02)
        axes.set_xlabel(way if way != "position" else "position in the sequence, tokens")
        axes.tick_params(axis="x", rotation=60 if way == "module" else 0, labelsize=7)
    panels[0].set_ylabel("share of choices that name the task's expert")
    panels[0].legend(fontsize=8)
    return figure


def route_map(found: RouteMap) -> Figure:
    """Layers by tokens, coloured by the expert that most gates of the layer name."""
    cells = found.choices
    palette = matplotlib.colormaps["tab20" if len(found.experts) > 10 else "tab10"]
    colours = [palette(i % palette.N) for i in range(len(found.experts))]
    width = max(6.0, 0.14 * len(cells[0]) + 3)
    figure = Figure(figsize=(width, 2.5 + 0.12 * len(cells)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(
        cells, cmap=ListedColormap(colours), vmin=-0.5, vmax=len(colours) - 0.5, aspect="auto", interpolation="none"
    )
    axes.axvline(found.prompt_tokens - 0.5, color="black", lw=1.5)
    names = [_shown(token) for token in found.tokens]
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=5, family="DejaVu Sans")
    axes.set_ylabel("layer")
    title = f"{heading(found.bank, found.method)}, {found.question}; the answer stands right of the line"
    axes.set_title(title, fontsize=9)
    used = sorted({expert for row in cells for expert in row})
    patches = [Patch(color=colours[expert], label=found.experts[expert]) for expert in used]
    figure.legend(handles=patches, loc="outside right upper", fontsize=7)
    return figure


def _shown(token: str) -> str:
    """A token as an axis label: a mathematical sign would be typeset, and a line break would tear the axis."""
    return "".join(c if c.isascii() and c.isprintable() and c != "$" else "·" for c in token)[:12]
