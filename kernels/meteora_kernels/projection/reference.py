"""Projection: one product of an input with all that reads it: gates, and the A matrices of all experts.

    out_TM = x_TH [G_PH | A_CH]^T,   M = P + C

It is summed up in fp32, and cut along H into parts of a length that depends on H alone: the parts are always added in
the same order, whoever computed them.

Shapes: T tokens, H input width, P gate rows, C rows of A, S parts of H, L planes: sums of neighbouring parts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def project_reference(x_TH: Tensor, gate_PH: Tensor | None, a_CH: Tensor | None, splits: int, length: int) -> Tensor:
    """All S parts of the product, as planes [S, T, M], fp32.

    Args:
        x_TH: Inputs.
        gate_PH: Gates, fp32; None for none.
        a_CH: A matrices; None for none.
        splits: S.
        length: Of a part.
    """
    weights_MH = torch.cat([weight.float() for weight in (gate_PH, a_CH) if weight is not None])
    cuts = [slice(s * length, (s + 1) * length) for s in range(splits)]
    return torch.stack([x_TH.float()[:, cut] @ weights_MH[:, cut].T for cut in cuts])


def split_length(width: int, splits: int, block: int) -> int:
    """Length of each of ``splits`` parts of ``width``, a multiple of ``block``; the last parts may be empty."""
    return -(-width // (splits * block)) * block
