"""What options of several commands have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]


def named_path(text: str, option: str) -> tuple[str, Path]:
    """The name and the path in ``NAME=PATH``.

    Args:
        text: As the user wrote it.
        option: Where, for the message.

    Raises:
        typer.BadParameter: It is written otherwise.
    """
    name, sign, path = text.partition("=")
    if not (name and sign and path):
        raise typer.BadParameter(f"{text!r} must be NAME=FOLDER, such as chess=adapters/chess", param_hint=option)
    return name, Path(path)


def named_paths(texts: list[str], option: str) -> dict[str, Path]:
    """All of them, by name, in order; typer.BadParameter where a name comes twice as well."""
    pairs = [named_path(text, option) for text in texts]
    names = [name for name, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise typer.BadParameter(f"{twice[0]} is given more than once", param_hint=option)
    return dict(pairs)


def complete_expert(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of the bank's experts that the shell may put there; none where there is no bank to read."""
    try:
        manifest = json.loads((Path(ctx.params["bank"]) / "bank.json").read_text())
        names = [str(expert["name"]) for expert in manifest["experts"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [name for name in names if name.startswith(incomplete)]
