"""Drawing the next token of one request: pure functions of its logits and its own tokens.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from meteora_dist.engine.request import Logprobs, Sampling

_CUT = float("-inf")
_COLDEST = 1e-4
"""Below, dividing by the temperature overflows, and the most probable token is drawn anyway."""


def adjusted(logits_V: Tensor, sampling: Sampling, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> Tensor:
    """Logits with penalties and biases, in fp32; the very tensor when there are none.

    Args:
        logits_V: Of the model.
        sampling: What to apply.
        prompt_ids: The tokens of the prompt.
        answer_ids: The tokens produced so far.
    """
    if sampling.repetition_penalty != 1:
        seen_V = _counts(logits_V, (*prompt_ids, *answer_ids)) > 0
        penalty = sampling.repetition_penalty
        logits_V = torch.where(seen_V, torch.where(logits_V > 0, logits_V / penalty, logits_V * penalty), logits_V)
    if sampling.presence_penalty or sampling.frequency_penalty:
        counts_V = _counts(logits_V, answer_ids)
        logits_V = logits_V - sampling.frequency_penalty * counts_V - sampling.presence_penalty * (counts_V > 0)
    if sampling.logit_bias:
        ids, values = zip(*sampling.logit_bias, strict=True)
        bias = torch.tensor(values, dtype=logits_V.dtype, device=logits_V.device)
        logits_V = logits_V.index_add(0, torch.tensor(ids, device=logits_V.device), bias)
    return logits_V


def draw_scores(logits_V: Tensor, sampling: Sampling, position: int) -> Tensor:
    """Scores whose argmax is the token drawn at ``position`` of its sequence.

    Greedy returns the logits. Otherwise the Gumbel-max trick: argmax of log-probabilities plus Gumbel noise draws
    from the distribution, and noise keyed by (seed, position) makes the draw independent of the batch around it.
    """
    if sampling.temperature < _COLDEST:
        return logits_V
    scaled_V = _cut(logits_V / sampling.temperature, sampling)
    generator = torch.Generator().manual_seed((sampling.seed * 1_000_003 + position) % 2**63)
    uniform_V = torch.rand(logits_V.shape[-1], generator=generator).clamp_min(torch.finfo(torch.float32).tiny)
    return scaled_V - torch.log(-torch.log(uniform_V)).to(scaled_V.device)


def logprobs_of(logits_V: Tensor, token: int, top: int) -> Logprobs:
    """The report on ``token``, with the ``top`` most probable tokens beside it; ties go to the smaller id."""
    log_V = torch.log_softmax(logits_V.float(), dim=-1)
    values, ids = log_V.sort(descending=True, stable=True)
    return Logprobs(float(log_V[token]), tuple(zip(ids[:top].tolist(), values[:top].tolist(), strict=True)))


def _cut(scaled_V: Tensor, sampling: Sampling) -> Tensor:
    """Minus infinity for the tokens that are not drawn from: by ``min_p``, then ``top_k``, then ``top_p``."""
    if sampling.min_p > 0:
        probabilities_V = scaled_V.softmax(-1)
        scaled_V = scaled_V.masked_fill(probabilities_V < sampling.min_p * probabilities_V.max(), _CUT)
    if not sampling.top_k and sampling.top_p >= 1:
        return scaled_V
    sorted_V, order_V = scaled_V.sort(descending=True, stable=True)
    beyond_V = torch.zeros_like(order_V, dtype=torch.bool)
    if sampling.top_k:
        beyond_V[sampling.top_k :] = True
        sorted_V = sorted_V.masked_fill(beyond_V, _CUT)
    if sampling.top_p < 1:
        probabilities_V = sorted_V.softmax(-1)
        # A token stays while the sum before it is below top_p.
        beyond_V |= probabilities_V.cumsum(-1) - probabilities_V >= sampling.top_p
        # The most probable one always does, even where top_p is 0 in fp32.
        beyond_V[0] = False
    return scaled_V.masked_fill(torch.zeros_like(beyond_V).scatter(0, order_V, beyond_V), _CUT)


def _counts(logits_V: Tensor, ids: Sequence[int]) -> Tensor:
    """How often each token of the vocabulary is among ``ids``, in the dtype of the logits."""
    counts_V = torch.bincount(torch.tensor(ids, dtype=torch.long), minlength=logits_V.shape[-1])
    return counts_V.to(logits_V.device, logits_V.dtype)
