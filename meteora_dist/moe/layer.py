"""Routed linears: a base linear plus what its routed experts add.

Linears that read the same input form a group, which routes and exchanges once for all of them.
Shapes: T tokens, H input width, N linears of the group, E experts, K slots,
G slots of the roster, D expert-parallel groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from meteora_dist.moe.dispatcher import Dispatched, Dispatcher, LocalDispatcher
from meteora_dist.moe.gate import GroupGates, choice_of, route
from meteora_dist.moe.load import SlotLoads
from meteora_dist.moe.routing import NO_EXPERT, PassRouting, StepRouting
from meteora_dist.moe.sharding import GroupShape
from meteora_dist.moe.wire import ExchangeKind
from meteora_kernels.routed_lora import plan
from meteora_kernels.routed_lora.cpu import operators as cpu
from meteora_kernels.routed_lora.stack import LoraStack

AddUp = Callable[[Tensor, ExchangeKind], Tensor]
"""Adds up what every rank of a tp group has of a tensor, rows first; returns the sum."""


class RoutingContext:
    """Tells every routed linear of a model how the pass under way is routed; None means the plain base model.

    Attributes:
        step: The routing of the pass.
        loads: Counts the slots that passes use.
        compiled: The routing as compiled code reads it, once a group has asked for it.
    """

    def __init__(self, adapters: Sequence[str] = ()) -> None:
        """Starts outside any pass; ``adapters`` are the digests of those in the slots."""
        self.step: PassRouting | None = None
        self.loads = SlotLoads(adapters)
        self.compiled: cpu.Pass | None = None

    @contextmanager
    def routed(self, step: PassRouting | None) -> Iterator[None]:
        """Routes the passes run inside by ``step``."""
        self.step = step
        try:
            yield
        finally:
            self.step = None
            self.compiled = None
            self.loads.settle()


@dataclass(frozen=True, slots=True)
class GroupState:
    """All of a group that may change while it serves. It is replaced whole, between two passes.

    A new state shares what stays with the old one, which serves on until ``RoutedGroup.state`` is assigned.

    Attributes:
        gates: Stacked gates, fp32, of every live generation in the order of ``LiveGeneration.index``; see
            ``meteora_dist.moe.gate.gate_logits``.
        absent: For each of them, which linears no expert of the generation adapts, bool [N, 1]; None for none.
        targets_DG: Which group computes which slot of the roster for this rank's tokens; see
            ``meteora_dist.moe.dispatcher.targets_of``.
        stack: The experts of this rank's group by local id, as far as this rank holds them.
    """

    gates: tuple[Tensor, ...]
    absent: tuple[Tensor | None, ...]
    targets_DG: Tensor
    stack: LoraStack


class RoutedGroup(nn.Module):
    """The gates and this rank's experts of N linears that share one input.

    Attributes:
        shape: The linears, and this rank's part of them.
        dispatcher: Brings rows to experts.
        state: What it routes and computes with; assign another one between two passes, on all ranks between the same.
    """

    def __init__(
        self,
        shape: GroupShape,
        state: GroupState,
        dispatcher: Dispatcher,
        context: RoutingContext,
        add_up: AddUp | None = None,
    ) -> None:
        """Joins gates and experts.

        Args:
            shape: Of the linears.
            state: To begin with.
            dispatcher: Brings rows to experts.
            context: Says how the pass is routed.
            add_up: Adds up the parts of the tp group's ranks; None for a group of one.
        """
        super().__init__()
        self.shape = shape
        self.state = state
        self.dispatcher = dispatcher
        self._context = context
        self._add_up = add_up

    @property
    def context(self) -> RoutingContext:
        """How the pass under way is routed."""
        return self._context

    @property
    def local(self) -> bool:
        """Whether this rank computes all of it: nothing travels, and nothing is added up."""
        return self._add_up is None and isinstance(self.dispatcher, LocalDispatcher)

    @property
    def names(self) -> tuple[str, ...]:
        """Module paths of the N linears, in the order the block calls them."""
        return self.shape.names

    def forward(self, x_TH: Tensor) -> tuple[Tensor, ...] | None:
        """The N deltas [T, O_n] for the pass under way; None when it uses no expert."""
        step = self._context.step
        if step is None:
            return None
        if isinstance(step, StepRouting) and self._fuses(x_TH, step):
            return self._fused(x_TH, step)
        state, layer = self.state, self.shape.layer
        gates = GroupGates(len(self.names), state.gates, state.absent, self._complete_logits, layer)
        slots_TNK, weights_TNK = route(x_TH, gates, step)
        self._context.loads.see(slots_TNK)
        return self.deltas(x_TH, slots_TNK, weights_TNK)

    def _fuses(self, x_TH: Tensor, step: StepRouting) -> bool:
        """Whether kernels may route and compute at once: nothing travels in between, and nobody wants to look in."""
        learns = torch.is_grad_enabled() and (x_TH.requires_grad or any(g.requires_grad for g in self.state.gates))
        return plan.runs_kernels(x_TH.device) and self.local and not learns and step.shares_TE is None

    def _fused(self, x_TH: Tensor, step: StepRouting) -> tuple[Tensor, ...]:
        state = self.state
        choice = choice_of(step, state.absent[step.index], state.targets_DG[0])
        chosen, deltas = plan.fused(x_TH, state.gates[step.index], choice, state.stack)
        self._context.loads.see(chosen.slots_TNK)
        return deltas

    def serve(self, slots: int) -> None:
        """Serves this rank's experts to the others' pass of K = ``slots``, bringing no rows of its own."""
        stack = self.state.stack
        device = stack.scales_NE.device
        slots_TNK = torch.full((0, len(self.names), slots), NO_EXPERT, device=device)
        x_TH = torch.empty(0, stack.in_features, dtype=stack.dtype, device=device)
        self.deltas(x_TH, slots_TNK, slots_TNK.float())

    def deltas(self, x_TH: Tensor, slots_TNK: Tensor, weights_TNK: Tensor) -> tuple[Tensor, ...]:
        """The N deltas [T, O_n] of slots that are chosen already.

        Args:
            x_TH: The linears' shared input.
            slots_TNK: Slots of the roster, ``NO_EXPERT`` where unused.
            weights_TNK: Their weights, fp32.
        """
        state = self.state
        sent = self.dispatcher.dispatch(x_TH, slots_TNK, weights_TNK, state.targets_DG)
        return self.dispatcher.combine(self._deltas(sent, state.stack), sent.exchange)

    def _deltas(self, sent: Dispatched, stack: LoraStack) -> tuple[Tensor, ...]:
        if self._add_up is None:
            return plan.routed_lora(sent.rows_MH, stack, sent.local_ids_MNK, sent.weights_MNK)
        # All that the ranks of a tp group tell each other of their experts: vectors as wide as a rank.
        shrunk_MNKR = self._add_up(plan.shrink(sent.rows_MH, stack, sent.local_ids_MNK), "rank_space")
        return plan.expand(shrunk_MNKR, stack, sent.local_ids_MNK, sent.weights_MNK)

    def _complete_logits(self, logits_TNE: Tensor) -> Tensor:
        """Gates that see a slice of the input give parts of logits; all ranks need the same, for the same choice."""
        partial = self._add_up is not None and self.shape.split == "inputs"
        return self._add_up(logits_TNE, "gate_logits") if partial and self._add_up else logits_TNE


class DeltaSource(Protocol):
    """What linears with a shared input get their deltas from: a ``RoutedGroup``, or what stands before one."""

    @property
    def names(self) -> tuple[str, ...]:
        """See ``RoutedGroup``."""

    def __call__(self, x_TH: Tensor) -> tuple[Tensor, ...] | None:
        """See ``RoutedGroup.forward``."""


class SharedDeltas:
    """Hands a group's deltas to its linears: the first to be called computes them for all."""

    def __init__(self, group: DeltaSource) -> None:
        """Serves the linears of ``group``."""
        self.group = group
        self._input: Tensor | None = None
        self._deltas: tuple[Tensor, ...] | None = None

    def take(self, index: int, x: Tensor) -> Tensor | None:
        """The delta of linear ``index`` for input x [..., H], or None when the pass uses no expert.

        Raises:
            RuntimeError: The block called its linears in another order, or not with one shared input.
        """
        if index == 0:
            self._input, self._deltas = x, self.group(x.reshape(-1, x.shape[-1]))
        elif self._input is None or not _same(x, self._input):
            names = self.group.names
            raise RuntimeError(f"{names[index]} must be called right after {names[0]}, with the very same input")
        deltas = self._deltas
        if index + 1 == len(self.group.names):
            self._input = self._deltas = None
        return None if deltas is None else deltas[index]


