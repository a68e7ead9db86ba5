"""A replica whose ranks can be harmed from outside."""

from __future__ import annotations

from typing import ClassVar

from meteora_dist.bench.chaos_ranks import FragileRank
from meteora_dist.serving.ranks import RankActor
from meteora_dist.serving.server import Server


class FragileServer(Server):
    """A replica with such ranks."""

    member: ClassVar[type[RankActor]] = FragileRank
