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
from meteora_kernels.routed_lora.dense import add_routed_lora_dense, row_weights
from meteora_kernels.routed_lora.plan import routed_lora
from meteora_kernels.routed_lora.sparse import PairRows, add_expert, add_routed_lora_sparse, pair_rows, worthwhile

FEW_TOKENS = 64
"""Most tokens that may be computed each for itself; above, products over all tokens of the pass are faster."""
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
        alike: Equal in groups in which the same choice gives every row of A the same weight.
    """

    state: GroupState
    gates: GroupGates
    where: PairRows | None
    locals: list[int]
    in_order: bool
    alike: str

    def local_ids(self, slots_TNK: Tensor) -> Tensor:
        """The local ids of slots of the roster."""
        return slots_TNK if self.in_order else local_of(slots_TNK, self.state.targets_DG)[0]


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
            add_expert(self._outputs(y_TY), x_TH, expert, weight)

    def _add_routed(self, y_TY: Tensor, x_TH: Tensor, step: StepRouting) -> None:
        """Routes every token, and adds its experts."""
        known, few = self._lookup(), x_TH.shape[0] <= FEW_TOKENS
        stack = known.state.stack
        if stack.packed is None:
            self._add(y_TY, routed_lora(x_TH, stack, *self._route(x_TH, step, known)))
        elif few and x_TH.dtype == torch.float32 and worthwhile(stack, step.slots):
            assert known.where is not None, "it is looked up for packed stacks"
            chosen = self._route(x_TH, step, known)
            add_routed_lora_sparse(self._outputs(y_TY), x_TH, stack, known.where, *chosen)
        else:
            weights_TW1 = self._row_weights(x_TH, step, known, few)
            add_routed_lora_dense(self._outputs(y_TY), x_TH, stack, weights_TW1)

    def _route(self, x_TH: Tensor, step: StepRouting, known: _Known) -> tuple[Tensor, Tensor]:
        """Local ids of the experts and their weights, each [T, N, K]; counts the load."""
        slots_TNK, weights_TNK = route(x_TH, known.gates, step)
        self._group.context.loads.see(slots_TNK)
        return known.local_ids(slots_TNK), weights_TNK

    def _row_weights(self, x_TH: Tensor, step: StepRouting, known: _Known, few: bool) -> Tensor:
        """See ``row_weights``; groups that are alike share them where the requests name all experts."""
        stack, context = known.state.stack, self._group.context
        if step.gated or step.shares_TE is not None or not few:
            return row_weights(stack, *self._route(x_TH, step, known)).to(x_TH.dtype)
        shared = context.shared.get(known.alike)
        if shared is None:
            slots_TNK, weights_TNK = route(x_TH, known.gates, step)
            weights_TW1 = row_weights(stack, known.local_ids(slots_TNK), weights_TNK).to(x_TH.dtype)
            shared = context.shared[known.alike] = slots_TNK, weights_TW1
        context.loads.see(shared[0])
        return shared[1]

    def _outputs(self, y_TY: Tensor) -> Sequence[Tensor]:
        """The columns of every linear."""
        if self._columns == (slice(0, y_TY.shape[1]),):
            return (y_TY,)
        return [y_TY[:, columns] for columns in self._columns]

    def _add(self, y_TY: Tensor, deltas: tuple[Tensor, ...]) -> None:
        for y_TO, delta_TO in zip(self._outputs(y_TY), deltas, strict=True):
            y_TO += delta_TO

    def _lookup(self) -> _Known:
        """What is known of the group's state, worked out once for each."""
        state = self._group.state
        if self._known is None or self._known.state is not state:
            stack, local_G = state.stack, state.targets_DG[0].tolist()
            ranks = [[part and part.rank for part in expert] for expert in stack.experts]
            absent = [None if absent_N1 is None else absent_N1.tolist() for absent_N1 in state.absent]
            self._known = _Known(
                state=state,
                gates=GroupGates(len(self._group.names), state.gates, state.absent, layer=self._group.shape.layer),
                where=None if stack.packed is None else pair_rows(stack),
                locals=local_G,
                in_order=local_G[:-1] == list(range(stack.num_experts)),
                alike=str((ranks, stack.scales_NE.tolist(), absent, local_G)),
            )
        return self._known
