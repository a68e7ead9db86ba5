"""Permute and unpermute equal their twins in both layouts, and each is the other's gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from meteora_kernels.permute.kernel import permute, unpermute
from meteora_kernels.permute.reference import permute_reference, unpermute_reference

RANKS, LINEARS, SLOTS = 3, 2, 2


def layout(kind: str, tokens: int, g: torch.Generator) -> tuple[Tensor, Tensor, int]:
    """local_DTNK, position_DT and S: ``exact`` sends what is wanted, ``equal`` a row for each of one token more."""
    owner_TNK = torch.randint(-1, RANKS, (tokens, LINEARS, SLOTS), generator=g)
    ids_TNK = torch.randint(0, 9, owner_TNK.shape, generator=g)
    local_DTNK = torch.where(owner_TNK == torch.arange(RANKS)[:, None, None, None], ids_TNK, -1)
    if kind == "equal":
        return local_DTNK, torch.arange(RANKS * (tokens + 1)).view(RANKS, -1), RANKS * (tokens + 1)
    wanted_DT = (local_DTNK >= 0).flatten(2).any(-1)
    places = wanted_DT.flatten().cumsum(0).view(RANKS, tokens) - 1
    return local_DTNK, torch.where(wanted_DT, places, -1), int(wanted_DT.sum())


LAYOUTS = pytest.mark.parametrize("kind", ["exact", "equal"])


@LAYOUTS
@pytest.mark.parametrize(("tokens", "width"), [(1, 3), (17, 40), (63, 1100)])
def test_kernels_equal_their_twins(kind: str, tokens: int, width: int) -> None:
    g = torch.Generator().manual_seed(tokens)
    local_DTNK, position_DT, rows = layout(kind, tokens, g)
    x_TH, weights_TNK = torch.randn(tokens, width, generator=g), torch.rand(tokens, LINEARS, SLOTS, generator=g)
    sent = permute(x_TH, local_DTNK, weights_TNK, position_DT, rows)
    for actual, expected in zip(sent, permute_reference(x_TH, local_DTNK, weights_TNK, position_DT, rows), strict=True):
        assert actual.tolist() == expected.tolist()
    back_SO = torch.randn(rows, width, generator=g)
    sums_TO = unpermute(back_SO, position_DT, tokens)
    torch.testing.assert_close(sums_TO, unpermute_reference(back_SO, position_DT, tokens), rtol=1e-5, atol=1e-5)


def test_a_row_nobody_wants_brings_no_nan() -> None:
    local_DTNK = torch.tensor([[[[0]], [[-1]]]])
    x_TH = torch.tensor([[1.0], [float("nan")]])
    rows_SH, ids_SNK, weights_SNK = permute(x_TH, local_DTNK, torch.ones(2, 1, 1), torch.tensor([[0, 1, 2]]), 3)
    assert rows_SH.tolist() == [[1.0], [0.0], [0.0]]
    assert ids_SNK.flatten().tolist() == [0, -1, -1]
    assert weights_SNK.flatten().tolist() == [1.0, 0.0, 0.0]


@LAYOUTS
def test_gradients(kind: str) -> None:
    g = torch.Generator().manual_seed(5)
    local_DTNK, position_DT, rows = layout(kind, 6, g)
    x_TH, weights_TNK = torch.randn(6, 5, generator=g), torch.rand(6, LINEARS, SLOTS, generator=g)
    upstream_SH, upstream_TH = torch.randn(rows, 5, generator=g), torch.randn(6, 5, generator=g)
    grads = []
    for there, back in ((permute, unpermute), (permute_reference, unpermute_reference)):
        x, weights = x_TH.clone().requires_grad_(), weights_TNK.clone().requires_grad_()
        rows_SH, _, weights_SNK = there(x, local_DTNK, weights, position_DT, rows)
        loss = (rows_SH * upstream_SH).sum() + weights_SNK.square().sum()
        (loss + (back(rows_SH, position_DT, 6) * upstream_TH).sum()).backward()
        grads.append((x.grad, weights.grad))
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
