"""Drawing the next token, request by request.

Shapes: B tokens drawn in one pass, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.requests import FutureRequestState

from meteora_dist.engine.request import Sampling


def draw_scores(logits_V: Tensor, sampling: Sampling, position: int) -> Tensor:
    """Scores whose argmax is the token drawn at ``position`` of its sequence.

    Greedy returns the logits. Otherwise the Gumbel-max trick: argmax of log-probabilities plus Gumbel noise draws
    from the distribution, and noise keyed by (seed, position) makes the draw independent of the batch around it.
    """
    if sampling.temperature == 0:
        return logits_V
    scaled_V = logits_V / sampling.temperature
    if sampling.top_p < 1:
        sorted_V, order_V = scaled_V.sort(descending=True, stable=True)
        probabilities_V = sorted_V.softmax(-1)
        # A token stays while the sum before it is below top_p, so the most probable one always does.
        beyond_V = probabilities_V.cumsum(-1) - probabilities_V >= sampling.top_p
        scaled_V = scaled_V.masked_fill(torch.zeros_like(beyond_V).scatter(0, order_V, beyond_V), float("-inf"))
    generator = torch.Generator().manual_seed((sampling.seed * 1_000_003 + position) % 2**63)
    uniform_V = torch.rand(logits_V.shape[-1], generator=generator).clamp_min(torch.finfo(torch.float32).tiny)
    return scaled_V - torch.log(-torch.log(uniform_V))


class RequestSampler(ContinuousBatchingLogitsProcessorList):
    """Puts each request's own sampling where transformers keeps one list of processors for all."""

    def __init__(self) -> None:
        """Starts before the first batch."""
        super().__init__(LogitsProcessorList())
        self.do_processing = True
        self._rows: list[tuple[Sampling, int]] = []

    def check_kwargs(self, kwargs: dict[str, object]) -> None:
        """Accepts what the manager sends: the request itself."""

    def prepare_tensor_args(self, requests_in_batch: list[FutureRequestState], arg_storage: Tensor) -> Tensor:
        """Notes how each token of the coming pass is drawn, and at which position.

        The batch has advanced ``position_offset`` already: it counts all tokens before the drawn one, the same in
        prefill, split or not, and in decoding. So a request that was interrupted draws as if it had not been.
        """
        self._rows = [
            (future.state.logit_processor_kwargs["request"].sampling, future.state.position_offset)
            for future in requests_in_batch
            if future.has_new_token
        ]
        return arg_storage

    def __call__(self, input_ids: Tensor, scores: Tensor, logits_processor_args: Tensor) -> Tensor:
        """Scores_BV whose argmax is each request's token; rows beyond the noted ones belong to split prompts."""
        for row, (sampling, position) in enumerate(self._rows):
            if sampling.temperature > 0:
                scores[row] = draw_scores(scores[row], sampling, position)
        return scores
