"""Methods by name, and the routing each of them stands for."""

from __future__ import annotations

import pytest

from meteora_dist.errors import EvaluationError
from meteora_dist.evaluation.methods import parse_methods
from meteora_dist.moe.routing import BASE, RoutingChoice, named

NAMES = ("a", "b", "c", "d")


@pytest.mark.parametrize(
    ("text", "home", "choice"),
    [
        ("base", "own", BASE),
        ("oracle", "own", named(2)),
        ("top-1", "own", RoutingChoice(top_k=1)),
        ("top-2@15", "own", RoutingChoice(top_k=2, temperature=15)),
        ("auto-sequence", "own", RoutingChoice(top_k=2)),
        ("average", "own", RoutingChoice(mode="fixed", experts=tuple((i, 0.25) for i in range(4)))),
        ("arrow", "prototypes", RoutingChoice(top_k=3)),
        ("arrow@0.5", "prototypes", RoutingChoice(top_k=3, temperature=0.5)),
    ],
)
def test_choices(text: str, home: str, choice: RoutingChoice) -> None:
    (method,) = parse_methods([text])
    assert (method.home, method.choice("c", NAMES)) == (home, choice)


def test_weights_and_adapters() -> None:
    hub, merged, extra = parse_methods(["lorahub", "ties"], ["lora-b"])
    assert hub.choice("c", ("a", "b"), (0.5, -1.0)).experts == ((0, 0.5), (1, -1.0))
    assert (merged.home, merged.choice("c", ("ties", "lora-b"))) == ("merged", named(0))
    assert (extra.home, extra.choice("c", ("ties", "lora-b"))) == ("merged", named(1))


@pytest.mark.parametrize("text", ["top-0", "top-2@0", "top2", "auto", "ties@2", ""])
def test_unknown_methods_are_refused_with_those_there_are(text: str) -> None:
    with pytest.raises(EvaluationError, match=f"there is no method '{text}'; there are base, oracle, .*top-K"):
        parse_methods([text])


def test_doubles_and_clashes_are_refused() -> None:
    with pytest.raises(EvaluationError, match="method base is asked for 2 times"):
        parse_methods(["base", "base"])
    with pytest.raises(EvaluationError, match="an adapter cannot be called top-2"):
        parse_methods([], ["top-2"])
