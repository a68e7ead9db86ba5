"""The rows of an exchange on a CPU as compiled operations (``permute.c``).

Shapes: D ranks, C rows for each, M = D * C, T tokens, N linears that share one input, K slots, H input width,
Y columns of the linears' outputs, G slots of the roster.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import CDLL, Structure, byref, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from meteora_kernels.compiler import CannotCompile, compiled
from meteora_kernels.routed_lora.cpu.operators import HEADERS, Group, Pass, at


class _Outgoing(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("ranks", "capacity", "targets")),
        *((name, c_void_p) for name in ("target_DG", "rows_DCH", "ids_DCNK", "weights_DCNK")),
    ]


def lay_out(outgoing: Sequence[Tensor], x_TH: Tensor, group: Group, step: Pass, target_DG: Tensor) -> None:
    """Chooses experts and lays out what each rank gets. Without gradients.

    Args:
        outgoing: Where to: rows_DCH; ids_DCNK, int32, gets -1 where that rank computes nothing; weights_DCNK, fp32,
            gets 0 there.
        x_TH: The linears' shared input, in the type ``group`` was made for; T is at most C.
        group: The linears and their gates.
        step: The choice of T tokens.
        target_DG: The local id of every slot at the rank that shall compute it, int64, -1 elsewhere.

    Raises:
        MemoryError: There is not enough for what is needed in between.
    """
    rows_DCH, ids_DCNK, weights_DCNK = outgoing
    ranks, capacity, width = rows_DCH.shape
    x_TH = x_TH.contiguous()
    assert x_TH.shape == (step.tokens, width), "outgoing rows are as wide as inputs"
    assert x_TH.dtype == rows_DCH.dtype, "and as exact"
    assert step.tokens <= capacity, "there is a row for every token"
    assert ids_DCNK.shape == weights_DCNK.shape == (ranks, capacity, group.linears, step.slots), "and all of its slots"
    assert len(target_DG) == ranks, "and every rank"
    structure = _Outgoing(
        ranks, capacity, target_DG.shape[1], at(target_DG, torch.int64),
        at(rows_DCH, rows_DCH.dtype), at(ids_DCNK, torch.int32), at(weights_DCNK, torch.float32),
    )  # fmt: skip
    if _library().lay_out_rows(group.at, step.at, byref(structure), x_TH.data_ptr()):
        raise MemoryError(f"an exchange of {step.tokens} tokens")


def join(rows: Sequence[Tensor], ids: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What came from D ranks as one: rows_MH, ids_MNK (int64) and weights_MNK.

    Args:
        rows: From each rank, [C, H].
        ids: [C, N, K], int32.
        weights: [C, N, K], fp32.
    """
    ranks, (capacity, *inner) = len(rows), ids[0].shape
    rows_MH = rows[0].new_empty(ranks * capacity, rows[0].shape[1])
    ids_MNK = torch.empty(ranks * capacity, *inner, dtype=torch.int64)
    weights_MNK = torch.empty(ids_MNK.shape)
    _library().join_rows(
        ranks, rows[0].nbytes, ids[0].numel(), _each(rows), _each(ids), _each(weights),
        rows_MH.data_ptr(), ids_MNK.data_ptr(), weights_MNK.data_ptr(),
    )  # fmt: skip
    return rows_MH, ids_MNK, weights_MNK


def add_returned(y_TY: Tensor, parts: Sequence[Tensor], group: Group) -> None:
    """Adds the sums of the deltas that came back to the outputs where these lie.

    Args:
        y_TY: Outputs of the linears, contiguous.
        parts: From each rank, in their order, the deltas of at least T tokens, those of all linears side by side.
        group: The linears.
    """
    assert y_TY.is_contiguous(), "C knows one tensor from its address"
    _library().add_returned(group.at, len(parts), len(y_TY), parts[0].shape[1], _each(parts), y_TY.data_ptr())


def _each(tensors: Sequence[Tensor]) -> object:
    assert all(tensor.is_contiguous() for tensor in tensors), "C reads numbers one after the other"
    return (c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


@cache
def available() -> bool:
    """Whether the operations compile here; where they do not, torch serves."""
    try:
        _library()
    except CannotCompile:
        return False
    return True


@cache
def _library() -> CDLL:
    library = compiled(Path(__file__).with_name("permute.c"), HEADERS)
    library.lay_out_rows.argtypes = [c_void_p] * 4
    library.join_rows.argtypes, library.join_rows.restype = [*[c_int64] * 3, *[c_void_p] * 6], None
    library.add_returned.argtypes, library.add_returned.restype = [c_void_p, *[c_int64] * 3, *[c_void_p] * 2], None
    return library
