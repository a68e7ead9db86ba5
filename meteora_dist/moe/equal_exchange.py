"""A token exchange of few fixed shapes, for decoding.

Every rank sends each other rank one row for each of C tokens, wanted there or not. So nobody has to tell the others
how many rows will come, no number has to reach the host, and a CUDA graph can hold the whole exchange. In return rows
travel that nobody needs, which is cheap while C is small.

Shapes: T tokens of this rank, C tokens a rank makes room for, D ranks; the others as in ``dispatcher.py``, M = D * C.
"""

from __future__ import annotations

from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from meteora_dist.moe.dispatcher import (
    AllToAllDispatcher,
    Dispatched,
    Dispatcher,
    Exchange,
    local_of,
)
from meteora_dist.moe.routing import NO_EXPERT
from meteora_dist.moe.swap import Finish, Kind, Swap
from meteora_dist.moe.wire import ExchangeKind, Wire
from meteora_kernels.routed_lora import plan


class EqualDispatcher:
    """All ranks send and receive C rows each; C is a power of two, so that there are few shapes."""

    def __init__(self, swap: Swap, wire: Wire) -> None:
        """Binds the exchange.

        Args:
            swap: Of one rank of every expert-parallel group, in their order.
            wire: Counts what is sent.
        """
        self._swap = swap
        self._wire = wire
        self._capacity = 1

    @property
    def capacity(self) -> int:
        """C of the passes to come."""
        return self._capacity

    def room(self, *kinds: Kind) -> tuple[Tensor, ...]:
        """Memory to lay out what is given next; see ``Swap``."""
        return self._swap.room(*kinds)

    def expect(self, tokens: int) -> None:
        """Makes room for ``tokens`` tokens of every rank in the passes to come."""
        self._capacity = 1 << max(tokens - 1, 0).bit_length()

    def dispatch(self, x_TH: Tensor, slots_TNK: Tensor, weights_TNK: Tensor, targets_DG: Tensor) -> Dispatched:
        """See ``Dispatcher``.

        Raises:
            ValueError: There are more tokens than were expected.
        """
        tokens, capacity = x_TH.shape[0], self._capacity
        if tokens > capacity:
            raise ValueError(f"{tokens} tokens in an exchange that has room for {capacity}")
        outgoing = (_rows_by_kernel if plan.runs_kernels(x_TH.device) else _rows)(
            x_TH, slots_TNK, weights_TNK, targets_DG, capacity
        )
        incoming = self.give("dispatch", *outgoing)()
        rows_MH, ids_MNK, weights_MNK = (torch.cat(parts_C) for parts_C in incoming)
        every = (capacity,) * len(targets_DG)
        exchange = Exchange(tokens, slots_TNK.new_empty(0), every, every)
        return Dispatched(rows_MH, ids_MNK.long(), weights_MNK, exchange)

    def combine(self, deltas_MO: tuple[Tensor, ...], exchange: Exchange | None) -> tuple[Tensor, ...]:
        """See ``Dispatcher``; sums run in the order of the ranks."""
        assert exchange is not None, "combine needs the exchange of its own dispatch"
        outgoing_DCY = torch.cat(deltas_MO, dim=1).unflatten(0, (len(exchange.sent), -1))
        (parts_CY,) = self.give("combine", outgoing_DCY)()
        sums_TY = reduce(torch.add, parts_CY)[: exchange.tokens]
        return torch.split(sums_TY, [delta_MO.shape[1] for delta_MO in deltas_MO], dim=1)

    def give(self, kind: ExchangeKind, *outgoing_DC: Tensor) -> Finish:
        """Begins an exchange; see ``Swap``.

        Args:
            kind: As what it counts.
            outgoing_DC: What every rank gets. Of a dispatch: rows, local ids (int32) and weights; of a combine: deltas,
                those of all linears side by side.
        """
        ranks, capacity = outgoing_DC[0].shape[:2]
        sent = sum(values_DC.nbytes for values_DC in outgoing_DC)
        with self._wire.count(kind, capacity * (ranks - 1), sent // ranks * (ranks - 1)):
            finish = self._swap.give(*outgoing_DC)
        return self._wire.timed(kind, finish)


def _rows(
    x_TH: Tensor, slots_TNK: Tensor, weights_TNK: Tensor, targets_DG: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """C rows for each rank, their local ids there (int32) and weights."""
    if room := capacity - x_TH.shape[0]:
        x_TH, weights_TNK = pad(x_TH, (0, 0, 0, room)), pad(weights_TNK, (0, 0, 0, 0, 0, room))
        slots_TNK = pad(slots_TNK, (0, 0, 0, 0, 0, room), value=NO_EXPERT)
    local_DCNK = local_of(slots_TNK, targets_DG)
    held_DCNK = local_DCNK >= 0
    # Rows that nobody wants are zeros: they meet experts with weight 0, and must not bring a NaN there.
    rows_DCH = torch.where(held_DCNK.flatten(2).any(-1, keepdim=True), x_TH, 0)
    return rows_DCH, local_DCNK.int(), torch.where(held_DCNK, weights_TNK, 0)


def _rows_by_kernel(
    x_TH: Tensor, slots_TNK: Tensor, weights_TNK: Tensor, targets_DG: Tensor, capacity: int
) -> tuple[Tensor, ...]:
    """As ``_rows``, in one launch."""
    ranks = len(targets_DG)
    position_DC = torch.arange(ranks * capacity, device=x_TH.device).view(ranks, capacity)
    local_DTNK = local_of(slots_TNK, targets_DG)
    rows = plan.permute(x_TH, local_DTNK, weights_TNK, position_DC, ranks * capacity)
    return tuple(values.unflatten(0, (ranks, capacity)) for values in rows)


class AdaptiveDispatcher:
    """Exchanges few tokens in fixed shapes, and many as many as are wanted where they are wanted."""

    def __init__(self, group: dist.ProcessGroup, swap: Swap, wire: Wire, few: int | None = None) -> None:
        """Binds both exchanges.

        Args:
            group: One rank of every expert-parallel group, in their order.
            swap: Of the same ranks.
            wire: Counts what is sent.
            few: Most tokens of a rank that are exchanged in fixed shapes, equal on all ranks; by default the swap's.
        """
        self._few = swap.few_tokens if few is None else few
        self._equal = EqualDispatcher(swap, wire)
        self._exact = AllToAllDispatcher(group, wire)
        self._chosen: Dispatcher = self._exact

    def expect(self, tokens: int) -> None:
        """Chooses the exchange of the passes to come."""
        self._chosen = self._equal if tokens <= self._few else self._exact
        self._chosen.expect(tokens)

    @property
    def equal(self) -> EqualDispatcher | None:
        """The exchange of the passes to come if it is one of fixed shapes."""
        return self._chosen if isinstance(self._chosen, EqualDispatcher) else None

    def dispatch(self, x_TH: Tensor, slots_TNK: Tensor, weights_TNK: Tensor, targets_DG: Tensor) -> Dispatched:
        """See ``Dispatcher``."""
        return self._chosen.dispatch(x_TH, slots_TNK, weights_TNK, targets_DG)

    def combine(self, deltas_MO: tuple[Tensor, ...], exchange: Exchange | None) -> tuple[Tensor, ...]:
        """See ``Dispatcher``."""
        return self._chosen.combine(deltas_MO, exchange)
