"""Routed deltas of a rank that holds all experts, on the CPU: added where the outputs of the linears are.

One compiled operation a group routes and adds. Where it does not serve, ``RoutedGroup`` computes deltas to be added: it
is the twin, and knows ranks that share the experts, requests of several generations, shares by layer, and machines
without a compiler.

Shapes: T tokens, H input width, Y outputs of N linears side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from meteora_dist.moe.gate import choice_of
from meteora_dist.moe.layer import GroupState, RoutedGroup
from meteora_dist.moe.routing import StepRouting
from meteora_kernels.routed_lora import plan
from meteora_kernels.routed_lora.cpu import operators as cpu


class LocalDeltas:
    """Adds the deltas of one group of linears."""

    def __init__(self, group: RoutedGroup, columns: Sequence[slice], width: int) -> None:
        """Serves ``group``, whose linears have ``columns`` of ``width`` outputs."""
        self._group = group
        self._context = group.context
        self._columns, self._width = tuple(columns), width
        self._state: GroupState | None = None
        self._compiled: tuple[cpu.Group, ...] = ()

    def add_to(self, y_TY: Tensor, x_TH: Tensor) -> None:
        """Adds what the pass under way adds to the outputs ``y_TY`` for inputs ``x_TH``."""
        step = self._context.step
        if step is None:
            return
        group = self._group
        if self._state is not group.state:
            self._state, self._compiled = group.state, self._compile(group.state)
        if not self._compiled or not isinstance(step, StepRouting) or step.layers is not None:
            self._add_deltas(y_TY, x_TH)
            return
        choice = self._context.compiled
        if choice is None:
            tokens, uses_G = len(step.ids_TK), self._context.loads.counter()
            choice = cpu.Pass.of(choice_of(step), tokens, step.shares_TE, uses_G)
            self._context.compiled = choice
        cpu.add_routed_lora(y_TY, x_TH, self._compiled[step.index], choice)

    def _add_deltas(self, y_TY: Tensor, x_TH: Tensor) -> None:
        deltas = self._group(x_TH)
        assert deltas is not None, "the pass has a routing"
        for columns, delta_TO in zip(self._columns, deltas, strict=True):
            y_TY[:, columns] += delta_TO

    def _compile(self, state: GroupState) -> tuple[cpu.Group, ...]:
        """What C reads of a state, for each of its generations; nothing where it does not serve."""
        if not (self._group.local and plan.runs_compiled(state.stack)):
            return ()
        starts = [columns.start for columns in self._columns]
        local_G = state.targets_DG[0].contiguous()
        return tuple(
            cpu.Group.of(state.stack, self._width, starts, gate_PH, absent_N1, local_G)
            for gate_PH, absent_N1 in zip(state.gates, state.absent, strict=True)
        )
