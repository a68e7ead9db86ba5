"""Swaps rows of one size between the ranks of an exchange: what ``EqualDispatcher`` travels by.

Shapes: M = D * C rows, C for each of D ranks, of B numbers.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Swap(Protocol):
    """Rank d gets part d of what a rank gives, and part d of what a rank gets is what rank d gave it."""

    def __call__(self, outgoing_MB: Tensor) -> Tensor:
        """Gives ``outgoing_MB`` and returns what came, incoming_MB. Collective: the shape is the same on all ranks.

        Raises:
            RuntimeError: A rank is gone, or did not come in time.
        """
        ...


class GroupSwap:
    """The readable twin, for any device and any number of machines: an all-to-all of the process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        """Binds it to one rank of every expert-parallel group, in their order."""
        self._group = group

    def __call__(self, outgoing_MB: Tensor) -> Tensor:
        """See ``Swap``."""
        incoming_MB = torch.empty_like(outgoing_MB)
        dist.all_to_all_single(incoming_MB, outgoing_MB, group=self._group)
        return incoming_MB
