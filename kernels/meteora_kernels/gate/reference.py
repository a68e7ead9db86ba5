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

from meteora_kernels.gate.choice import NO_EXPERT, Chosen, GateChoice


def topk_softmax(logits_TE: Tensor, top_k: int, temperature_T1: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Top-k expert ids and their weights.

    Args:
        logits_TE: Gate logits, fp32.
        top_k: Experts a token uses, 1 to E.
        temperature_T1: Divides the chosen logits; broadcasts against them. None means 1.

    Returns:
        ids_TK (int64, by falling logit) and weights_TK (fp32, each row sums to 1).
    """
    if top_k == 1 and not logits_TE.requires_grad:
        ids_T1 = logits_TE.argmax(-1, keepdim=True)
        return ids_T1, torch.ones_like(ids_T1, dtype=logits_TE.dtype)
    # A stable sort, because torch.topk leaves the order of ties open.
    values_TE, order_TE = torch.sort(logits_TE, dim=-1, descending=True, stable=True)
    chosen_TK = values_TE[..., :top_k]
    if temperature_T1 is not None:
        chosen_TK = chosen_TK / temperature_T1
    return order_TE[..., :top_k], torch.softmax(chosen_TK, dim=-1)


def choose_reference(logits_TNE: Tensor | None, choice: GateChoice, tokens: int, linears: int) -> Chosen:
    """The experts of every token at every linear, one after the other.

    Args:
        logits_TNE: fp32; None where no token is gated.
        choice: What the pass says about it.
        tokens: T.
        linears: N.
    """
    slots_TNK = torch.full((tokens, linears, choice.slots), NO_EXPERT)
    local_TNK, weights_TNK = slots_TNK.clone(), torch.zeros(slots_TNK.shape)
    for t in range(tokens):
        for n in range(linears):
            if choice.absent_N1 is not None and choice.absent_N1[n, 0]:
                continue
            ids, weights_K = _choose_one(None if logits_TNE is None else logits_TNE[t, n], choice, t)
            for k, expert in enumerate(ids):
                if expert == NO_EXPERT:
                    continue
                slot = expert if choice.slot_E is None else int(choice.slot_E[expert])
                slots_TNK[t, n, k] = slot
                local_TNK[t, n, k] = slot if choice.local_G is None else int(choice.local_G[slot])
                weights_TNK[t, n, k] = weights_K[k]
    return Chosen(slots_TNK, local_TNK, weights_TNK)


def _choose_one(logits_E: Tensor | None, choice: GateChoice, t: int) -> tuple[list[int], Tensor]:
    """Expert ids of one token at one linear, and as many weights."""
    fixed = choice.auto_T is not None and not choice.auto_T[t]
    if logits_E is None or fixed:
        assert choice.ids_TK is not None, "tokens without gates name their experts"
        assert choice.weights_TK is not None, "and their weights"
        return choice.ids_TK[t].tolist(), choice.weights_TK[t]
    if choice.prototype_E is not None:
        logits_E = torch.where(choice.prototype_E, logits_E.abs(), logits_E)
    top_k = choice.slots if choice.top_k_T is None else int(choice.top_k_T[t])
    temperature_1 = None if choice.temperature_T1 is None else choice.temperature_T1[t]
    ids_K, weights_K = topk_softmax(logits_E, min(top_k, len(logits_E)), temperature_1)
    return ids_K.tolist(), weights_K
