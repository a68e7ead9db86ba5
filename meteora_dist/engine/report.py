"""What a rank says of itself while it runs: plain data for whoever runs or watches the service."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from meteora_dist.moe.wire import ExchangeKind


@dataclass(frozen=True, slots=True)
class RankReport:
    """The state of one rank. Counts are since it started.

    Attributes:
        expert_bytes: Memory of its part of the experts.
        gate_bytes: Memory of the gates of all live generations.
        loads: How often tokens of its own requests were routed to each adapter, by digest, once for every linear; ranks
            of a tp group count the same.
        linears: Routed linears of the newest bank generation.
        active: Requests in its batches.
        waiting: Requests that wait for room in them.
        cache_used: Part of its KV cache that is taken, 0 to 1.
        exchanged_bytes: Bytes handed over for other ranks, by kind of exchange.
        exchange_s: Seconds in these exchanges, waiting for the other ranks included.
    """

    expert_bytes: int
    gate_bytes: int
    loads: Mapping[str, int]
    linears: int
    active: int
    waiting: int
    cache_used: float
    exchanged_bytes: Mapping[ExchangeKind, int]
    exchange_s: Mapping[ExchangeKind, float]
