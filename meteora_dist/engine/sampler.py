"""Each request's own sampling, where transformers keeps one list of processors for all.

Shapes: B tokens drawn in one pass, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState

from meteora_dist.engine.grammar import GrammarFailed, Grammars, Matcher
from meteora_dist.engine.request import GenerationRequest, Logprobs
from meteora_dist.engine.sampling import adjusted, draw_scores, logprobs_of


@dataclass(frozen=True, slots=True)
class _Row:
    """One token to be drawn.

    Attributes:
        request: Whose.
        position: Tokens of its sequence before the drawn one.
        tokens: These tokens.
    """

    request: GenerationRequest
    position: int
    tokens: list[int]

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_ids) - self.request.resumed

    @property
    def as_it_is(self) -> bool:
        """Whether the most probable token is all that is wanted."""
        sampling = self.request.sampling
        plain = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1, 0, 0)
        nothing_else = self.request.grammar is None and self.request.top_logprobs is None and not sampling.logit_bias
        return sampling.temperature == 0 and plain and nothing_else


class RequestSampler(ContinuousBatchingLogitsProcessorList):
    """Draws every request's token from its own sampling, grammar and tokens.

    Attributes:
        logprobs: Of the tokens drawn in the newest pass, by request.
        failures: Why requests of the newest pass cannot go on, by request.
    """

    def __init__(self, grammars: Grammars) -> None:
        """Starts before the first batch."""
        super().__init__(LogitsProcessorList())
        self.do_processing = True
        self.logprobs: dict[str, Logprobs] = {}
        self.failures: dict[str, str] = {}
        self._grammars = grammars
        self._matchers: dict[str, Matcher] = {}
        self._rows: list[_Row] = []

    def check_kwargs(self, kwargs: dict[str, object]) -> None:
        """Accepts what the manager sends: the request itself."""

    def prepare_tensor_args(self, requests_in_batch: list[FutureRequestState], arg_storage: Tensor) -> Tensor:
        """Notes how each token of the coming pass is drawn, and after which ones; ``arg_storage`` [rows, ...] stays.

        The batch has advanced ``position_offset`` already: it counts all tokens before the drawn one, the same in
        prefill, split or not, and in decoding. So a request that was interrupted draws as if it had not been.
        """
        self._rows = [_row(future.state) for future in requests_in_batch if future.has_new_token]
        # Requests leave without a word: a matcher is forgotten when its request is in a batch no more.
        self.logprobs.clear()
        self.failures.clear()
        live = {row.request.request_id for row in self._rows}
        self._matchers = {key: matcher for key, matcher in self._matchers.items() if key in live}
        return arg_storage

    def __call__(self, input_ids: Tensor, scores: Tensor, logits_processor_args: Tensor) -> Tensor:
        """Scores_BV whose argmax is each request's token; rows beyond the noted ones belong to split prompts."""
        for index, row in enumerate(self._rows):
            if row.as_it_is:
                continue
            try:
                self._draw(scores[index], row)
            except GrammarFailed as failure:
                # The others of the batch have nothing to do with it.
                self.failures[row.request.request_id] = str(failure)
        return scores

    def _draw(self, logits_V: Tensor, row: _Row) -> None:
        """Makes scores of one row's logits, in place."""
        request = row.request
        answer = row.tokens[row.prompt_tokens :]
        wanted_V = adjusted(logits_V, request.sampling, row.tokens[: row.prompt_tokens], answer)
        matcher = self._matcher(request, answer)
        if matcher is not None:
            wanted_V = matcher.constrain(wanted_V)
        drawn_V = draw_scores(wanted_V, request.sampling, row.position)
        if matcher is None and request.top_logprobs is None:
            logits_V.copy_(drawn_V)
            return
        token = int(drawn_V.argmax())
        if matcher is not None:
            matcher.accept(token)
        if request.top_logprobs is not None:
            self.logprobs[request.request_id] = logprobs_of(logits_V, token, request.top_logprobs)
        # What was noted and what is taken must be the same token, ties or not.
        logits_V.fill_(float("-inf"))
        logits_V[token] = 0

    def _matcher(self, request: GenerationRequest, answer: list[int]) -> Matcher | None:
        if request.grammar is None:
            return None
        if request.request_id not in self._matchers:
            self._matchers[request.request_id] = self._grammars.matcher(request.grammar, answer)
        return self._matchers[request.request_id]


def _row(state: RequestState) -> _Row:
    request = state.logit_processor_kwargs["request"]
    return _Row(request, state.position_offset, [*state.initial_tokens, *state.generated_tokens])
