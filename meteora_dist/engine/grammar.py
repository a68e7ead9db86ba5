"""Answers that must match a grammar: which tokens may come next, by llguidance.

Shapes: V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast


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

    def load(self) -> LLTokenizer:
        """The tokenizer, read once; for any thread."""
        with self._lock:
            if self._tokenizer is None:
                hf = AutoTokenizer.from_pretrained(self._model, local_files_only=True)
                assert isinstance(hf, PreTrainedTokenizerFast), "the replica has read it before, and checked that"
                self._tokenizer = from_tokenizer(hf, n_vocab=self._vocabulary, eos_token=self._eos)
            return self._tokenizer

    def matcher(self, grammar: str, produced: Sequence[int]) -> Matcher:
        """A matcher of ``grammar`` that has seen the tokens ``produced`` already."""
        matcher = Matcher(LLMatcher(self.load(), grammar), self._vocabulary)
        for token in produced:
            matcher.accept(token)
        return matcher


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
            raise GrammarFailed(f"the grammar of the answer cannot be followed: {self._matcher.get_error()}")
        allowed_V = np.unpackbits(words, bitorder="little")[: self._vocabulary].astype(bool)
        return logits_V.masked_fill(~torch.from_numpy(allowed_V).to(logits_V.device), float("-inf"))

    def accept(self, token: int) -> None:
        """Takes the token that was produced; what comes after the end of the sequence does not matter."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
