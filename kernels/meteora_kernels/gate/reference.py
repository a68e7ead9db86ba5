"""Gate: top-k experts of every token and their weights.

    ids = topk(logits, K), ties to the smaller id
    weights = softmax(logits[ids] / temperature)

For K = 1 the weight is 1. At temperature 1 the weights equal softmax over all experts, cut to the top k and
renormalised (MeteoRA, arXiv 2405.13053).

Shapes: T tokens, E experts, K = ``top_k`` slots; leading dimensions beyond T are free.
"""

from __future__ import annotations

import torch
from torch import Tensor


def topk_softmax(logits_TE: Tensor, top_k: int, temperature_T1: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Top-k expert ids and their weights.

    Args:
        logits_TE: Gate logits, fp32.
        top_k: Experts a token uses, 1 to E.
        temperature_T1: Divides the chosen logits; broadcasts against them. None means 1.

    Returns:
        ids_TK (int64, by falling logit) and weights_TK (fp32, each row sums to 1).
    """
    # A stable sort, because torch.topk leaves the order of ties open.
    values_TE, order_TE = torch.sort(logits_TE, dim=-1, descending=True, stable=True)
    chosen_TK = values_TE[..., :top_k]
    if temperature_T1 is not None:
        chosen_TK = chosen_TK / temperature_T1
    return order_TE[..., :top_k], torch.softmax(chosen_TK, dim=-1)
