"""docs/cli.md lists exactly the commands there are, and what it tells to type can be typed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from meteora_dist.cli.main import COMMANDS, build_app

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
TYPED = re.findall(r"^meteora (.+?)(?: +#.*)?$", PAGE, flags=re.MULTILINE)


def test_the_table_is_the_list_of_commands() -> None:
    listed = re.findall(r"^\| `meteora ([a-z -]+)` \|", PAGE, flags=re.MULTILINE)
    assert listed == [" ".join(command.words) for command in COMMANDS]


@pytest.mark.parametrize("line", TYPED)
def test_what_it_tells_to_type_is_understood(line: str) -> None:
    words = shlex.split(line)
    found = typer.main.get_command(build_app(words))
    while hasattr(found, "commands"):
        found = found.commands[words.pop(0)]
    found.make_context("meteora", words)


def test_it_tells_something() -> None:
    assert len(TYPED) >= 5
