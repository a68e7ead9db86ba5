"""The ranges of a request's values, checked where both protocols meet."""

from __future__ import annotations

from meteora_dist.engine.request import Sampling
from meteora_dist.errors import InvalidRequest
from meteora_dist.serving.request import TextRequest, TokenIds

MAX_TEMPERATURE = 2.0
MAX_TOP_LOGPROBS = 20
MAX_ANSWERS = 32
"""Most answers of one call: prompts times n."""
MAX_PENALTY = 2.0
MIN_REPETITION = 0.01
MAX_REPETITION = 100.0
"""Beyond these, logits leave the range of fp32."""
MAX_INTEGER = 2**31 - 1
MIN_SEED, MAX_SEED = -(2**63), 2**63 - 1
MAX_BIAS = 100.0
MAX_BIASES = 300


def check_ranges(request: TextRequest) -> None:
    """Raises InvalidRequest, naming the field, for a value out of its range."""
    _check_answers(request)
    seed = request.seed
    _demand(seed is None or MIN_SEED <= seed <= MAX_SEED, "seed", seed, "a 64-bit integer")
    _demand(all(request.stop), "stop", "an empty text", "a text that can appear in the answer")
    top = request.top_logprobs
    _demand(top is None or 0 <= top <= MAX_TOP_LOGPROBS, "top_logprobs", top, f"between 0 and {MAX_TOP_LOGPROBS}")
    if request.grammar is not None and request.ignore_eos:
        raise InvalidRequest("ignore_eos and response_format exclude each other: a JSON text has an end", "ignore_eos")
    _check_sampling(request.sampling)


def _check_answers(request: TextRequest) -> None:
    _demand(request.max_tokens is None or request.max_tokens >= 1, "max_tokens", request.max_tokens, "at least 1")
    _demand(request.n >= 1, "n", request.n, "at least 1")
    _demand(request.prompts != (), "prompt", "an empty list", "at least one prompt")
    _demand(() not in request.prompts, "messages", "an empty list", "at least one message")
    for prompt in request.prompts:
        if isinstance(prompt, TokenIds) and (wrong := [token for token in prompt.ids if not 0 <= token <= MAX_INTEGER]):
            raise InvalidRequest(f"prompt has {wrong[0]}, which is no token id", "prompt")
    answers = len(request.prompts) * request.n
    what = f"{request.n}, for {len(request.prompts)} prompts"
    _demand(answers <= MAX_ANSWERS, "n", what, f"such that a call has at most {MAX_ANSWERS} answers")


def _check_sampling(sampling: Sampling) -> None:
    warm = 0 <= sampling.temperature <= MAX_TEMPERATURE
    _demand(warm, "temperature", sampling.temperature, f"between 0 and {MAX_TEMPERATURE:g}")
    _demand(0 < sampling.top_p <= 1, "top_p", sampling.top_p, "above 0 and at most 1")
    _demand(0 <= sampling.top_k <= MAX_INTEGER, "top_k", sampling.top_k, "at least 1, or 0 for all tokens")
    _demand(0 <= sampling.min_p <= 1, "min_p", sampling.min_p, "between 0 and 1")
    for param in ("presence_penalty", "frequency_penalty"):
        value = getattr(sampling, param)
        _demand(abs(value) <= MAX_PENALTY, param, value, f"between -{MAX_PENALTY:g} and {MAX_PENALTY:g}")
    repetition = sampling.repetition_penalty
    wanted = f"between {MIN_REPETITION:g} and {MAX_REPETITION:g}"
    _demand(MIN_REPETITION <= repetition <= MAX_REPETITION, "repetition_penalty", repetition, wanted)
    biases = sampling.logit_bias
    _demand(len(biases) <= MAX_BIASES, "logit_bias", f"for {len(biases)} tokens", f"for at most {MAX_BIASES}")
    for token, value in biases:
        wanted = f"between -{MAX_BIAS:g} and {MAX_BIAS:g}"
        _demand(abs(value) <= MAX_BIAS, "logit_bias", f"{value} for token {token}", wanted)


def _demand(holds: bool, param: str, value: object, wanted: str) -> None:
    if not holds:
        raise InvalidRequest(f"{param} is {value}, but must be {wanted}", param)
