"""Linears whose weights stand in oneDNN's blocked layout: a product of few rows reads them once, in order.

``torch.nn.functional.linear`` on the CPU takes weights as rows. For 8 tokens it reads them at a third of the memory's
speed, and bfloat16 weights are put into the blocked layout anew by every call.

Shapes: T tokens, H input width, O output width of all linears together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

PACKED_FOR = 8
"""Rows a layout is chosen for. Measured: that of 8 is within 2 % of the best from 1 row to 512, that of 1 is not."""

FEW_ROWS = 8
"""Up to so many rows are multiplied as they are."""
ROW_STEP = 16
"""More are filled up to a multiple of this."""
MOST_ROWS = 128
"""Rows of one product; more are several products."""


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build and this processor have the products."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(weight_OH: Tensor) -> Tensor:
    """The weight in the blocked layout, as an opaque tensor for ``packed_linear``; it takes as much memory."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OH.detach().contiguous(), PACKED_FOR)
    return packed


def product_rows(rows: int) -> int:
    """Rows of the product that serves ``rows`` of them, at most ``MOST_ROWS``.

    oneDNN makes a program of some 0.5 MB for every number of rows it meets, and keeps a thousand of them.
    """
    return rows if rows <= FEW_ROWS else -(-rows // ROW_STEP) * ROW_STEP


def packed_linear(x_TH: Tensor, packed: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """``x W^T + b`` [T, O], for inference only."""
    rows = x_TH.shape[0]
    if rows <= MOST_ROWS and product_rows(rows) == rows:
        return _product(x_TH, packed, bias_O)
    parts = [_padded_product(part_TH, packed, bias_O) for part_TH in x_TH.split(MOST_ROWS)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _padded_product(x_TH: Tensor, packed: Tensor, bias_O: Tensor | None) -> Tensor:
    rows = x_TH.shape[0]
    return _product(pad(x_TH, (0, 0, 0, product_rows(rows) - rows)), packed, bias_O)[:rows]


def _product(x_TH: Tensor, packed: Tensor, bias_O: Tensor | None) -> Tensor:
    y_TO: Tensor = torch.ops.mkldnn._linear_pointwise.default(x_TH, packed, bias_O, "none", [], "")
    return y_TO


class PackedLinear(nn.Module):
    """Several linears of one input as one product: their outputs, side by side. The twin of ``nn.Linear``.

    Attributes:
        out_features: Output width of each.
    """

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        """Packs copies of the weights."""
        super().__init__()
        self.out_features = tuple(linear.out_features for linear in linears)
        weights = [linear.weight.detach() for linear in linears]
        self._packed = pack(weights[0] if len(weights) == 1 else torch.cat(weights))
        self._bias_O = None
        if any(linear.bias is not None for linear in linears):
            zeros = [weight.new_zeros(weight.shape[0]) for weight in weights]
            biases = [
                zero if linear.bias is None else linear.bias.detach()
                for linear, zero in zip(linears, zeros, strict=True)
            ]
            self._bias_O = torch.cat(biases)

    @property
    def nbytes(self) -> int:
        """Memory of the weights, without what the layout pads."""
        return self._packed.numel() * self._packed.element_size()

    def forward(self, x: Tensor) -> Tensor:
        """Y [..., O] of x [..., H]."""
        y_TO = packed_linear(x.reshape(-1, x.shape[-1]), self._packed, self._bias_O)
        return y_TO.view(*x.shape[:-1], y_TO.shape[-1])
