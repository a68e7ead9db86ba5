"""Which regime and which operators serve a stack: a pure function of its size, the pass and the device, by a table.

The regime depends on the stack alone: a token's result must not depend on how many others there are. On a GPU the
operators are Triton kernels. On a CPU they are one compiled operation, or torch where gradients are wanted or nothing
can be compiled. Kernels are imported where they run, and only there.

Shapes: T tokens, N linears that share one input, K slots, E experts, P = N * E gate rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from meteora_kernels.gate.choice import Chosen, GateChoice
from meteora_kernels.launch import Launch, launch_of, tiles_of
from meteora_kernels.routed_lora import grouped
from meteora_kernels.routed_lora.cpu import operators as cpu
from meteora_kernels.routed_lora.dense import pack, routed_lora_dense
from meteora_kernels.routed_lora.stack import LoraStack, with_room
from meteora_kernels.routed_lora.tables import Tables, tables_of


@dataclass(frozen=True, slots=True)
class Plan:
    """How a pass over a stack is served.

    Attributes:
        regime: ``dense`` reads all matrices side by side, ``grouped`` those in use.
        launch: Sizes of the kernels' tiles.
    """

    regime: Literal["dense", "grouped"]
    launch: Launch


def plan(tokens: int, ranks: Sequence[Sequence[int]], packable: bool, device: str) -> Plan:
    """The plan of a pass.

    Args:
        tokens: T.
        ranks: For each of N linears the rank of every expert held here, 0 where it has none.
        packable: Whether all pairs are held with all their ranks and in one type: others are always grouped.
        device: Its name, see ``device_name``.
    """
    tiles = tiles_of(device)
    small = max(map(sum, ranks), default=0) <= tiles.dense_columns
    # Without any expert there is nothing to pack; a group may hold none.
    dense = small and packable and any(map(len, ranks))
    return Plan("dense" if dense else "grouped", launch_of(tokens, tiles))


def device_name(device: torch.device) -> str:
    """The name by which the table knows a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def runs_kernels(device: torch.device) -> bool:
    """Whether operators are Triton kernels there."""
    return device.type == "cuda"


def runs_compiled(stack: LoraStack) -> bool:
    """Whether the stack is served by what is compiled for this CPU."""
    return stack.tables is not None and stack.scales_NE.device.type == "cpu"


