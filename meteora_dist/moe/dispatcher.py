"""Dispatch and combine: tokens travel to the ranks that own their experts, and the deltas travel back.

Shapes: T tokens of this rank, M rows received from all ranks, N linears that share one input, K slots, H input width,
O_n output width of linear n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from meteora_dist.moe.placement import Placement
from meteora_dist.moe.routing import NO_EXPERT


@dataclass(frozen=True, slots=True)
class Exchange:
    """What ``combine`` must know about the dispatch it undoes.

    Attributes:
        tokens: T.
        token_S: Token of this rank behind each row sent, ordered by destination; a token going to several ranks
            stands once for each.
        sent: Rows sent to each rank.
        received: Rows received from each rank.
    """

    tokens: int
    token_S: Tensor
    sent: tuple[int, ...]
    received: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Dispatched:
    """Rows for this rank's experts.

    Attributes:
        rows_MH: Their inputs.
        local_ids_MNK: Index among this rank's experts, ``NO_EXPERT`` for an empty slot or another rank's expert.
        weights_MNK: Gate weights, fp32; 0 wherever the id is ``NO_EXPERT``.
        exchange: Hand it to ``combine``; None where nothing travelled.
    """

    rows_MH: Tensor
    local_ids_MNK: Tensor
    weights_MNK: Tensor
    exchange: Exchange | None


class Dispatcher(Protocol):
    """Brings rows to experts and deltas back.

    Both calls are collective: every rank makes them in the same order, with equal N and K.
    """

    def dispatch(self, x_TH: Tensor, ids_TNK: Tensor, weights_TNK: Tensor) -> Dispatched:
        """Sends every token to each rank that owns one of its experts, once."""
        ...

    def combine(self, deltas_MO: tuple[Tensor, ...], exchange: Exchange | None) -> tuple[Tensor, ...]:
        """Returns the weighted sums to their tokens and adds them up: N tensors [T, O_n]."""
        ...


class LocalDispatcher:
    """The readable reference, for one rank that owns every expert: nothing travels."""

    def dispatch(self, x_TH: Tensor, ids_TNK: Tensor, weights_TNK: Tensor) -> Dispatched:
        """Returns its arguments: expert ids are local ids."""
        return Dispatched(x_TH, ids_TNK, weights_TNK, None)

    def combine(self, deltas_MO: tuple[Tensor, ...], exchange: Exchange | None) -> tuple[Tensor, ...]:
        """Returns the deltas as they are."""
        return deltas_MO


class AllToAllDispatcher:
    """Token exchange over a process group: one all-to-all of rows there, one of deltas back."""

    def __init__(self, placement: Placement, group: dist.ProcessGroup) -> None:
        """Binds the placement to the group whose rank i holds ``placement.slots_of(i)``."""
        if placement.groups != group.size():
            raise ValueError(f"a placement on {placement.groups} groups cannot run in a group of {group.size()} ranks")
        self._group = group
        self._target_E = torch.tensor(placement.targets(group.rank()))
        self._local_E = torch.tensor(placement.local_ids(group.rank(), NO_EXPERT))

    def dispatch(self, x_TH: Tensor, ids_TNK: Tensor, weights_TNK: Tensor) -> Dispatched:
        """See ``Dispatcher``; rows, ids and weights travel in one message."""
        tokens = x_TH.shape[0]
        target_TNK = torch.where(ids_TNK >= 0, self._target_E[ids_TNK.clamp_min(0)], NO_EXPERT)
        wanted_DT = (target_TNK.flatten(1)[None] == torch.arange(self._group.size())[:, None, None]).any(-1)
        rank_S, token_S = wanted_DT.nonzero().unbind(1)
        # A rank is told only of the experts it computes: of a replicated one, other ranks hold copies too.
        ids_SNK = torch.where(target_TNK[token_S] == rank_S[:, None, None], ids_TNK[token_S], NO_EXPERT)
        sent_D = wanted_DT.sum(1)
        received_D = torch.empty_like(sent_D)
        dist.all_to_all_single(received_D, sent_D, group=self._group)
        sent, received = tuple(sent_D.tolist()), tuple(received_D.tolist())

        payload_SB = torch.cat(
            [_bytes(x_TH[token_S]), _bytes(ids_SNK.int()), _bytes(weights_TNK[token_S].float())], dim=1
        )
        payload_MB = payload_SB.new_empty(sum(received), payload_SB.shape[1])
        dist.all_to_all_single(payload_MB, payload_SB, list(received), list(sent), group=self._group)

        slots = ids_TNK.shape[1:]
        width, meta = x_TH.shape[1] * x_TH.element_size(), slots.numel() * 4
        rows_MB, ids_MB, weights_MB = payload_MB.split([width, meta, meta], dim=1)
        ids_MNK = ids_MB.contiguous().view(torch.int32).unflatten(1, slots).long()
        weights_MNK = weights_MB.contiguous().view(torch.float32).unflatten(1, slots)
        mine_MNK = ids_MNK >= 0
        return Dispatched(
            rows_MH=rows_MB.contiguous().view(x_TH.dtype),
            local_ids_MNK=torch.where(mine_MNK, self._local_E[ids_MNK.clamp_min(0)], NO_EXPERT),
            weights_MNK=torch.where(mine_MNK, weights_MNK, 0.0),
            exchange=Exchange(tokens, token_S, sent, received),
        )

    def combine(self, deltas_MO: tuple[Tensor, ...], exchange: Exchange | None) -> tuple[Tensor, ...]:
        """See ``Dispatcher``; sums run in the order of the ranks."""
        assert exchange is not None, "combine needs the exchange of its own dispatch"
        widths = [delta_MO.shape[1] for delta_MO in deltas_MO]
        outgoing_MO = torch.cat(deltas_MO, dim=1)
        incoming_SO = outgoing_MO.new_empty(sum(exchange.sent), outgoing_MO.shape[1])
        dist.all_to_all_single(
            incoming_SO, outgoing_MO, list(exchange.sent), list(exchange.received), group=self._group
        )
        combined_TO = incoming_SO.new_zeros(exchange.tokens, incoming_SO.shape[1])
        combined_TO.index_add_(0, exchange.token_S, incoming_SO)
        return torch.split(combined_TO, widths, dim=1)


def _bytes(values: Tensor) -> Tensor:
    """Any rows as rows of bytes."""
    return values.flatten(1).contiguous().view(torch.uint8)
