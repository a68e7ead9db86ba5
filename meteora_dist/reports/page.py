"""The page that all reports are: a single file of HTML and SVG, light or dark as its reader has it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""A browser loads nothing, whatever a model or a data set has put into the text."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fff; --faint: #6b6b6b; --line: #d9d9d9 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #16181c; --faint: #9a9a9a; --line: #3a3d44 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1180px;
  margin: 2rem auto; padding: 0 1.2rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem } .note { color: var(--faint) }
table { border-collapse: collapse } td, th { padding: .25rem .7rem; border-bottom: 1px solid var(--line);
  text-align: right; font-variant-numeric: tabular-nums } td:first-child, th:first-child { text-align: left }
.wide { overflow-x: auto } svg { max-width: none; margin: .6rem 1rem 0 0 } svg text { font: 12px system-ui, sans-serif;
  fill: var(--ink) } svg .title { font-weight: 600 } .axis { stroke: var(--line) }
.text { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line); border-radius: 6px;
  padding: .8rem 1rem; line-height: 1.9 }
.token { border-bottom: 3px solid; padding-bottom: 1px } .key { display: inline-block; margin-right: 1.2rem }
.key i { display: inline-block; width: .9em; height: .9em; margin-right: .35em; vertical-align: -.1em }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """The whole file.

    Args:
        title: Its heading.
        parts: HTML, one below the other.
    """
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>"
    )
    body = f"<h1>{escape(title)}</h1>\n" + "\n".join(parts)
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def section(title: str, *parts: str) -> str:
    """A heading and what stands below it; what is too wide scrolls."""
    return f"<h2>{escape(title)}</h2>" + "".join(f'<div class="wide">{part}</div>' for part in parts)


def note(text: str) -> str:
    """A paragraph of explanation."""
    return f'<p class="note">{escape(text)}</p>'


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; cells are shown as text."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    lines = ("".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
