"""Every message that docs/faq.md quotes is one the code can say."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [path for top in ("meteora_dist", "cluster", "kernels") for path in sorted((ROOT / top).rglob("*.py"))]
MESSAGES = re.findall(r"```text\n(.*?)\n```", (ROOT / "docs" / "faq.md").read_text())
FIXED = 14
"""Least characters of a message that are not filled in."""


def templates() -> list[re.Pattern[str]]:
    """The texts of the code, each a pattern with a hole for everything that is filled in."""
    nodes = [node for path in SOURCES for node in ast.walk(ast.parse(path.read_text()))]
    texts = [pieces for node in nodes if (pieces := list(parts(node))) and sum(map(len, pieces)) >= FIXED]
    return [re.compile(r"([^ ]+: |ep \d+ x tp \d+: )?" + ".+".join(map(re.escape, pieces))) for pieces in texts]


def parts(node: ast.AST) -> Iterator[str]:
    """What is fixed of a text, hole by hole."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        piece = ""
        for value in node.values:
            if isinstance(value, ast.Constant):
                piece += value.value
            else:
                yield piece
                piece = ""
        yield piece


@pytest.fixture(scope="module")
def known() -> list[re.Pattern[str]]:
    return templates()


def said(message: str, known: list[re.Pattern[str]]) -> bool:
    return any(pattern.fullmatch(message) for pattern in known)


def test_the_page_quotes_messages() -> None:
    assert len(MESSAGES) > 25
    assert len(set(MESSAGES)) == len(MESSAGES)


@pytest.mark.parametrize("message", MESSAGES, ids=range(len(MESSAGES)))
def test_the_code_says_it(message: str, known: list[re.Pattern[str]]) -> None:
    assert said(message, known), f"nothing in the code says: {message}"


@pytest.mark.parametrize("message", ["bank: is there already; remove it", "this API key is not known there"])
def test_other_words_are_noticed(message: str, known: list[re.Pattern[str]]) -> None:
    assert not said(message, known)
