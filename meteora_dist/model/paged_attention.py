"""Attention over transformers' paged KV cache on the CPU, request by request.

transformers' own way there is one dense mask of all tokens of the pass against all cached ones, so that every request
is multiplied with the keys of every other. Here tokens that decode are padded to the longest request of their bucket
and go together; every prompt goes alone.

Shapes: T tokens of the pass, B requests of a bucket, L cached tokens of the longest of them, Q tokens of one request,
A attention heads, G key-value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.masking_utils import AttentionMaskInterface

NAME = "meteora_paged"
"""Of the attention, in transformers' registry."""
SPLIT_ROWS = 512
"""Padded rows that one more bucket has to save: reading as many takes as long as one more call."""


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens of the pass that one call attends for.

    Attributes:
        rows: Their places in the pass: an index for requests that decode, a slice for one prompt.
        reads: Where their keys are among those read from the cache; None where they are the tokens' own.
        requests: B; 1 for a prompt.
        mask: Added to the scores, broadcast to [B, A, Q, L]; None for a prompt that begins here, which is causal.
    """

    rows: Tensor | slice
    reads: slice | None
    requests: int
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What every layer of a pass does alike.

    Attributes:
        parts: They cover all tokens.
        read_index: Rows of the cache that the parts read, one after the other.
        write_index: Rows of the cache that the tokens' keys and values go to.
        cache: Keys and values of all requests.
    """

    parts: tuple[Part, ...]
    read_index: Tensor
    write_index: Tensor
    cache: PagedAttentionCache


def serves(config: PreTrainedConfig) -> bool:
    """Whether a model of that configuration can attend this way: each of its layers sees the whole sequence."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return kinds == {"full_attention"} and getattr(config, "sliding_window", None) is None


def use_paged_attention(model: PreTrainedModel) -> None:
    """Lets a model that ``serves`` attend this way in continuous batching, and only there."""
    AttentionInterface.register(NAME, paged_attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    model.set_attn_implementation(NAME)
    model.register_forward_pre_hook(_with_plan, with_kwargs=True)


def plan_attention(lengths: Sequence[int], seen: Sequence[int], read_index: Tensor) -> tuple[tuple[Part, ...], Tensor]:
    """The parts of a pass, and the rows of the cache they read.

    Args:
        lengths: Tokens of each request in the pass.
        seen: Tokens of each request in the cache after it, these included.
        read_index: [sum of ``seen``], rows of the cache that hold the requests' ``seen`` tokens, one request after the
            other; empty when no request has any from before.
    """
    token_at, cached_at = [0], [0]
    for length, total in zip(lengths, seen, strict=True):
        token_at.append(token_at[-1] + length)
        cached_at.append(cached_at[-1] + total)
    parts, reads, first = [], [], 0
    for bucket in _buckets([r for r, length in enumerate(lengths) if length < seen[r] and length == 1], seen):
        rows_BL, mask = _padded([cached_at[r] for r in bucket], [seen[r] for r in bucket])
        reads.append(read_index[rows_BL.flatten()])
        place = slice(first, first + rows_BL.numel())
        parts.append(Part(torch.tensor([token_at[r] for r in bucket]), place, len(bucket), mask))
        first = place.stop
    for r, (length, total) in enumerate(zip(lengths, seen, strict=True)):
        rows = slice(token_at[r], token_at[r + 1])
        if length == total:
            parts.append(Part(rows, None, 1, None))
        elif length > 1:
            reads.append(read_index[cached_at[r] : cached_at[r + 1]])
            parts.append(Part(rows, slice(first, first + total), 1, _later(length, total)))
            first += total
    return tuple(parts), torch.cat(reads) if reads else read_index[:0]


def attend(q_TAD: Tensor, k_TGD: Tensor, v_TGD: Tensor, layer: int, scaling: float, plan: AttentionPlan) -> Tensor:
    """Attention of a layer, o_TAD, after the tokens' keys and values were written to the cache."""
    allocator = plan.cache.layer_to_allocator[layer]
    k_RGD, v_RGD = allocator.update(k_TGD, v_TGD, layer, plan.read_index, plan.write_index)
    if len(plan.parts) == 1:
        return _attend_part(q_TAD, k_RGD, v_RGD, plan.parts[0], scaling)
    o_TAD = torch.empty_like(q_TAD)
    for part in plan.parts:
        keys, values = (
            (k_TGD[part.rows], v_TGD[part.rows]) if part.reads is None else (k_RGD[part.reads], v_RGD[part.reads])
        )
        o_TAD[part.rows] = _attend_part(q_TAD[part.rows], keys, values, part, scaling)
    return o_TAD


def paged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    attention_plan: AttentionPlan,
    **others: Any,
) -> tuple[Tensor, None]:
    """``attend`` as transformers calls it: query [1, A, T, D], key and value [1, G, T, D]; returns o [1, T, A, D]."""
    q_TAD, k_TGD, v_TGD = (states[0].transpose(0, 1) for states in (query, key, value))
    return attend(q_TAD, k_TGD, v_TGD, module.layer_idx, scaling, attention_plan)[None], None


def _attend_part(q_QAD: Tensor, k_KGD: Tensor, v_KGD: Tensor, part: Part, scaling: float) -> Tensor:
    requests = part.requests
    q, k, v = (states.unflatten(0, (requests, -1)).transpose(1, 2) for states in (q_QAD, k_KGD, v_KGD))
    grouped = q.shape[1] != k.shape[1]
    causal = part.reads is None
    o = scaled_dot_product_attention(q, k, v, part.mask, is_causal=causal, scale=scaling, enable_gqa=grouped)
    return o.transpose(1, 2).flatten(0, 1)


def _buckets(requests: list[int], seen: Sequence[int]) -> list[list[int]]:
    """Requests that decode, those of like length together."""
    ordered = sorted(requests, key=lambda r: -seen[r])
    buckets: list[list[int]] = []
    for place, r in enumerate(ordered):
        if not buckets or (seen[buckets[-1][0]] - seen[r]) * (len(ordered) - place) > SPLIT_ROWS:
            buckets.append([])
        buckets[-1].append(r)
    return [sorted(bucket) for bucket in buckets]


def _padded(first: list[int], totals: list[int]) -> tuple[Tensor, Tensor]:
    """Places of each request's cached tokens, [B, L], its own last one repeated at the end, and what masks these."""
    last_B1 = torch.tensor(totals)[:, None] - 1
    place_L = torch.arange(max(totals))
    mask_BL = torch.zeros(len(totals), max(totals)).masked_fill_(place_L > last_B1, float("-inf"))
    return torch.tensor(first)[:, None] + place_L.minimum(last_B1), mask_BL[:, None, None]


def _later(length: int, total: int) -> Tensor:
    """The causal mask of a prompt's later piece: its ``length`` tokens are the last of ``total``."""
    place_Q1 = torch.arange(total - length, total)[:, None]
    return torch.zeros(length, total).masked_fill_(torch.arange(total) > place_Q1, float("-inf"))


def _with_plan(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    ends: Mapping[str, Tensor] = kwargs["cu_seq_lens_k"]
    lengths = kwargs["cu_seq_lens_q"].diff().tolist()
    seen = ends["full_attention"].diff().tolist()
    parts, read_index = plan_attention(lengths, seen, kwargs["read_index"][0])
    plan = AttentionPlan(parts, read_index, kwargs["write_index"][0], kwargs["cache"])
    return args, {**kwargs, "attention_plan": plan}


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Each part brings its own."""
