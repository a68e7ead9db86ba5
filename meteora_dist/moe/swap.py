"""Swaps parts of one size between the ranks of an exchange: what ``EqualDispatcher`` travels by.

Shapes: D ranks; what follows is the sender's choice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from meteora_dist.moe.dispatcher import pack, unpack

Parts = tuple[Tensor, ...]
"""What each of D ranks gave to this one, in their order."""

Kind = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a tensor to be given; the first dimension is D."""

Finish = Callable[[], tuple[Parts, ...]]
"""Waits until a swap has ended; returns, for each tensor given, the parts that came."""


class Swap(Protocol):
    """Every rank gives each other rank a part.

    Attributes:
        few_tokens: Most tokens of a rank for which parts of one size are worth their waste.
    """

    few_tokens: int

    def room(self, *kinds: Kind) -> tuple[Tensor, ...]:
        """Memory of the host for what the next swap will give, uninitialised: from there it need not be copied.

        Good from the end of the last swap, and for the next one only.
        """
        ...

    def give(self, *outgoing_D: Tensor) -> Finish:
        """Gives ``tensor[d]`` of each tensor to rank d. Collective: shapes and dtypes are the same on all ranks.

        Args:
            outgoing_D: None of them empty.

        Returns:
            What ends the swap, to be called before the next begins. The parts are good until then, and not to be
            written to.

        Raises:
            RuntimeError: A rank is gone, or did not come in time; now or at the end.
        """
        ...


class GroupSwap:
    """The readable twin, for any device and any number of machines: an all-to-all of the process group."""

    few_tokens = 64

    def __init__(self, group: dist.ProcessGroup) -> None:
        """Binds it to one rank of every expert-parallel group, in their order."""
        self._group = group

    def room(self, *kinds: Kind) -> tuple[Tensor, ...]:
        """See ``Swap``: any memory is as good."""
        return tuple(torch.empty(shape, dtype=dtype) for shape, dtype in kinds)

    def give(self, *outgoing_D: Tensor) -> Finish:
        """See ``Swap``."""
        outgoing_DB = pack(outgoing_D)
        incoming_DB = torch.empty_like(outgoing_DB)
        work = dist.all_to_all_single(incoming_DB, outgoing_DB, group=self._group, async_op=True)

        def finish() -> tuple[Parts, ...]:
            if work is not None:
                work.wait()
            return tuple(values_D.unbind() for values_D in unpack(incoming_DB, outgoing_D))

        return finish
