"""Gate rows without training: where an expert's own matrices say its inputs lie.

Arrow (Ostapenko et al., arXiv 2405.11157) takes, for a linear, the unit input v that the expert's update B A stretches
most, its top right singular vector, and scores an input x by |v . x|, because the sign of v is arbitrary. A row made
here is v times the mean length of the trained rows beside it, so that an input at the same angle to either gets a
logit of the same size. ``docs/decisions/0006-prototype-gates.md`` has the reasons, and what was measured.

Shapes: H input features, R rank, O output features, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from meteora_dist.adapters import LoraPair


def arrow_direction(pair: LoraPair) -> Tensor:
    """The unit input that ``B A`` stretches most: [H], fp32, its largest component positive; zeros when ``B A`` is 0.

    The H x O product is never formed: with thin QR factors ``A^T = Q_a T_a`` and ``B = Q_b T_b``, ``B A`` has the
    singular values of the R x R matrix ``T_b T_a^T``, and its right singular vectors are ``Q_a`` times that one's.
    """
    q_HR, t_a_RR = torch.linalg.qr(pair.a_RH.T.double())
    t_b_RR = torch.linalg.qr(pair.b_OR.double())[1]
    _, stretch_R, right_RR = torch.linalg.svd(t_b_RR @ t_a_RR.T)
    if not stretch_R[0] > 0:
        return torch.zeros(q_HR.shape[0])
    v_H: Tensor = q_HR @ right_RR[0]
    return (v_H * v_H[v_H.abs().argmax()].sign()).float()


def prototype_row(pair: LoraPair | None, gate_EH: Tensor, trained_E: Tensor) -> Tensor:
    """The gate row of an expert at one linear: [H], fp32.

    Args:
        pair: The expert's matrices there; None, and with it a row of zeros, where it does not adapt the linear.
        gate_EH: The rows of the experts it joins.
        trained_E: Which of them were trained, bool. Only trained rows that are not zero set the length; without any
            the row has length 1.
    """
    if pair is None:
        return torch.zeros(gate_EH.shape[1])
    lengths = gate_EH[trained_E].float().norm(dim=1)
    lengths = lengths[lengths > 0]
    return arrow_direction(pair) * (lengths.mean() if len(lengths) else 1.0)
