"""Dispatch and combine: tokens travel to the ranks that own their experts, and the deltas travel back.

The ranks of an exchange are one of every expert-parallel group; each computes the slots its group holds.

Shapes: T tokens of this rank, M rows received from all ranks, S rows sent, N linears that share one input, K expert
slots a token, H input width, O_n output width of linear n, D ranks, G slots of the roster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from meteora_dist.moe.placement import Placement
from meteora_dist.moe.routing import NO_EXPERT
from meteora_dist.moe.wire import ExchangeKind, Wire
from meteora_kernels.routed_lora import plan


@dataclass(frozen=True, slots=True)
class Exchange:
    """What ``combine`` must know about the dispatch it undoes.

    Attributes:
        tokens: T.
        token_S: Token of this rank behind each row sent, ordered by destination; a token going to several ranks
            stands once for each.
        sent: Rows sent to each rank.
        received: Rows received from each rank.
        position_DT: Which of the rows sent to each rank is which token's, -1 for none; None where no kernels run.
    """

    tokens: int
    token_S: Tensor
    sent: tuple[int, ...]
    received: tuple[int, ...]
    position_DT: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Dispatched:
    """Rows for this rank's experts.

    Attributes:
        rows_MH: Their inputs.
        local_ids_MNK: Index among this rank's experts, ``NO_EXPERT`` for what this rank does not compute.
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

    def dispatch(self, x_TH: Tensor, slots_TNK: Tensor, weights_TNK: Tensor, targets_DG: Tensor) -> Dispatched:
        """Sends every token, once, to each rank that shall compute one of its slots.

        Args:
            x_TH: Inputs of the N linears.
            slots_TNK: Slots of the roster, ``NO_EXPERT`` where unused.
            weights_TNK: Their weights, fp32.
            targets_DG: For tokens of this rank, see ``targets_of``.
        """
        ...

    def combine(self, deltas_MO: tuple[Tensor, ...], exchange: Exchange | None) -> tuple[Tensor, ...]:
        """Returns the weighted sums to their tokens and adds them up: N tensors [T, O_n]."""
        ...

    def expect(self, tokens: int) -> None:
        """Announces the next passes: ``tokens`` is the most any rank brings, and all ranks are told the same."""
        ...


def targets_of(placement: Placement, sender: int, device: torch.device | str = "cpu") -> Tensor:
    """Who computes what for tokens of group ``sender``: targets_DG, int64, with one more column.

    ``targets_DG[d, g]`` is the local id of slot g on group d if d shall compute it, and ``NO_EXPERT`` in all other
    rows: a replicated slot acts once. The last column, which index ``NO_EXPERT`` finds, is ``NO_EXPERT`` as well.
    """
    target_G = torch.tensor(placement.targets(sender), dtype=torch.long)
    groups = range(placement.groups)
    local_DG = torch.tensor([placement.local_ids(group, NO_EXPERT) for group in groups], dtype=torch.long)
    targets_DG = torch.where(target_G == torch.arange(placement.groups)[:, None], local_DG, NO_EXPERT)
    return pad(targets_DG, (0, 1), value=NO_EXPERT).to(device)


class LocalDispatcher:
    """The readable reference, for one group that holds every slot: nothing travels."""

    def dispatch(self, x_TH: Tensor, slots_TNK: Tensor, weights_TNK: Tensor, targets_DG: Tensor) -> Dispatched:
        """Returns its arguments, slots as local ids."""
        return Dispatched(x_TH, local_of(slots_TNK, targets_DG)[0], weights_TNK, None)

    def combine(self, deltas_MO: tuple[Tensor, ...], exchange: Exchange | None) -> tuple[Tensor, ...]:
        """Returns the deltas as they are."""
        return deltas_MO

    def expect(self, tokens: int) -> None:
        """Nothing depends on it."""


