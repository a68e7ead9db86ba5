"""The order of pairs: an example by hand, and the kernel against its twin over traffic of every kind."""

from __future__ import annotations

import pytest
import torch

from meteora_kernels.pair_order.kernel import pair_order
from meteora_kernels.pair_order.reference import pair_order_reference


@pytest.mark.parametrize("operator", [pair_order, pair_order_reference])
def test_by_hand(operator) -> None:
    # One linear, two slots. Expert 0 has pairs 3 and 4, expert 1 none, expert 2 pairs 0 and 5; pairs 1 and 2 are empty.
    ids_TNK = torch.tensor([[[2, -1]], [[-1, 0]], [[0, 2]]])
    order_NP, start_NE = operator(ids_TNK, 3)
    assert order_NP[0, :4].tolist() == [3, 4, 0, 5]
    assert start_NE.tolist() == [[0, 2, 2, 4]]


@pytest.mark.parametrize(("tokens", "experts"), [(0, 3), (1, 1), (63, 3), (17, 28), (200, 300)])
@pytest.mark.parametrize("traffic", ["uniform", "one", "none"])
def test_kernel_equals_the_twin(tokens: int, experts: int, traffic: str) -> None:
    g = torch.Generator().manual_seed(experts)
    ids_TNK = torch.randint(-1, experts, (tokens, 2, 2), generator=g)
    if traffic == "one":
        ids_TNK.fill_(experts - 1)
    if traffic == "none":
        ids_TNK.fill_(-1)
    (order_NP, start_NE), (expected_NP, starts_NE) = (
        pair_order(ids_TNK, experts),
        pair_order_reference(ids_TNK, experts),
    )
    assert start_NE.tolist() == starts_NE.tolist()
    for n, used in enumerate(starts_NE[:, -1].tolist()):
        assert order_NP[n, :used].tolist() == expected_NP[n, :used].tolist()
