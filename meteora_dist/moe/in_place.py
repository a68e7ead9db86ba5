"""Routed deltas on the CPU, added where the outputs of the linears are, by compiled operations.

A rank that holds all experts routes, computes and adds in one operation. Ranks that share them send rows off before the
base's product and take in the others' after it; what is between two exchanges is one operation each. Where these do not
serve, ``RoutedGroup`` computes deltas to be added: it is the twin, speaks the same language in exchanges, and knows
requests of several generations, shares by layer, and machines without a compiler.

Shapes: as in ``equal_exchange.py``; Y outputs of N linears side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from meteora_dist.moe.equal_exchange import AdaptiveDispatcher, EqualDispatcher
from meteora_dist.moe.gate import choice_of
from meteora_dist.moe.layer import GroupState, RoutedGroup
from meteora_dist.moe.routing import StepRouting
from meteora_kernels.permute.cpu import operators as rows
from meteora_kernels.routed_lora import plan
from meteora_kernels.routed_lora.cpu import operators as cpu

AddTo = Callable[[Tensor], None]
"""Adds deltas to the outputs y_TY that it is given."""


class DeltasInPlace:
    """Adds the deltas of one group of linears."""

    def __init__(self, group: RoutedGroup, columns: Sequence[slice], width: int) -> None:
        """Serves ``group``, whose linears have ``columns`` of ``width`` outputs."""
        self._group = group
        self._context = group.context
        self._columns, self._width = tuple(columns), width
        self._state: GroupState | None = None
        self._compiled: tuple[cpu.Group, ...] = ()

    def begin(self, x_TH: Tensor) -> AddTo:
        """Begins what the pass under way adds to outputs for inputs ``x_TH``; call what it returns once."""
        step = self._context.step
        if step is None:
            return _add_nothing
        group = self._group
        if self._state is not group.state:
            self._state, self._compiled = group.state, self._compile(group.state)
        if not self._compiled or not isinstance(step, StepRouting) or step.layers is not None:
            return lambda y_TY: self._add_deltas(y_TY, x_TH)
        compiled, choice = self._compiled[step.index], self._choice(step)
        if group.local:
            return lambda y_TY: cpu.add_routed_lora(y_TY, x_TH, compiled, choice)
        equal = _equal_exchange(group)
        if equal is None:
            return lambda y_TY: self._add_deltas(y_TY, x_TH)
        return _exchanged(x_TH, group.state, compiled, choice, equal)

    def _choice(self, step: StepRouting) -> cpu.Pass:
        """The same for all groups of a pass."""
        if self._context.compiled is None:
            tokens, uses_G = len(step.ids_TK), self._context.loads.counter()
            self._context.compiled = cpu.Pass.of(choice_of(step), tokens, step.shares_TE, uses_G)
        return self._context.compiled

    def _add_deltas(self, y_TY: Tensor, x_TH: Tensor) -> None:
        deltas = self._group(x_TH)
        assert deltas is not None, "the pass has a routing"
        for columns, delta_TO in zip(self._columns, deltas, strict=True):
            y_TY[:, columns] += delta_TO

    def _compile(self, state: GroupState) -> tuple[cpu.Group, ...]:
        """What C reads of a state, for each of its generations; nothing where it does not serve."""
        group = self._group
        if not (plan.runs_compiled(state.stack) and (group.local or rows.available())):
            return ()
        starts = [columns.start for columns in self._columns]
        local_G = state.targets_DG[0].contiguous()
        return tuple(
            cpu.Group.of(state.stack, self._width, starts, gate_PH, absent_N1, local_G)
            for gate_PH, absent_N1 in zip(state.gates, state.absent, strict=True)
        )


def _exchanged(x_TH: Tensor, state: GroupState, compiled: cpu.Group, choice: cpu.Pass, equal: EqualDispatcher) -> AddTo:
    """Sends rows to the ranks of their experts; at the end, serves what came and adds what comes back."""
    stack = state.stack
    places_DC = len(state.targets_DG), equal.capacity
    slots_DCNK = *places_DC, stack.num_linears, choice.slots
    outgoing_DC = equal.room(
        ((*places_DC, stack.in_features), x_TH.dtype), (slots_DCNK, torch.int32), (slots_DCNK, torch.float32)
    )
    rows.lay_out(outgoing_DC, x_TH, compiled, choice, state.targets_DG)
    receive = equal.give("dispatch", *outgoing_DC)

    def add_to(y_TY: Tensor) -> None:
        rows_MH, ids_MNK, weights_MNK = rows.join(*receive())
        (deltas_DCY,) = equal.room(((*places_DC, sum(stack.out_features)), x_TH.dtype))
        cpu.add_side_by_side(deltas_DCY.zero_(), rows_MH, stack, ids_MNK, weights_MNK)
        (parts_CY,) = equal.give("combine", deltas_DCY)()
        rows.add_returned(y_TY, parts_CY, compiled)

    return add_to


def _equal_exchange(group: RoutedGroup) -> EqualDispatcher | None:
    return group.dispatcher.equal if isinstance(group.dispatcher, AdaptiveDispatcher) else None


def _add_nothing(_: Tensor) -> None:
    """A pass of the base model."""
