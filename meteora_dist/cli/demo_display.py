"""How the demo prints: one table row an answer, the coloured trace, and the line it ends with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from meteora_dist.cli.demo_questions import TRANSPORTS, Question
from meteora_dist.cli.demo_transports import Reply, Token

_COLOURS = ("bright_cyan", "bright_yellow", "bright_green", "bright_magenta", "orange1", "dodger_blue1", "red", "plum2")
_PROMPT_CHARS = 100
_ANSWER_CHARS = 90
_REASON_CHARS = 200
_UNSEEN = "·"
"""Stands in the trace for a token without text, such as the end of the answer."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a question.

    Attributes:
        question: What was asked.
        reply: The answer, or None when it failed.
        failure: Why it failed.
    """

    question: Question
    reply: Reply | None
    failure: str = ""

    @property
    def own_task(self) -> bool:
        """Whether the expert that dominates the answer is one of the question's own."""
        return self.reply is not None and self.reply.dominating in self.question.tasks

    @property
    def right(self) -> bool:
        """Whether a single task's answer is right."""
        question = self.question
        return self.reply is not None and not question.composite and question.rows[0].score(self.reply.text) > 0


def header() -> RenderableType:
    """The table's head."""
    names = (Text(name, style="bold underline") for name in ("sent by", "prompt", "answer", "gold", "expert"))
    return _line(*names)


def row(outcome: Outcome, experts: Sequence[str]) -> RenderableType:
    """The table's row of one question; ✓ and ✗ mark right answers and the task's own expert."""
    question, reply = outcome.question, outcome.reply
    prompt = Text.assemble(
        (" + ".join(question.tasks), "bold"), "\n", (shortened(question.prompt, _PROMPT_CHARS), "dim")
    )
    gold = Text(shortened(question.gold, _ANSWER_CHARS))
    way = Text(question.transport)
    if reply is None:
        return _line(way, prompt, Text(f"failed: {outcome.failure}", style="red"), gold, Text("-"))
    answer = Text(shortened(reply.text, _ANSWER_CHARS) or "(empty)")
    if question.composite:
        counts = dominated(reply.tokens, experts)
        expert = Text("\n".join(f"{name}: {count} tokens" for name, count in counts))
    else:
        answer = Text.assemble(_mark(outcome.right), answer)
        expert = Text.assemble(_mark(outcome.own_task), reply.dominating or "none")
    return _line(way, prompt, answer, gold, expert)


def trace(tokens: Sequence[Token], experts: Sequence[str]) -> RenderableType:
    """Every token in the colour of its dominating expert, which ``[number]`` names too wherever it changes."""
    body, before = Text(), None
    for token in tokens:
        expert = token.dominating
        if expert != before:
            body.append(f"[{expert + 1}]", style=f"bold reverse {_colour(expert)}")
        body.append(token.text or _UNSEEN, style=_colour(expert))
        before = expert
    legend = [
        Text(f"[{experts.index(name) + 1}] {name}: {count} tokens", style=_colour(experts.index(name)))
        for name, count in dominated(tokens, experts)
    ]
    title = Text("Routing trace of the composite answer: each token by the expert with its largest share", style="bold")
    return Group(Text(), title, body, Text(), *legend)


def dominated(tokens: Sequence[Token], experts: Sequence[str]) -> list[tuple[str, int]]:
    """How many tokens each expert dominates, most first, without the experts that dominate none."""
    return Counter(experts[token.dominating] for token in tokens).most_common()


def summary(ranks: int, experts: int, outcomes: Sequence[Outcome]) -> str:
    """The line the demo ends with: ``DEMO OK ...``, or ``DEMO FAILED ...`` and the first reason."""
    failed = [outcome for outcome in outcomes if outcome.reply is None]
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
