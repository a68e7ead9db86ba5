"""The commands in a block of shell, as lists of words."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

_ENDS = frozenset({"|", "||", "&&", ";", "&", "(", ")"})
_LOOPS = frozenset({"for", "done"})
_REDIRECTIONS = frozenset({">", "<", ">>", ">&"})


def commands(block: str) -> Iterator[list[str]]:
    """Every simple command of a block, those in loops too: without assignments, comments and redirections.

    Commands inside ``$(...)`` stay part of a word.
    """
    for line in _lines(block):
        words: list[str] = []
        skip = False
        for word in [*_words(line), ";"]:
            if word in _ENDS:
                words = words[words[:1] == ["do"] :]
                if (words := _without_assignments(words)) and words[0] not in _LOOPS:
                    yield words
                words = []
            elif skip or word in _REDIRECTIONS:
                skip = not skip
            else:
                words.append(word)


def _lines(block: str) -> Iterator[str]:
    """Lines that end where a command may: not inside quotes, not after a backslash."""
    line = ""
    for part in block.splitlines():
        line += part[:-1] if part.endswith("\\") else f"{part}\n"
        if part.endswith("\\") or not _closed(line):
            continue
        yield line
        line = ""
    assert not line.strip(), f"quotes are left open: {line}"


def _closed(line: str) -> bool:
    try:
        _words(line)
    except ValueError:
        return False
    return True


def _words(line: str) -> list[str]:
    # A substitution is one word, whatever is in it.
    held = re.sub(r"\$\([^()]*\)", "SUBSTITUTED", line)
    lexer = shlex.shlex(held, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return list(lexer)


def _without_assignments(words: list[str]) -> list[str]:
    return words[1:] and _without_assignments(words[1:]) if words and re.match(r"\w+=", words[0]) else words
