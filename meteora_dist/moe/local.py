"""Routed deltas of a rank that holds all experts, on the CPU: added where the outputs of the linears are.

The fast way of ``RoutedGroup`` for one rank; its twin computes deltas, and sends rows to other ranks.

Shapes: T tokens, H input width, Y outputs of N linears side by side, K slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from meteora_dist.moe.dispatcher import local_of
from meteora_dist.moe.gate import GroupGates, route
from meteora_dist.moe.layer import GroupState, RoutedGroup
from meteora_dist.moe.routing import StepRouting
from meteora_kernels.routed_lora.plan import routed_lora
from meteora_kernels.routed_lora.sparse import PairRows, add_expert, add_routed_lora_sparse, pair_rows

FEW_TOKENS = 64
"""Most tokens that are computed each for itself; above, products over all tokens of the pass are faster."""
MANY_TOKENS = 512
"""Most tokens that are computed at once, so that what is needed in between does not grow with the pass."""


@dataclass(frozen=True, slots=True)
class _Known:
    """What follows from a state.

    Attributes:
        state: The state.
        gates: Its gates.
        where: The rows of its pairs, when its stack is packed.
        locals: The local id of every slot of the roster.
        in_order: Whether each is the slot's own number.
    """

    state: GroupState
    gates: GroupGates
    where: PairRows | None
    locals: list[int]
    in_order: bool


class LocalDeltas:
    """Adds the deltas of one group of linears."""

    def __init__(self, group: RoutedGroup, columns: Sequence[slice]) -> None:
        """Serves ``group``, whose linears have ``columns`` of the outputs."""
        self._group = group
        self._columns = tuple(columns)
        self._known: _Known | None = None

    def add_to(self, y_TY: Tensor, x_TH: Tensor) -> None:
        """Adds what the pass under way adds to the outputs ``y_TY`` for inputs ``x_TH``."""
        step = self._group.context.step
        if step is None:
            return
        if not self._group.local or not isinstance(step, StepRouting):
            deltas = self._group(x_TH)
            assert deltas is not None, "the pass has a routing"
            self._add(y_TY, deltas)
        elif step.only and step.shares_TE is None and self._group.state.absent[step.index] is None:
            self._add_only(y_TY, x_TH, step)
        elif x_TH.shape[0] <= MANY_TOKENS:
            self._add_routed(y_TY, x_TH, step)
        else:
            for first in range(0, x_TH.shape[0], MANY_TOKENS):
                rows = slice(first, first + MANY_TOKENS)
                self._add_routed(y_TY[rows], x_TH[rows], step.of(rows))

    def _add_only(self, y_TY: Tensor, x_TH: Tensor, step: StepRouting) -> None:
        """Adds the experts that all tokens use."""
        known = self._lookup()
        loads = self._group.context.loads
        loads.see_alike((slot for slot, _ in step.only), x_TH.shape[0] * len(self._columns))
        for slot, weight in step.only:
            expert = known.state.stack.experts[known.locals[slot]]
            add_expert(y_TY, self._columns, x_TH, expert, weight)

    def _add_routed(self, y_TY: Tensor, x_TH: Tensor, step: StepRouting) -> None:
        """Routes every token, and adds its experts."""
        known = self._lookup()
        state, where = known.state, known.where
        slots_TNK, weights_TNK = route(x_TH, known.gates, step)
        self._group.context.loads.see(slots_TNK)
        ids_TNK = slots_TNK if known.in_order else local_of(slots_TNK, state.targets_DG)[0]
        if where is not None and x_TH.shape[0] <= FEW_TOKENS and x_TH.dtype == torch.float32:
            add_routed_lora_sparse(y_TY, self._columns, x_TH, state.stack, where, ids_TNK, weights_TNK)
        else:
            self._add(y_TY, routed_lora(x_TH, state.stack, ids_TNK, weights_TNK))

    def _add(self, y_TY: Tensor, deltas: tuple[Tensor, ...]) -> None:
        for columns, delta_TO in zip(self._columns, deltas, strict=True):
            y_TY[:, columns] += delta_TO

    def _lookup(self) -> _Known:
        """What is known of the group's state, worked out once for each."""
        state = self._group.state
        if self._known is None or self._known.state is not state:
            self._known = _Known(
                state=state,
                gates=GroupGates(len(self._group.names), state.gates, state.absent),
                where=None if state.stack.packed is None else pair_rows(state.stack),
                locals=state.targets_DG[0].tolist(),
                in_order=torch.equal(state.targets_DG[0, :-1], torch.arange(state.stack.num_experts)),
            )
        return self._known
