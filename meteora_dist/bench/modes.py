"""What the measurements of one rank have in common: the modes, and the banks they run on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from meteora_dist.bench.synthetic import write_synthetic_bank
from meteora_dist.moe.routing import BASE, RoutingChoice, named

ROUND_ROBIN = 8
"""Adapters that the requests of a batch name in turn."""

Mode = tuple[RoutingChoice, ...]
"""The choices of a batch's requests, in turn."""


def modes_of(experts: int) -> dict[str, Mode]:
    """Every mode for a bank of that many experts; base comes first."""
    return {
        "base": (BASE,),
        "named": (named(0),),
        "named in turn": tuple(named(expert) for expert in range(min(ROUND_ROBIN, experts))),
        "auto top-1": (RoutingChoice(top_k=1),),
        "auto top-2": (RoutingChoice(top_k=2),),
    }


@contextmanager
def banks_of(base: Path, bank: Path, experts: Sequence[int], rank: int) -> Iterator[list[Path]]:
    """The bank to measure with, or random ones of the given sizes, which disappear in the end.

    Args:
        base: Folder of the base model.
        bank: Taken when ``experts`` is empty.
        experts: Sizes of random banks.
        rank: Of their experts.
    """
    with TemporaryDirectory(prefix="meteora-bench-") as folder:
        yield [write_synthetic_bank(Path(folder) / f"{size}-experts", base, size, rank).path for size in experts] or [
            bank
        ]
