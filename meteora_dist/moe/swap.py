"""Swaps parts of one size between the ranks of an exchange: what ``EqualDispatcher`` travels by.

Shapes: D ranks; what follows is the sender's choice.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from meteora_dist.moe.dispatcher import pack, unpack

Parts = tuple[Tensor, ...]
"""What each of D ranks gave to this one, in their order."""


class Swap(Protocol):
    """Every rank gives each other rank a part.

    Attributes:
        few_tokens: Most tokens of a rank for which parts of one size are worth their waste.
    """

    few_tokens: int

    def __call__(self, *outgoing_D: Tensor) -> tuple[Parts, ...]:
        """Gives ``tensor[d]`` of each tensor to rank d. Collective: shapes and dtypes are the same on all ranks.

        Args:
            outgoing_D: None of them empty.

        Returns:
            For each tensor the parts that came. They are good until the next call, and not to be written to.

        Raises:
            RuntimeError: A rank is gone, or did not come in time.
        """
        ...


class GroupSwap:
    """The readable twin, for any device and any number of machines: an all-to-all of the process group."""

    few_tokens = 64

    def __init__(self, group: dist.ProcessGroup) -> None:
        """Binds it to one rank of every expert-parallel group, in their order."""
        self._group = group

    def __call__(self, *outgoing_D: Tensor) -> tuple[Parts, ...]:
        """See ``Swap``."""
        outgoing_DB = pack(outgoing_D)
        incoming_DB = torch.empty_like(outgoing_DB)
        dist.all_to_all_single(incoming_DB, outgoing_DB, group=self._group)
        return tuple(values_D.unbind() for values_D in unpack(incoming_DB, outgoing_D))
