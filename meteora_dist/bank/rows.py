"""gate_rows.safetensors: the gate rows of one expert, trained for the bank it is to join.

Shapes: H input features of the linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from meteora_dist.adapters import Adapter
from meteora_dist.adapters.header import read_header
from meteora_dist.adapters.tensors import is_floating, read_tensors
from meteora_dist.bank.gates import model_order
from meteora_dist.errors import BankError

ROWS_FILE = "gate_rows.safetensors"
"""Its name where it lies beside the adapter's own files."""


def read_rows(path: Path, adapter: Adapter, widths: Mapping[str, int]) -> dict[str, Tensor]:
    """Reads one row for every linear of the bank.

    The file has one tensor [H] or [1, H] a linear, named by the linear's path in the base model, in F32, F16, BF16 or
    F64: for every linear the adapter adapts, and for as many of the bank's other linears as it likes.

    Args:
        path: The file.
        adapter: The expert's.
        widths: H of every linear that the bank's experts adapt, this one included.

    Returns:
        [H], fp32, for every key of ``widths``; zeros where the file has none.

    Raises:
        BankError: When it is missing or damaged, lacks a linear of the adapter, has a tensor for a linear no expert
            adapts, or one of another shape or dtype, or holds NaN or infinity.
    """
    header = read_header(path, BankError)
    if missing := model_order(adapter.shapes.keys() - header.tensors.keys()):
        raise BankError(path, f"has no row for {missing[0]}, which the adapter in {adapter.path} adapts")
    for linear, info in header.tensors.items():
        if linear not in widths:
            raise BankError(path, f"has a row for {linear}, which no expert of the bank adapts")
        if info.shape not in ((widths[linear],), (1, widths[linear])) or not is_floating(info.dtype):
            raise BankError(
                path,
                f"the row of {linear} is {info.dtype} {list(info.shape)}; it must be floating-point "
                f"[{widths[linear]}] or [1, {widths[linear]}]",
            )
    tensors = read_tensors(path, header, header.tensors, BankError)
    rows = {linear: row.flatten().float() for linear, row in zip(header.tensors, tensors, strict=True)}
    for linear, row_H in rows.items():
        if not bool(torch.isfinite(row_H).all()):
            raise BankError(path, f"the row of {linear} holds NaN or infinity")
    return {linear: rows.get(linear, torch.zeros(width)) for linear, width in widths.items()}
