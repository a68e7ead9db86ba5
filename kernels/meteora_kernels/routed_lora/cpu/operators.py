"""Routed LoRA on a CPU as one compiled operation (``routed_lora.c``): choice of experts and deltas of a pass.

Where nothing can be compiled the torch operators serve (``dense.py``, ``grouped.py``), which are slower.

Shapes: T tokens, N linears that share one input, E experts held, F experts the gates know, P = N * F, K slots,
H input width, O_n output widths, Y columns of all outputs, G slots of the roster.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from ctypes import CDLL, Structure, addressof, c_int64, c_void_p
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meteora_kernels.compiler import CannotCompile, compiled
from meteora_kernels.gate.choice import GateChoice
from meteora_kernels.gate.reference import topk_softmax
from meteora_kernels.routed_lora.reference import routed_lora_reference
from meteora_kernels.routed_lora.stack import LoraPart, LoraStack, stack, whole_part
from meteora_kernels.routed_lora.tables import tables_of

DTYPES = (torch.float32, torch.bfloat16)
HEADERS = tuple(Path(__file__).with_name(name) for name in ("choice.h", "products.h"))


class _Group(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("linears", "experts", "known", "inputs", "outputs", "max_rank", "half")),
        *((name, c_void_p) for name in ("a_NE", "b_NE", "rank_NE", "scale_NE", "first_N", "width_N")),
        *((name, c_void_p) for name in ("gate_PH", "absent_N", "local_G", "half_NE")),
    ]


class _Pass(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("tokens", "threads", "slots", "gated", "by_linear")),
        *((name, c_void_p) for name in ("auto_T", "top_k_T", "temperature_T", "ids", "weights")),
        *((name, c_void_p) for name in ("prototype_F", "slot_F", "shares_TF", "uses_G")),
    ]


@dataclass(frozen=True, slots=True)
class Group:
    """N linears with their experts and gates, as C reads them.

    Attributes:
        at: Address of the structure.
        linears: N.
        columns: Y.
        kept: What the structure points to.
    """

    at: int
    linears: int
    columns: int
    kept: tuple[Any, ...]

    @classmethod
    def of(
        cls,
        experts: LoraStack,
        columns: int,
        first_N: Sequence[int],
        gate_PH: Tensor | None = None,
        absent_N1: Tensor | None = None,
        local_G: Tensor | None = None,
    ) -> Group:
        """Joins them.

        Args:
            experts: Theirs, located; inputs and matrices are of ``DTYPES``.
            columns: Y.
            first_N: The first column of each linear.
            gate_PH: Gates of the linears, fp32, rows by linear, then expert; None where no token is gated.
            absent_N1: See ``GateChoice``.
            local_G: See ``GateChoice``.
        """
        tables, widths = experts.tables, experts.out_features
        assert tables is not None, "only located stacks stay where they are"
        assert experts.dtype in DTYPES, "C knows these"
        known = 0 if gate_PH is None else len(gate_PH) // len(widths)
        places_N, width_N, half_NE = torch.tensor(first_N), torch.tensor(widths), _halves(experts)
        structure = _Group(
            len(widths), experts.num_experts, known, experts.in_features, columns, experts.max_rank,
            experts.dtype == torch.bfloat16,
            at(tables.a.address_NE, torch.int64), at(tables.b.address_NE, torch.int64),
            at(tables.a.rows_NE, torch.int32), at(experts.scales_NE, torch.float32),
            at(places_N, torch.int64), at(width_N, torch.int64),
            at(gate_PH, torch.float32), at(absent_N1, torch.bool), at(local_G, torch.int64), at(half_NE, torch.bool),
        )  # fmt: skip
        kept = structure, experts, gate_PH, absent_N1, local_G, places_N, width_N, half_NE
        return cls(addressof(structure), len(widths), columns, kept)

    @classmethod
    def side_by_side(cls, experts: LoraStack) -> Group:
        """Linears without gates, whose outputs are all there is in a row."""
        *first_N, columns = accumulate(experts.out_features, initial=0)
        return cls.of(experts, columns, first_N)


@dataclass(frozen=True, slots=True)
class Pass:
    """How the tokens of a pass get their experts, as C reads it.

    Attributes:
        at: Address of the structure.
        tokens: T.
        slots: K.
        kept: What the structure points to.
    """

    at: int
    tokens: int
    slots: int
    kept: tuple[Any, ...]

    @classmethod
    def of(cls, choice: GateChoice, tokens: int, shares_TF: Tensor | None = None, uses_G: Tensor | None = None) -> Pass:
        """By gates or by name.

        Args:
            choice: What the requests chose; what it says of a group is the group's business.
            tokens: T.
            shares_TF: Gets the weights of the chosen added, fp32.
            uses_G: Counts how often slots are used, int64.
        """
        structure = _Pass(
            tokens, torch.get_num_threads(), choice.slots, choice.gated, False,
            at(choice.auto_T, torch.bool), at(choice.top_k_T, torch.int64),
            at(choice.temperature_T1, torch.float32), at(choice.ids_TK, torch.int64),
            at(choice.weights_TK, torch.float32), at(choice.prototype_E, torch.bool),
            at(choice.slot_E, torch.int64), at(shares_TF, torch.float32), at(uses_G, torch.int64),
        )  # fmt: skip
        return cls(addressof(structure), tokens, choice.slots, (structure, choice, shares_TF, uses_G))

    @classmethod
    def chosen(cls, ids_TNK: Tensor, weights_TNK: Tensor) -> Pass:
        """Of experts that are chosen already, by linear; arguments as in ``routed_lora_reference``."""
        ids_TNK, weights_TNK = ids_TNK.contiguous(), weights_TNK.contiguous()
        tokens, _, slots = ids_TNK.shape
        structure = _Pass(tokens, torch.get_num_threads(), slots, False, True)
        structure.ids, structure.weights = at(ids_TNK, torch.int64), at(weights_TNK, torch.float32)
        return cls(addressof(structure), tokens, slots, (structure, ids_TNK, weights_TNK))


def add_routed_lora(y_TY: Tensor, x_TH: Tensor, group: Group, step: Pass) -> None:
    """Adds the deltas of the N linears to their outputs where these lie. Without gradients.

    Args:
        y_TY: Outputs of the linears, contiguous, in the type of the stack.
        x_TH: The linears' shared input, in the same type.
        group: The linears.
        step: The choice of T tokens.

    Raises:
        MemoryError: There is not enough for what is needed in between.
    """
    x_TH = x_TH.contiguous()
    assert y_TY.is_contiguous(), "C knows one tensor from its address"
    assert y_TY.numel() == step.tokens * group.columns, "outputs and choice are of the same tokens"
    if _library().add_routed_lora(group.at, step.at, x_TH.data_ptr(), y_TY.data_ptr()):
        raise MemoryError(f"routed LoRA of {step.tokens} tokens")


def routed_lora(x_TH: Tensor, stack: LoraStack, ids_TNK: Tensor, weights_TNK: Tensor) -> tuple[Tensor, ...]:
    """The deltas of the N linears, each [T, O_n], in x's dtype. Arguments as in the reference; a located stack."""
    y_TY = x_TH.new_zeros(x_TH.shape[0], sum(stack.out_features))
    add_side_by_side(y_TY, x_TH, stack, ids_TNK, weights_TNK)
    deltas: tuple[Tensor, ...] = y_TY.split(stack.out_features, dim=1)
    return deltas