class AllToAllDispatcher:
    """Token exchange over a process group: one all-to-all of rows there, one of deltas back."""

    def __init__(self, group: dist.ProcessGroup, wire: Wire) -> None:
        """Binds the exchange to a process group.

        Args:
            group: One rank of every expert-parallel group, in their order.
            wire: Counts what is sent.
        """
        self._group = group
        self._rank = group.rank()
        self._wire = wire

    def dispatch(self, x_TH: Tensor, slots_TNK: Tensor, weights_TNK: Tensor, targets_DG: Tensor) -> Dispatched:
        """See ``Dispatcher``; rows, ids and weights travel in one message."""
        local_DTNK = local_of(slots_TNK, targets_DG)
        wanted_DT = (local_DTNK >= 0).flatten(2).any(-1)
        rank_S, token_S = wanted_DT.nonzero().unbind(1)
        position_DT = None
        if plan.runs_kernels(x_TH.device):
            places_DT = wanted_DT.flatten().cumsum(0).view_as(wanted_DT) - 1
            position_DT = torch.where(wanted_DT, places_DT, -1)
            outgoing_S = plan.permute(x_TH, local_DTNK, weights_TNK, position_DT, len(token_S))
        else:
            ids_SNK = local_DTNK[rank_S, token_S]
            weights_SNK = torch.where(ids_SNK >= 0, weights_TNK[token_S].float(), 0.0)
            outgoing_S = x_TH[token_S], ids_SNK.int(), weights_SNK

        sent, received = self._sizes(wanted_DT.sum(1))
        payload_MB = self._exchange("dispatch", pack(outgoing_S), sent, received)
        rows_MH, ids_MNK, weights_MNK = unpack(payload_MB, outgoing_S)
        exchange = Exchange(x_TH.shape[0], token_S, sent, received, position_DT)
        return Dispatched(rows_MH, ids_MNK.long(), weights_MNK, exchange)

    def combine(self, deltas_MO: tuple[Tensor, ...], exchange: Exchange | None) -> tuple[Tensor, ...]:
        """See ``Dispatcher``; sums run in the order of the ranks."""
        assert exchange is not None, "combine needs the exchange of its own dispatch"
        widths = [delta_MO.shape[1] for delta_MO in deltas_MO]
        incoming_SO = self._exchange("combine", torch.cat(deltas_MO, dim=1), exchange.received, exchange.sent)
        if exchange.position_DT is not None:
            return torch.split(plan.unpermute(incoming_SO, exchange.position_DT, exchange.tokens), widths, dim=1)
        combined_TO = incoming_SO.new_zeros(exchange.tokens, incoming_SO.shape[1])
        # Rank by rank, because a token occurs once a rank: on a GPU a sum over repeated rows has no fixed order.
        for tokens, rows in zip(exchange.token_S.split(exchange.sent), incoming_SO.split(exchange.sent), strict=True):
            combined_TO.index_add_(0, tokens, rows)
        return torch.split(combined_TO, widths, dim=1)

    def expect(self, tokens: int) -> None:
        """Nothing depends on it: ranks tell each other what they send."""

    def _sizes(self, sent_D: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        received_D = torch.empty_like(sent_D)
        others = sent_D.numel() - 1
        with self._wire.count("sizes", others, others * sent_D.element_size()):
            dist.all_to_all_single(received_D, sent_D, group=self._group)
        sent, received = torch.stack([sent_D, received_D]).tolist()
        return tuple(sent), tuple(received)

    def _exchange(
        self, kind: ExchangeKind, rows_SB: Tensor, sent: tuple[int, ...], received: tuple[int, ...]
    ) -> Tensor:
        incoming_MB = rows_SB.new_empty(sum(received), rows_SB.shape[1])
        remote = sum(sent) - sent[self._rank]
        with self._wire.count(kind, remote, remote * rows_SB.shape[1] * rows_SB.element_size()):
            dist.all_to_all_single(incoming_MB, rows_SB, list(received), list(sent), group=self._group)
        return incoming_MB


def local_of(slots_TNK: Tensor, targets_DG: Tensor) -> Tensor:
    """The local id of every slot at each rank that shall compute it, ``NO_EXPERT`` elsewhere: [D, T, N, K]."""
    return targets_DG[:, slots_TNK]


def pack(values: Sequence[Tensor]) -> Tensor:
    """Tensors of equally many rows side by side, as rows of bytes."""
    return torch.cat([rows.flatten(1).contiguous().view(torch.uint8) for rows in values], dim=1)


def unpack(payload_MB: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """What ``pack`` made of tensors with rows like those of ``like``."""
    widths = [rows.shape[1:].numel() * rows.element_size() for rows in like]
    parts = zip(payload_MB.split(widths, dim=1), like, strict=True)
    return [part_MB.contiguous().view(rows.dtype).unflatten(1, rows.shape[1:]) for part_MB, rows in parts]
