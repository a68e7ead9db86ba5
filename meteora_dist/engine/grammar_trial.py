"""Compiles a grammar in a process of its own first: some grammars take hours, all memory, or the stack with them.

llguidance bounds the time of every step, but not of compilation: patterns that have to be told apart cost their number
squared, ``multipleOf`` an automaton of that many states, and a chain of references one call inside another.
"""

from __future__ import annotations

import resource
import subprocess
import sys

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

CPU_S = 1
"""Seconds of processor time a grammar may take; wide: that of 1,500 properties takes a quarter of one."""
MEMORY = 2**30
"""Bytes of address space its process may have."""
STACK = 2**20
"""Bytes of stack; threads of ours have 8 MiB, so what passes the trial cannot overflow them."""
LIMITS = LLParserLimits(max_lexer_states=30_000, verbose_errors=False)
"""For every matcher; a state takes 1 to 2 kB, and the words of an error may reach a caller."""
_WALL_S = 60.0
_MAX_REASON = 400
_NOTHING_FITS = "NoExtensionBias"


def refusal(grammar: str) -> str | None:
    """Why a grammar cannot be used, or None. Takes a process, so call it from a thread.

    Args:
        grammar: In llguidance's own notation.
    """
    command = [sys.executable, "-m", __name__]
    try:
        tried = subprocess.run(command, input=grammar.encode(), capture_output=True, timeout=_WALL_S, check=False)
    except subprocess.TimeoutExpired:
        return "it takes too long to compile"
    if tried.returncode < 0:
        return f"it takes more than {CPU_S} s or {MEMORY >> 20} MiB to compile, or its references are nested too deeply"
    if tried.returncode > 0:
        raise RuntimeError(f"a grammar could not be tried: {tried.stderr.decode(errors='replace')}")
    return tried.stdout.decode() or None


def reason(matcher: LLMatcher) -> str:
    """What a matcher says is wrong, in one line; empty when nothing is."""
    said = " ".join(matcher.get_error().removesuffix("<non-verbose/>").split())
    if said == _NOTHING_FITS:
        return "no text fits it"
    # It may repeat a pattern of any length, with what is wrong at the end.
    return said if len(said) <= _MAX_REASON else f"{said[: _MAX_REASON // 4]} ... {said[-_MAX_REASON // 2 :]}"


def main() -> None:
    """The other process: reads a grammar, takes the first step with it, and writes what is wrong."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_STACK, (STACK, STACK))
    # What takes long depends on the grammar, not on the vocabulary.
    matcher = LLMatcher(LLTokenizer("byte"), sys.stdin.read(), log_level=0, limits=LIMITS)
    matcher.compute_bitmask()
    sys.stdout.write(reason(matcher))


if __name__ == "__main__":
    main()
