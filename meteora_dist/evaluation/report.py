"""Results as Markdown: every number with its 95 % interval."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev

from meteora_dist.evaluation.intervals import Estimate
from meteora_dist.evaluation.results import CompositeResult, GateResult, Results, TaskScore

_TEXT = ("bleu", "rouge1", "rouge2", "rougeL")


def markdown(found: Results, command: str, plots: Mapping[str, str]) -> str:
    """The page.

    Args:
        found: The results.
        command: That made them.
        plots: File of every plot by its title, relative to the page.
    """
    parts = ["# Evaluation", f"```\n{command}\n```", _setting(found.setting)]
    parts += ["## Means over tasks", _means(found)]
    if any(one.bank for one in found.means):
        parts += ["## Exact match over the banks", _spread(found)]
    parts += ["## Exact match", _by_task(found.scores, "exact_match")]
    parts += ["## Containment", _by_task(found.scores, "containment")]
    texts = [score for score in found.scores if "bleu" in score.metrics]
    if texts:
        parts += ["## BLEU and ROUGE", _texts(texts)]
    if any(score.perplexity for score in found.scores):
        parts += ["## Perplexity of gold answers", _perplexities(found.scores)]
    if any(score.own is not None for score in found.scores):
        parts += ["## Answers dominated by the task's own expert", _owns(found.scores)]
    if found.composites:
        parts += ["## Composite questions", _composites(found.composites)]
    parts += [_gates(one) for one in found.gates]
    parts += [f"## {title}\n\n![{title}]({file})" for title, file in plots.items()]
    return "\n\n".join(parts) + "\n"


def heading(bank: str, method: str) -> str:
    """A method's column: with its bank's label where the bank's gates matter."""
    return f"{method} ({bank})" if bank else method


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _setting(setting: Mapping[str, object]) -> str:
    shown = "; ".join(f"{key.replace('_', ' ')}: {_shown(value)}" for key, value in setting.items())
    return (
        f"{shown}.\n\nGreedy. Brackets: 95 %; Wilson's interval for shares, a seeded bootstrap over rows for the rest. "
        "Empty answers count as wrong, and as 0 in BLEU and ROUGE."
    )


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _interval(estimate: Estimate, digits: int = 3) -> str:
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def _means(found: Results) -> str:
    oracle = next((one.exact_match.value for one in found.means if one.method == "oracle"), None)
    rows = []
    for one in found.means:
        of_oracle = f"{one.exact_match.value / oracle:.2f}" if oracle else ""
        perplexity = "" if one.perplexity is None else f"{one.perplexity:.2f}"
        cells = (_interval(one.exact_match), of_oracle, _interval(one.paper_metric), perplexity)
        rows.append([heading(one.bank, one.method), *cells])
    return table(("method", "exact match", "of oracle", "each task by MeteoRA's metric", "perplexity"), rows)


def _spread(found: Results) -> str:
    """Mean and standard deviation over banks, which differ in the seed of their gates."""
    values: dict[str, list[float]] = {}
    for one in found.means:
        if one.bank:
            values.setdefault(one.method, []).append(one.exact_match.value)
    rows = [
        [method, str(len(own)), f"{fmean(own):.3f}", f"{stdev(own):.3f}", f"{min(own):.3f} to {max(own):.3f}"]
        for method, own in values.items()
    ]
    return table(("method", "banks", "mean", "standard deviation", "range"), rows)


def _by_task(scores: Sequence[TaskScore], metric: str) -> str:
    columns = list(dict.fromkeys((score.bank, score.method) for score in scores))
    cells = {(score.bank, score.method, score.task): score.metrics[metric] for score in scores}
    counts = {score.task: score.rows for score in scores}
    rows = [
        [task, str(count), *(_interval(cells[(*column, task)], 2) for column in columns)]
        for task, count in counts.items()
    ]
    return table(("task", "rows", *(heading(*column) for column in columns)), rows)


def _texts(scores: Sequence[TaskScore]) -> str:
    rows = [
        [score.task, heading(score.bank, score.method), str(score.empty)]
        + [_interval(score.metrics[key], 1 if key == "bleu" else 3) for key in _TEXT]
        for score in scores
    ]
    return table(("task", "method", "empty", "BLEU", "ROUGE-1", "ROUGE-2", "ROUGE-L"), rows)


def _perplexities(scores: Sequence[TaskScore]) -> str:
    rows = [
        [score.task, heading(score.bank, score.method), _interval(score.perplexity, 2)]
        for score in scores
        if score.perplexity
    ]
    return table(("task", "method", "perplexity"), rows)


def _owns(scores: Sequence[TaskScore]) -> str:
    rows = [
        [score.task, heading(score.bank, score.method), f"{score.own:.3f}"] for score in scores if score.own is not None
    ]
    return table(("task", "method", "share of answers"), rows)


def _composites(found: Sequence[CompositeResult]) -> str:
    rows = [
        (
            *(f"{one.n}, {one.shots}-shot", str(one.rows), str(one.too_long), heading(one.bank, one.method)),
            *(_interval(one.attempted, 2), _interval(one.correct, 2)),
        )
        for one in found
    ]
    return table(("sub-questions", "rows", "too long", "method", "attempted", "correct"), rows)


def _gates(found: GateResult) -> str:
    title = f"## Gates of {heading(found.bank, found.method)} that name the task's expert"
    parts = []
    for way, counts in found.counts.items():
        # No interval: the choices of neighbouring tokens and gates are anything but independent.
        rows = [[key, f"{right / total:.3f}"] for key, (right, total) in counts.items() if total]
        parts.append(table((way, "share of choices"), rows))
    return "\n\n".join([title, *parts])
