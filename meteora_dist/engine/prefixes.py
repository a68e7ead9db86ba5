"""Prefixes of prompts that requests share in the KV cache.

transformers finds them by a hash of their tokens. Keys and values depend on the experts as well, so tokens are hashed
together with the request's routing and its generation of the bank.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from hashlib import blake2b
from typing import Any

from transformers.generation.continuous_batching.cache import PagedAttentionCache

from meteora_dist.engine.request import GenerationRequest


def salt_prefixes(cache: PagedAttentionCache, request_of: Callable[[str], GenerationRequest]) -> None:
    """Lets only requests of one routing and generation share pages of ``cache``.

    Args:
        cache: Of a batch processor; it may share blocks.
        request_of: The request with an id, waiting or active.
    """

    def salted(given: Callable[..., Any], request_id: str, tokens: Sequence[int], *others: int) -> Any:
        words = _words(_origin(request_of(request_id)))
        return given(request_id, [token ^ words[place % len(words)] for place, token in enumerate(tokens)], *others)

    # Instances, not classes: another cache of this process may be unsalted.
    vars(cache)["search_prefix_match"] = partial(salted, cache.search_prefix_match)
    for allocator in cache.cache_allocators.values():
        vars(allocator)["mark_complete_blocks"] = partial(salted, allocator.mark_complete_blocks)


def _origin(request: GenerationRequest) -> str:
    """What keys and values depend on beside tokens; a vote has to see all of its prompt, and shares with nobody."""
    alone = request.request_id if request.vote else ""
    return repr((request.routing, request.generation, alone))


@lru_cache(maxsize=1024)
def _words(origin: str) -> array[int]:
    """Sixteen 32-bit words that stand for it."""
    return array("i", blake2b(origin.encode()).digest())
