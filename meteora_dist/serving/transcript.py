"""From produced tokens to pieces of an answer: text, stop texts, routing, log-probabilities and usage of one answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from meteora_dist.engine.request import FinishReason, GenerationRequest, TokenEvent
from meteora_dist.serving.request import Ending, Piece, ScoredToken, TokenLogprobs, TokenTrace
from meteora_dist.serving.stop import StopScanner
from meteora_dist.serving.tokenizer import TextTokenizer


class Transcript:
    """What one answer has so far."""

    def __init__(
        self,
        request: GenerationRequest,
        tokenizer: TextTokenizer,
        stops: Sequence[str],
        experts: tuple[str, ...],
        index: int = 0,
        votes: tuple[int, ...] = (),
    ) -> None:
        self._index = index
        self._prompt_tokens = len(request.prompt_ids)
        self._detokenizer = tokenizer.detokenizer(request.prompt_ids)
        self._raw: Callable[[int], bytes] = tokenizer.raw
        self._scanner = StopScanner(stops)
        self._experts = experts
        self._votes = votes
        self._produced = 0
        self._characters = 0
        self._sums = [0.0] * len(experts)

    def push(self, event: TokenEvent) -> Piece:
        """The piece that one more token makes."""
        self._produced += 1
        completed = self._detokenizer.push(event.token_id)
        logprobs = self._logprobs(event)
        self._characters += len(completed)
        text = self._scanner.push(completed)
        if event.finish_reason is not None and not self._scanner.stopped:
            text += self._scanner.push(self._detokenizer.flush())
            text += self._scanner.flush()
        return Piece(
            text,
            self._index,
            self._trace(event, completed),
            logprobs,
            self._experts,
            self._dominating(),
            self._ending(event.finish_reason),
            self._votes,
        )

    def _trace(self, event: TokenEvent, completed: str) -> tuple[TokenTrace, ...]:
        if event.shares is None:
            return ()
        self._sums = [total + share for total, share in zip(self._sums, event.shares, strict=True)]
        return (TokenTrace(completed, event.token_id, event.shares, event.layers),)

    def _logprobs(self, event: TokenEvent) -> tuple[TokenLogprobs, ...]:
        if event.logprobs is None:
            return ()
        top = tuple(self._scored(token, logprob) for token, logprob in event.logprobs.top)
        return (TokenLogprobs(self._scored(event.token_id, event.logprobs.token), top, self._characters),)

    def _scored(self, token: int, logprob: float) -> ScoredToken:
        raw = self._raw(token)
        return ScoredToken(token, raw.decode(errors="replace"), raw, logprob)

    def _dominating(self) -> str | None:
        largest = max(self._sums, default=0.0)
        return self._experts[self._sums.index(largest)] if largest > 0 else None

    def _ending(self, engine_says: FinishReason | None) -> Ending | None:
        reason: FinishReason | None = "stop" if self._scanner.stopped else engine_says
        return Ending(reason, self._prompt_tokens, self._produced) if reason is not None else None