def held_dtype(stored: torch.dtype, dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The type in which matrices of a file are held for inputs of ``dtype``.

    What a CPU computes with few tokens takes as long as reading the matrices, so bfloat16 stays what it is: made wider
    when it is read, it is the same numbers in half the memory. Kernels of a GPU want matrices of their inputs' type.

    Args:
        stored: The file's.
        dtype: Of the inputs.
        device_type: ``cpu`` or ``cuda``.
    """
    return stored if device_type == "cpu" and stored == torch.bfloat16 else dtype


def arrange(stack: LoraStack) -> LoraStack:
    """The stack as its regime wants it: packed when it is small and made of whole pairs of one type, else as it is.

    Either way there is room for the matrices that are not here yet.
    """
    ranks = [[0 if (part := expert[n]) is None else part.a_RH.shape[0] for expert in stack.experts]
             for n in range(stack.num_linears)]  # fmt: skip
    chosen = plan(0, ranks, stack.whole and len(stack.matrix_dtypes) == 1, device_name(stack.scales_NE.device))
    return pack(stack) if chosen.regime == "dense" else with_room(stack)


def located(stack: LoraStack) -> LoraStack:
    """The stack with tables for what reads it by address, if anything does: its matrices stay where they are."""
    device = stack.scales_NE.device
    on_cpu = device.type == "cpu" and stack.whole and stack.dtype in cpu.DTYPES and cpu.available()
    if not (on_cpu or runs_kernels(device)):
        return stack
    stack = replace(stack, tables=tables_of(stack, tiles_of(device_name(device)).outputs))
    return replace(stack, compiled=cpu.Group.side_by_side(stack)) if on_cpu else stack


def routed_lora(x_TH: Tensor, stack: LoraStack, ids_TNK: Tensor, weights_TNK: Tensor) -> tuple[Tensor, ...]:
    """The deltas of the N linears, each [T, O_n], in x's dtype. Arguments as in the reference; whole pairs only."""
    if runs_kernels(x_TH.device):
        from meteora_kernels.routed_lora import operators

        return operators.routed_lora(x_TH, stack, _tables(stack), ids_TNK, weights_TNK, _launch(x_TH))
    learns = torch.is_grad_enabled() and (x_TH.requires_grad or weights_TNK.requires_grad)
    if runs_compiled(stack) and x_TH.dtype == stack.dtype and not learns:
        return cpu.routed_lora(x_TH, stack, ids_TNK, weights_TNK)
    operator = grouped.routed_lora_grouped if stack.packed is None else routed_lora_dense
    return operator(x_TH, stack, ids_TNK, weights_TNK)


def shrink(x_TH: Tensor, stack: LoraStack, ids_TNK: Tensor) -> Tensor:
    """The shrunk inputs [T, N, K, R], fp32. Arguments as in the reference."""
    if runs_kernels(x_TH.device):
        from meteora_kernels.routed_lora import operators

        return operators.shrink(x_TH, stack, _tables(stack), ids_TNK, replace(_launch(x_TH), planes=1))
    return grouped.shrink_grouped(x_TH, stack, ids_TNK)


def expand(shrunk_TNKR: Tensor, stack: LoraStack, ids_TNK: Tensor, weights_TNK: Tensor) -> tuple[Tensor, ...]:
    """The deltas of the N linears, each [T, O_n], in the dtype of the matrices. Arguments as in the reference."""
    if runs_kernels(shrunk_TNKR.device):
        from meteora_kernels.routed_lora import operators

        return operators.expand(shrunk_TNKR, stack, _tables(stack), ids_TNK, weights_TNK, _launch(shrunk_TNKR))
    return grouped.expand_grouped(shrunk_TNKR, stack, ids_TNK, weights_TNK)


def gate_logits(x_TH: Tensor, gate_PH: Tensor) -> Tensor:
    """fp32 logits [T, P]; each row the same whatever the others are, except by torch."""
    if runs_kernels(x_TH.device):
        from meteora_kernels.projection.kernel import gate_logits

        return gate_logits(x_TH, gate_PH, replace(_launch(x_TH), planes=1))
    learns = torch.is_grad_enabled() and (x_TH.requires_grad or gate_PH.requires_grad)
    if learns or not cpu.available():
        return linear(x_TH.float(), gate_PH)
    return cpu.gate_logits(x_TH, gate_PH)


def chooses_compiled(logits_TNE: Tensor) -> bool:
    """Whether what is compiled for this CPU chooses by these logits."""
    learns = torch.is_grad_enabled() and logits_TNE.requires_grad
    return logits_TNE.device.type == "cpu" and not learns and cpu.available()


def choose_compiled(logits_TNE: Tensor, choice: GateChoice) -> tuple[Tensor, Tensor]:
    """Expert ids and weights, each [T, N, K], by what is compiled; it leaves absent linears and slots alone."""
    return cpu.choose(logits_TNE, choice)


def choose(logits_TNE: Tensor, choice: GateChoice) -> Chosen:
    """The experts of every token by its logits, where kernels run."""
    from meteora_kernels.gate.kernel import choose

    return choose(logits_TNE, choice, *logits_TNE.shape[:2])


def fused(x_TH: Tensor, gate_PH: Tensor, choice: GateChoice, stack: LoraStack) -> tuple[Chosen, tuple[Tensor, ...]]:
    """Choice and deltas in one go where kernels run, without gradients. Arguments as in ``operators.fused``."""
    from meteora_kernels.routed_lora import operators

    gates = gate_PH if choice.gated else None
    return operators.fused(x_TH, gates, choice, stack, _tables(stack), _launch(x_TH))


def permute(
    x_TH: Tensor, local_DTNK: Tensor, weights_TNK: Tensor, position_DT: Tensor, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of an exchange where kernels run. Arguments as in ``permute_reference``."""
    from meteora_kernels.permute.kernel import permute

    return permute(x_TH, local_DTNK, weights_TNK, position_DT, rows)


def unpermute(rows_SO: Tensor, position_DT: Tensor, tokens: int) -> Tensor:
    """Sums of what came back of an exchange where kernels run. Arguments as in ``unpermute_reference``."""
    from meteora_kernels.permute.kernel import unpermute

    return unpermute(rows_SO, position_DT, tokens)


def _launch(x: Tensor) -> Launch:
    return launch_of(x.shape[0], tiles_of(device_name(x.device)))


def _tables(stack: LoraStack) -> Tables:
    return stack.tables or tables_of(stack, tiles_of(device_name(stack.scales_NE.device)).outputs)