def add_side_by_side(y_TY: Tensor, x_TH: Tensor, stack: LoraStack, ids_TNK: Tensor, weights_TNK: Tensor) -> None:
    """Adds the same deltas to outputs that lie side by side, of whatever shape the T tokens have there."""
    group = stack.compiled or Group.side_by_side(stack)
    add_routed_lora(y_TY, x_TH, group, Pass.chosen(ids_TNK, weights_TNK))


def gate_logits(x_TH: Tensor, gate_PH: Tensor) -> Tensor:
    """fp32 logits [T, P] as ``add_routed_lora`` computes them, each row the same whatever the others are."""
    x_TH = x_TH.float().contiguous()
    out_PT = x_TH.new_empty(gate_PH.shape[0], x_TH.shape[0])
    places = x_TH.data_ptr(), at(gate_PH, torch.float32), out_PT.data_ptr()
    _library().gate_logits(*places, x_TH.shape[0], *gate_PH.shape, torch.get_num_threads())
    return out_PT.T.contiguous()


def choose(logits_TNE: Tensor, choice: GateChoice) -> tuple[Tensor, Tensor]:
    """Expert ids (int64) and weights (fp32) of a gated pass, each [T, N, K], as ``add_routed_lora`` chooses them.

    Args:
        logits_TNE: fp32.
        choice: What the requests chose; what it says of absent linears and of slots is not looked at.
    """
    logits_TNE = logits_TNE.contiguous()
    shape = (*logits_TNE.shape[:2], choice.slots)
    ids_TNK, weights_TNK = logits_TNE.new_empty(shape, dtype=torch.int64), logits_TNE.new_empty(shape)
    _library().choose_experts(
        at(logits_TNE, torch.float32), *logits_TNE.shape, choice.slots,
        at(choice.auto_T, torch.bool), at(choice.top_k_T, torch.int64), at(choice.temperature_T1, torch.float32),
        at(choice.ids_TK, torch.int64), at(choice.weights_TK, torch.float32), at(choice.prototype_E, torch.bool),
        ids_TNK.data_ptr(), weights_TNK.data_ptr(),
    )  # fmt: skip
    return ids_TNK, weights_TNK