def _same(x: Tensor, other: Tensor) -> bool:
    """Whether two live tensors are one; DeepSpeed hands every module a view of its own."""
    return x is other or (x.data_ptr() == other.data_ptr() and x.shape == other.shape)


class RoutedLinear(nn.Module):
    """A base linear with routed experts: ``y = x W^T + sum_k w_k s_e (x A_e^T) B_e^T`` (MeteoRA, arXiv 2405.13053)."""

    def __init__(self, base_layer: nn.Linear, shared: SharedDeltas, index: int) -> None:
        """Wraps ``base_layer`` as linear number ``index`` of its group."""
        super().__init__()
        self.base_layer = base_layer
        self._shared = shared
        self._index = index

    @property
    def group(self) -> RoutedGroup:
        """The linears that route together with this one."""
        group = self._shared.group
        assert isinstance(group, RoutedGroup), "only training puts something before the group"
        return group

    def forward(self, x: Tensor) -> Tensor:
        """Y [..., O] of x [..., H]."""
        if not self._adds_in_place(x):
            return self.with_delta(self.base_layer(x), x)
        delta_TO = self._shared.take(self._index, x)
        if delta_TO is None:
            return cast(Tensor, self.base_layer(x))
        return delta_TO.addmm_(x.reshape(-1, x.shape[-1]), self.base_layer.weight.T).view(*x.shape[:-1], -1)

    def _adds_in_place(self, x: Tensor) -> bool:
        """Whether the base product may be added to the delta where that lies, which saves a launch on a GPU."""
        base = self.base_layer
        # A tp group replaces the forward of its linears; gradients would want the delta as it was.
        plain = type(base) is nn.Linear and base.bias is None and "forward" not in vars(base)
        # ZeRO stage 3 has an empty weight here, and gathers the real one when the base linear is called.
        plain = plain and base.weight.dim() == 2
        return plan.runs_kernels(x.device) and plain and not torch.is_grad_enabled()

    def with_delta(self, y: Tensor, x: Tensor) -> Tensor:
        """Y [..., O] plus this linear's delta for x [..., H]; of both this rank's part where a tp group splits them."""
        delta_TO = self._shared.take(self._index, x)
        return y if delta_TO is None else y + delta_TO.view_as(y)
