"""Answers in the shape of OpenAI's objects, plain JSON values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from meteora_dist.serving.request import Answer, Ending, Piece, TokenTrace
from meteora_dist.serving.service import Prepared

Json = dict[str, object]

DONE = "data: [DONE]\n\n"


def event(value: Json) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


@dataclass(frozen=True, slots=True)
class Reply:
    """Writes the answers to one request.

    Attributes:
        prepared: The request.
        experts: Names, in the order of routing shares.
        chat: Whether it came in by the chat endpoint.
        include_usage: Whether a stream ends with a chunk of usage; its other chunks then say that they have none.
    """

    prepared: Prepared
    experts: Sequence[str]
    chat: bool
    include_usage: bool = False

    def whole(self, answer: Answer) -> Json:
        """The answer to a request that does not stream."""
        if self.chat:
            content: Json = {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
        else:
            content = {"text": answer.text}
        choice = self._choice(content, answer.ending, answer.tokens, answer.dominating)
        name = "chat.completion" if self.chat else "text_completion"
        return self._object(name, [choice]) | {"usage": usage(answer.ending)}

    def chunk(self, piece: Piece, first: bool) -> Json:
        """One chunk of a stream; the first one of a chat says who speaks."""
        if self.chat:
            content: Json = {"delta": ({"role": "assistant"} if first else {}) | {"content": piece.text}}
        else:
            content = {"text": piece.text}
        choice = self._choice(content, piece.ending, piece.tokens, piece.dominating)
        return self._object(self._chunk_name, [choice]) | ({"usage": None} if self.include_usage else {})

    def usage_chunk(self, ending: Ending) -> Json:
        """The chunk after the last one, for those who asked for usage."""
        return self._object(self._chunk_name, []) | {"usage": usage(ending)}

    @property
    def _chunk_name(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _object(self, name: str, choices: list[Json]) -> Json:
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.prepared.id}",
            "object": name,
            "created": self.prepared.created,
            "model": self.prepared.asked.model,
            "choices": choices,
        }

    def _choice(
        self, content: Json, ending: Ending | None, tokens: Sequence[TokenTrace], dominating: str | None
    ) -> Json:
        reason = ending.finish_reason if ending else None
        choice: Json = {"index": 0, **content, "logprobs": None, "finish_reason": reason}
        if self.prepared.asked.trace:
            shown = [{"token": token.token, "id": token.id, "shares": token.shares} for token in tokens]
            choice["routing"] = {"experts": self.experts, "dominating": dominating, "tokens": shown}
        return choice


def usage(ending: Ending) -> Json:
    """Token counts."""
    return {
        "prompt_tokens": ending.prompt_tokens,
        "completion_tokens": ending.completion_tokens,
        "total_tokens": ending.prompt_tokens + ending.completion_tokens,
    }