def memory_needed(group: Group, step: Pass) -> int:
    """Bytes that ``add_routed_lora`` takes while it runs."""
    needed: int = _library().memory_of_routed_lora(group.at, step.at)
    return needed


@cache
def available() -> bool:
    """Whether the operation compiles here and computes what it should; says in the log why not."""
    try:
        _library()
        _check()
    except (CannotCompile, MemoryError) as error:
        logging.getLogger(__name__).warning("routed linears are slower than they could be here: %s", error)
        return False
    return True


@cache
def _library() -> CDLL:
    library = compiled(Path(__file__).with_name("routed_lora.c"), HEADERS)
    library.add_routed_lora.argtypes = [c_void_p] * 4
    library.memory_of_routed_lora.argtypes, library.memory_of_routed_lora.restype = [c_void_p] * 2, c_int64
    library.choose_experts.argtypes, library.choose_experts.restype = [c_void_p, *[c_int64] * 4, *[c_void_p] * 8], None
    library.gate_logits.argtypes, library.gate_logits.restype = [c_void_p] * 3 + [c_int64] * 4, None
    return library


def _check() -> None:
    """Compares a small pass with the twins, and its tokens alone with the same together.

    Raises:
        CannotCompile: They differ: the compiler, or this processor, is not to be trusted with the source.
    """
    g = torch.Generator().manual_seed(0)
    ranks, widths, inputs, tokens = ((5, 1), (2, None), (4, 8)), (21, 16), 37, 5

    def pair(rank: int, width: int) -> LoraPart:
        return whole_part(
            (torch.randn(rank, inputs, generator=g), torch.randn(width, rank, generator=g), 0.5), DTYPES[0]
        )

    experts = [
        tuple(pair(rank, width) if rank else None for rank, width in zip(row, widths, strict=True)) for row in ranks
    ]
    held = stack(experts, inputs, widths, DTYPES[0])
    held = replace(held, tables=tables_of(held, tile=16))
    x_TH, gate_PH = (torch.randn(rows, inputs, generator=g) for rows in (tokens, len(widths) * len(ranks)))
    group, choice = Group.of(held, sum(widths), (0, widths[0]), gate_PH), GateChoice(slots=2)
    found_TY, alone_TY = torch.zeros(2, tokens, sum(widths))
    add_routed_lora(found_TY, x_TH, group, Pass.of(choice, tokens))
    for x_1H, y_1Y in zip(x_TH.split(1), alone_TY.split(1), strict=True):
        add_routed_lora(y_1Y, x_1H, group, Pass.of(choice, 1))
    logits_TNE = (x_TH @ gate_PH.T).view(tokens, len(widths), len(ranks))
    expected_TY = torch.cat(routed_lora_reference(x_TH, held, *topk_softmax(logits_TNE, 2)), dim=1)
    if not torch.equal(found_TY, alone_TY) or not torch.allclose(found_TY, expected_TY, rtol=1e-4, atol=1e-4):
        raise CannotCompile("what was compiled computes something else than its twin")


def _halves(experts: LoraStack) -> Tensor:
    """Which pairs are of bfloat16, bool [N, E]."""

    def is_half(part: LoraPart | None) -> bool:
        kinds = set() if part is None else {part.a_RH.dtype, part.b_RO.dtype}
        assert len(kinds) < 2, "the matrices of a pair are of one type"
        assert kinds <= {*DTYPES}, "C knows these"
        return torch.bfloat16 in kinds

    rows = [[is_half(expert[n]) for expert in experts.experts] for n in range(experts.num_linears)]
    return torch.tensor(rows, dtype=torch.bool).view(experts.num_linears, experts.num_experts)


def at(tensor: Tensor | None, dtype: torch.dtype) -> int | None:
    """The address of what C reads as plain numbers, whatever its shape."""
    if tensor is None:
        return None
    assert tensor.dtype == dtype, f"C reads {dtype}, not {tensor.dtype}"
    assert tensor.is_contiguous(), "C reads numbers one after the other"
    assert tensor.device.type == "cpu", "C reads the host's memory"
    return tensor.data_ptr()
