"""Answers in the shape of OpenAI's objects, plain JSON values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from meteora_dist.serving.request import Answer, Piece, ScoredToken, TokenLogprobs, TokenTrace, Usage, usage_of
from meteora_dist.serving.service import Prepared

Json = dict[str, object]

DONE = "data: [DONE]\n\n"

_LAYER_DIGITS = 4


def event(value: Json) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


@dataclass(frozen=True, slots=True)
class Reply:
    """Writes the answers to one request.

    Attributes:
        prepared: The request.
        chat: Whether it came in by the chat endpoint.
        include_usage: Whether a stream ends with a chunk of usage; its other chunks then say that they have none.
    """

    prepared: Prepared
    chat: bool
    include_usage: bool = False

    def whole(self, answers: Sequence[Answer]) -> Json:
        """The answer to a request that does not stream."""
        choices = []
        for answer in answers:
            if self.chat:
                content: Json = {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
            else:
                content = {"text": answer.text}
            choices.append(self._choice(content, answer))
        name = "chat.completion" if self.chat else "text_completion"
        usage = usage_of(tuple(answer.ending for answer in answers), self.prepared.asked.n)
        return self._object(name, choices) | {"usage": _usage(usage)}

    def chunk(self, piece: Piece, first: bool) -> Json:
        """One chunk of a stream; the first one of a chat's choice says who speaks."""
        if self.chat:
            content: Json = {"delta": ({"role": "assistant"} if first else {}) | {"content": piece.text}}
        else:
            content = {"text": piece.text}
        choices = [self._choice(content, piece)]
        return self._object(self._chunk_name, choices) | ({"usage": None} if self.include_usage else {})

    def usage_chunk(self, usage: Usage) -> Json:
        """The chunk after the last one, for those who asked for usage."""
        return self._object(self._chunk_name, []) | {"usage": _usage(usage)}

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

    def _choice(self, content: Json, part: Answer | Piece) -> Json:
        reason = part.ending.finish_reason if part.ending else None
        choice: Json = {"index": part.index, **content, "logprobs": None, "finish_reason": reason}
        if self.prepared.asked.top_logprobs is not None:
            choice["logprobs"] = (_chat_logprobs if self.chat else _completion_logprobs)(part.logprobs)
        if self.prepared.asked.trace:
            shown = [_token_routing(token) for token in part.tokens]
            votes = {"votes": part.votes} if part.votes else {}
            choice["routing"] = {"experts": part.experts, "dominating": part.dominating, "tokens": shown, **votes}
        return choice


def _token_routing(token: TokenTrace) -> Json:
    shown: Json = {"token": token.token, "id": token.id, "shares": token.shares}
    if token.layers is None:
        return shown
    # Many numbers for one token: more digits than anybody looks at would make most of a stream's bytes.
    shares = [round(share, _LAYER_DIGITS) for _, share in token.layers]
    return shown | {"layer_experts": [expert for expert, _ in token.layers], "layer_shares": shares}


def _usage(usage: Usage) -> Json:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _chat_logprobs(tokens: Sequence[TokenLogprobs]) -> Json:
    def shown(token: ScoredToken) -> Json:
        return {"token": token.text, "logprob": token.logprob, "bytes": list(token.raw)}

    content = [shown(token.chosen) | {"top_logprobs": [shown(other) for other in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def _completion_logprobs(tokens: Sequence[TokenLogprobs]) -> Json:
    return {
        "tokens": [_name(token.chosen) for token in tokens],
        "token_logprobs": [token.chosen.logprob for token in tokens],
        "top_logprobs": [{_name(other): other.logprob for other in token.top} for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _name(token: ScoredToken) -> str:
    """The token's text; of a part of a character its bytes, because names are keys and must differ."""
    try:
        return token.raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.raw)
