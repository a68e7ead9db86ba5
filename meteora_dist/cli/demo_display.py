"""How the demo prints: one table row an answer, the coloured trace, and the line it ends with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from meteora_dist.cli.demo_questions import TRANSPORTS, Question, numbered
from meteora_dist.cli.demo_replies import Reply, Token

_COLOURS = ("bright_cyan", "bright_yellow", "bright_green", "bright_magenta", "orange1", "dodger_blue1", "red", "plum2")
_PROMPT_CHARS = 100
_ANSWER_CHARS = 80
_REASON_CHARS = 200
_UNSEEN = "·"
"""Stands in the trace for a token without text, such as the end of the answer."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a question.

    Attributes:
        question: What was asked.
        replies: The answer to each of its turns, or nothing when it failed.
        failure: Why it failed.
    """

    question: Question
    replies: tuple[Reply, ...]
    failure: str = ""

    @property
    def own_task(self) -> bool:
        """Whether a single task's expert dominates its answer."""
        return self._single and self.replies[0].dominating == self.question.tasks[0]

    @property
    def right(self) -> bool:
        """Whether a single task's answer is right."""
        return self._single and self.question.rows[0].score(self.replies[0].text) > 0

    @property
    def tokens(self) -> tuple[Token, ...]:
        """Of all answers."""
        return tuple(token for reply in self.replies for token in reply.tokens)

    @property
    def _single(self) -> bool:
        return bool(self.replies) and not self.question.composite


def header() -> RenderableType:
    """The table's head."""
    names = (Text(name, style="bold underline") for name in ("sent by", "prompt", "answer", "gold", "expert"))
    return _line(*names)


def row(outcome: Outcome, experts: Sequence[str]) -> RenderableType:
    """The table's row of one question; ✓ and ✗ mark right answers and the task's own expert."""
    question = outcome.question
    title = (", then " if question.conversation else " + ").join(question.tasks)
    asked = shortened(" ".join(question.turns), _PROMPT_CHARS)
    prompt = Text.assemble((title, "bold"), "\n", (asked, "dim"))
    gold = _lines(question.gold)
    way = Text(question.transport)
    if not outcome.replies:
        return _line(way, prompt, Text(f"failed: {outcome.failure}", style="red"), gold, Text("-"))
    answer = _lines([reply.text or "(empty)" for reply in outcome.replies])
    if question.composite:
        expert = Text("\n".join(f"{experts[index]}: {count} tokens" for index, count in dominated(outcome.tokens)))
    else:
        answer = Text.assemble(_mark(outcome.right), answer)
        expert = Text.assemble(_mark(outcome.own_task), outcome.replies[0].dominating or "none")
    return _line(way, prompt, answer, gold, expert)


def trace(outcome: Outcome, experts: Sequence[str]) -> RenderableType:
    """Every token in the colour of its dominating expert, which ``[number]`` names too wherever it changes."""
    how = "in one conversation" if outcome.question.conversation else "in one prompt"
    title = f"{len(outcome.question.tasks)} tasks {how}: each token by the expert with its largest share"
    answers = [_traced(reply.tokens) for reply in outcome.replies]
    count = len(outcome.tokens)
    means = [sum(shares) / count for shares in zip(*(token.shares for token in outcome.tokens), strict=True)]
    legend = [
        Text(f"[{index + 1}] {experts[index]}: {ours} tokens, {means[index]:.0%} of the gate weight", _colour(index))
        for index, ours in dominated(outcome.tokens)
    ]
    return Group(Text(), Text(title, style="bold"), *answers, *legend)


def dominated(tokens: Sequence[Token]) -> list[tuple[int, int]]:
    """Index and count of the experts that dominate tokens, most tokens first."""
    return Counter(token.dominating for token in tokens).most_common()


def summary(ranks: int, experts: int, outcomes: Sequence[Outcome]) -> str:
    """The line the demo ends with: ``DEMO OK ...``, or ``DEMO FAILED ...`` and the first reason."""
    failed = [outcome for outcome in outcomes if not outcome.replies]
    broken = {outcome.question.transport for outcome in failed}
    single = [outcome for outcome in outcomes if not outcome.question.composite]
    ways = " ".join(f"{transport}={'failed' if transport in broken else 'ok'}" for transport in TRANSPORTS)
    routed = f"routed_to_own_task={sum(outcome.own_task for outcome in single)}/{len(single)}"
    line = f"ranks={ranks} experts={experts} {ways} {routed}"
    if not failed:
        return f"DEMO OK {line}"
    first = failed[0].question
    return f"DEMO FAILED {line}: {first.transport}, {'+'.join(first.tasks)}: {one_line(failed[0].failure)}"


def one_line(reason: str) -> str:
    """A reason, shortened and without line breaks."""
    return shortened(reason, _REASON_CHARS)


def shortened(text: str, most: int) -> str:
    """The text on one line, its middle left out where it has more than ``most`` characters."""
    line = " ".join(text.split())
    if len(line) <= most:
        return line
    head = (most - 1) // 2
    return f"{line[:head].rstrip()}…{line[head + 1 - most :].lstrip()}"


def _traced(tokens: Sequence[Token]) -> Text:
    body, before = Text("  "), None
    for token in tokens:
        expert = token.dominating
        if expert != before:
            body.append(f"[{expert + 1}]", style=f"bold reverse {_colour(expert)}")
        body.append(token.text or _UNSEEN, style=_colour(expert))
        before = expert
    return body


def _lines(texts: Sequence[str]) -> Text:
    """Each text, shortened, on a line of its own."""
    return Text("\n".join(numbered([shortened(text, _ANSWER_CHARS) for text in texts])))


def _mark(good: bool) -> Text:
    return Text("✓ ", style="bold green") if good else Text("✗ ", style="bold red")


def _colour(expert: int) -> str:
    return _COLOURS[expert % len(_COLOURS)]


def _line(*cells: Text) -> Table:
    """One row with the widths that every row has: rows are printed as answers arrive, each for itself."""
    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    table.add_column(width=11)
    for ratio in (4, 3, 3, 3):
        table.add_column(ratio=ratio, overflow="fold")
    table.add_row(*cells)
    return table
