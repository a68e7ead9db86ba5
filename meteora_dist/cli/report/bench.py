"""``meteora report bench``: what was measured, as a page of bars."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meteora_dist.bench.rows_page import read_rows, rows_page
from meteora_dist.errors import MeteoraError


def bench(
    file: Annotated[
        list[Path], typer.Argument(help="What `meteora bench ... --json FILE` wrote; several runs together.")
    ],
    out: Annotated[Path, typer.Option(help="The page to write, one HTML file that loads nothing.")] = Path(
        "bench.html"
    ),
) -> None:
    """Draw the rows of benchmarks: medians, and ranges where several rows were measured under equal conditions.

    Example: meteora report bench decode-1.json decode-2.json --out decode.html
    """
    rows = [row for one in file for row in read_rows(one)]
    try:
        out.write_text(rows_page(", ".join(one.stem for one in file), rows), encoding="utf-8")
    except OSError as cause:
        raise MeteoraError(f"{out} cannot be written: {cause.strerror}") from cause
    typer.echo(f"{out}: {len(rows)} rows")
