"""Answers that must match a grammar: which tokens may come next, by llguidance.

Shapes: V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from meteora_dist.engine.grammar_trial import LIMITS, reason

_KEPT = 16
"""Compiled grammars that are kept: callers tend to send the same schema again."""


class GrammarFailed(Exception):
    """An answer cannot go on: its grammar allows nothing more, or is too complex to follow."""


class Grammars:
    """Makes matchers over the vocabulary of one model; its tokenizer is read when the first is asked for."""

    def __init__(self, model: Path, vocabulary: int, eos: Sequence[int]) -> None:
        """Remembers where the tokenizer is.

        Args:
            model: Folder of the checkpoint.
            vocabulary: V of the model, which may be more than its tokenizer knows.
            eos: Tokens that end a sequence.
        """
        self._model = model
        self._vocabulary = vocabulary
        self._eos = list(eos)
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._compiled = lru_cache(maxsize=_KEPT)(self._compile)

    def load(self) -> LLTokenizer:
        """The tokenizer, read once; for any thread."""
        with self._lock:
            if self._tokenizer is None:
                hf = AutoTokenizer.from_pretrained(self._model, local_files_only=True)
                assert isinstance(hf, PreTrainedTokenizerFast), "the replica has read it before, and checked that"
                self._tokenizer = from_tokenizer(hf, n_vocab=self._vocabulary, eos_token=self._eos)
            return self._tokenizer

    def compile(self, grammar: str) -> None:
        """Makes the first matcher of a grammar quick to have; for any thread, as it takes up to a second.

        Raises:
            GrammarFailed: The grammar is none, or too complex.
        """
        if wrong := reason(self._compiled(grammar)):
            raise GrammarFailed(f"the grammar of the answer cannot be used: {wrong}")

    def matcher(self, grammar: str, produced: Sequence[int]) -> Matcher:
        """A matcher of ``grammar`` that has seen the tokens ``produced`` already."""
        matcher = Matcher(self._compiled(grammar).deep_copy(), self._vocabulary)
        for token in produced:
            matcher.accept(token)
        return matcher

    def _compile(self, grammar: str) -> LLMatcher:
        return LLMatcher(self.load(), grammar, log_level=0, limits=LIMITS)


class Matcher:
    """Follows one answer through its grammar."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        """Starts before the first token."""
        self._matcher = matcher
        self._vocabulary = vocabulary

    def constrain(self, logits_V: Tensor) -> Tensor:
        """The logits with minus infinity for every token that may not come next.

        Raises:
            GrammarFailed: The grammar is too complex to go on with.
        """
        words = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise GrammarFailed(f"the grammar of the answer cannot be followed: {reason(self._matcher)}")
        allowed_V = np.unpackbits(words, bitorder="little")[: self._vocabulary].astype(bool)
        return logits_V.masked_fill(~torch.from_numpy(allowed_V).to(logits_V.device), float("-inf"))

    def accept(self, token: int) -> None:
        """Takes the token that was produced; what comes after the end of the sequence does not matter."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
