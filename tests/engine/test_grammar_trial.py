"""What is tried in a process of its own: ordinary schemas pass, and those that would cost a replica do not."""

from __future__ import annotations

from typing import Any

import pytest

from meteora_dist.engine.grammar_trial import refusal
from meteora_dist.serving.json_grammar import json_grammar


def chain(links: int) -> dict[str, Any]:
    """A schema whose references make an array of arrays of arrays."""
    inner = {f"a{i}": {"type": "array", "items": {"$ref": f"#/$defs/a{i + 1}"}} for i in range(links)}
    return {"$defs": inner | {f"a{links}": {"type": "string"}}, "$ref": "#/$defs/a0"}


@pytest.mark.parametrize(
    "schema",
    [
        None,
        {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(500)}},
        {"enum": list(range(5000))},
        {"type": "string", "pattern": "^(a|b)*a(a|b){20}$"},
        {"type": "number", "multipleOf": 0.01},
        chain(50),
    ],
    ids=["any", "properties", "enum", "pattern", "cents", "chain"],
)
def test_ordinary_schemas_pass(schema: dict[str, Any] | None) -> None:
    assert refusal(json_grammar(schema)) is None


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        # Each of the first three took the process along: by its stack, or by hours of compilation.
        (chain(900), "nested too deeply"),
        ({"patternProperties": {f"^p{i}[a-z]*x$": {"type": "integer"} for i in range(900)}}, "takes more than 1 s"),
        ({"allOf": [{"type": "integer", "multipleOf": p} for p in (9973, 9967, 9949, 9941)]}, "takes more than 1 s"),
        ({"$ref": "#"}, "no text fits it"),
        ({"type": "string", "pattern": "(?=a)" + "b" * 9000}, "look-around, including look-ahead"),
        ({"$ref": "file:///etc/passwd"}, "does not fetch"),
        ({"type": "string", "format": "x" * 9000}, "Unknown format: xxx"),
    ],
    ids=["chain", "patterns", "multiples", "circle", "look-around", "file", "format"],
)
def test_costly_and_impossible_schemas_are_refused_in_one_short_line(schema: dict[str, Any], says: str) -> None:
    wrong = refusal(json_grammar(schema))
    assert wrong is not None
    assert says in wrong
    assert len(wrong) < 400
    assert "\n" not in wrong
