"""Text to tokens, and tokens back to text as they arrive."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from jinja2 import TemplateError
from llguidance import LLTokenizer
from llguidance.hf import from_tokenizer
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from meteora_dist.errors import InvalidRequest, ModelError
from meteora_dist.serving.request import Prompt, TokenIds, Turn

_CONTEXT_TOKENS = 8
"""Prompt tokens a decoder needs to know whether the first new token starts a word."""
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextTokenizer:
    """The tokenizer and the chat template of one base model. Safe to use from several threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._chat = tokenizer
        self._tokens: Tokenizer = tokenizer.backend_tokenizer

    @classmethod
    def open(cls, model: Path) -> TextTokenizer:
        """Reads the tokenizer of a checkpoint folder.

        Raises:
            ModelError: There is none, or only one without a ``tokenizer.json``.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ModelError(model, f"its tokenizer cannot be read: {error}") from error
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ModelError(model, "its tokenizer is not in the tokenizer.json format")
        return cls(tokenizer)

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a text, or of a conversation up to where the assistant's next turn starts.

        Raises:
            InvalidRequest: The model has no chat template, or the template refuses the conversation.
        """
        if isinstance(prompt, TokenIds):
            return prompt.ids
        if isinstance(prompt, str):
            return tuple(self._tokens.encode(prompt).ids)
        # The template writes every special token itself.
        return tuple(self._tokens.encode(self._rendered(prompt), add_special_tokens=False).ids)

    def raw(self, token_id: int) -> bytes:
        """The bytes of one token, of which a character may take several."""
        return self._bytes.decode_bytes([token_id])

    def detokenizer(self, prompt_ids: Sequence[int]) -> Detokenizer:
        """A decoder for the tokens that follow ``prompt_ids``."""
        context = prompt_ids[-_CONTEXT_TOKENS:]
        # A stream would take a prompt that ends so for an unfinished character, and repeat it.
        if self._tokens.decode(context, skip_special_tokens=True).endswith(_INCOMPLETE):
            context = ()
        return Detokenizer(self._tokens, context)

    @cached_property
    def _bytes(self) -> LLTokenizer:
        # Takes a moment, and few ask for it.
        return from_tokenizer(self._chat)

    def _rendered(self, turns: Sequence[Turn]) -> str:
        if self._chat.chat_template is None:
            raise InvalidRequest("this model has no chat template: send a text prompt instead", "messages")
        conversation = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            text = self._chat.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise InvalidRequest(f"the model's chat template refuses this conversation: {error}", "messages") from error
        except Exception as error:
            # A template is a program of the model's: what it stumbles over is not for callers to read.
            raise InvalidRequest(
                "the model's chat template cannot be used for this conversation", "messages"
            ) from error
        assert isinstance(text, str), "without tokenize a template renders text"
        return text


class Detokenizer:
    """Text of a growing list of tokens, never half a character; special tokens have no text."""

    def __init__(self, tokens: Tokenizer, context: Sequence[int]) -> None:
        self._tokens = tokens
        self._stream = DecodeStream(ids=list(context), skip_special_tokens=True)
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes; empty inside a character."""
        self._pending.append(token_id)
        text: str | None = self._stream.step(self._tokens, token_id)
        if text:
            self._pending.clear()
        return text or ""

    def flush(self) -> str:
        """What is still to come when no token follows: a character that stays incomplete is dropped."""
        pending, self._pending = self._pending, []
        text: str = self._tokens.decode(pending, skip_special_tokens=True)
        return text.rstrip(_INCOMPLETE)
