"""The methods that are compared, by the names the command knows them by.

===================  ==================================================================================================
``base``             the base model alone
``oracle``           the expert that has the task's name, as PEFT would apply it (the papers' "PEFT" row)
``top-K``            MeteoRA: the gates pick K experts for every token and linear; ``top-2@15`` at temperature 15
``auto-sequence``    MoA: routers, or else gates, elect one expert on the prompt, which serves the whole answer
``average``          the mean of all experts' deltas, exactly
``linear``           PEFT's ``linear`` merge: means of the A and of the B matrices
``ties``             TIES merge of the experts' deltas (arXiv 2306.01708)
``dare-ties``        DARE, then TIES (arXiv 2311.03099)
``arrow``            gates made from the experts' own matrices (arXiv 2405.11157), top-3 as in PEFT; ``arrow@T``
``lorahub``          one weight an expert and task, found without gradients on a few rows (arXiv 2307.13269)
===================  ==================================================================================================

A further PEFT adapter is a method under its own name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from meteora_dist.errors import EvaluationError
from meteora_dist.moe.routing import BASE, RoutingChoice, named

Kind = Literal["base", "oracle", "gates", "vote", "average", "lorahub", "merge", "adapter"]
Home = Literal["own", "prototypes", "merged"]

ARROW_TOP_K = 3
"""What PEFT's own Arrow uses."""
MERGES = ("linear", "ties", "dare-ties")
DEFAULT = ("base", "oracle", "top-1", "top-2")

_GATED = re.compile(r"(?:top-(?P<k>[1-9][0-9]{0,3})|(?P<arrow>arrow))(?:@(?P<t>[0-9]+(?:\.[0-9]+)?))?")
_FIXED: dict[str, Kind] = {
    "base": "base",
    "oracle": "oracle",
    "auto-sequence": "vote",
    "average": "average",
    "lorahub": "lorahub",
    **dict.fromkeys(MERGES, "merge"),
}


@dataclass(frozen=True, slots=True)
class Method:
    """One method.

    Attributes:
        name: As the user wrote it.
        kind: How its experts are chosen.
        home: The bank it runs on: the evaluated one, the same experts with prototype gates, or one of merged adapters.
        top_k: Of the gates.
        temperature: Of the gates.
    """

    name: str
    kind: Kind
    home: Home = "own"
    top_k: int = 2
    temperature: float = 1.0

    @property
    def gated(self) -> bool:
        """Whether gates decide for tokens or for the sequence."""
        return self.kind in ("gates", "vote")

    @property
    def one_task(self) -> bool:
        """Whether it is told the task, and so cannot answer questions of several."""
        return self.kind in ("oracle", "lorahub")

    def choice(self, task: str, names: Sequence[str], weights: Sequence[float] = ()) -> RoutingChoice:
        """The routing of a question; under ``vote`` that of the prompt, which elects the expert.

        Args:
            task: Of the question.
            names: The experts of the bank it runs on.
            weights: Of every expert, for ``lorahub``.
        """
        if self.kind == "base":
            return BASE
        if self.gated:
            return RoutingChoice(top_k=self.top_k, temperature=self.temperature)
        if self.kind == "average":
            weights = [1 / len(names)] * len(names)
        if self.kind in ("average", "lorahub"):
            return RoutingChoice(mode="fixed", experts=tuple(enumerate(weights)))
        return named(names.index(task if self.kind == "oracle" else self.name))


def parse_methods(texts: Sequence[str], adapters: Collection[str] = ()) -> tuple[Method, ...]:
    """The methods of these names, in order, then the further adapters.

    Raises:
        EvaluationError: A name is unknown, stands there twice, or is a method's and an adapter's.
    """
    methods = [_parse(text, adapters) for text in (*texts, *(name for name in adapters if name not in texts))]
    if twice := sorted({text for text in texts if texts.count(text) > 1}):
        raise EvaluationError(f"method {twice[0]} is asked for {texts.count(twice[0])} times")
    return tuple(methods)


def _parse(text: str, adapters: Collection[str]) -> Method:
    gated = _GATED.fullmatch(text)
    if text in adapters:
        if gated or text in _FIXED:
            raise EvaluationError(f"an adapter cannot be called {text}, which is a method; give it another name")
        return Method(text, "adapter", "merged")
    if text in _FIXED:
        return Method(text, _FIXED[text], "merged" if text in MERGES else "own")
    if gated is None or (gated["t"] is not None and float(gated["t"]) <= 0):
        known = ", ".join([*_FIXED, "top-K", "top-K@T", "arrow", "arrow@T", *adapters])
        raise EvaluationError(f"there is no method {text!r}; there are {known} (K experts, temperature T above 0)")
    temperature = float(gated["t"] or 1)
    if gated["arrow"]:
        return Method(text, "gates", "prototypes", ARROW_TOP_K, temperature)
    return Method(text, "gates", "own", int(gated["k"]), temperature)
