"""The experts' shares in every decoder layer, for those tokens of a pass that somebody wants them for.

A pass may bring thousands of tokens past hundreds of experts; only the rows that produce a token are kept.
Shapes: S such tokens, L decoder layers, E experts of a generation, X slots of a token in one group of linears.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerShares:
    """What a pass records.

    Attributes:
        rows_S: Positions of the tokens in the pass, rising.
        sums_SLE: Sum of gate weights over each layer's routed linears, filled by the pass.
    """

    rows_S: Tensor
    sums_SLE: Tensor

    @classmethod
    def empty(cls, rows: Sequence[int], layers: int, experts: int) -> LayerShares:
        """Before the pass, for tokens at these rising positions."""
        return cls(torch.tensor(rows), torch.zeros(len(rows), layers, experts))

    def add(self, layer: int, ids_TX: Tensor, weights_TX: Tensor) -> None:
        """Takes what one group of linears has chosen for all tokens of the pass; ids below 0 choose nothing."""
        ids_SX, weights_SX = ids_TX[self.rows_S].clamp_min(0), weights_TX[self.rows_S]
        self.sums_SLE[:, layer].scatter_add_(1, ids_SX, weights_SX)

    def at(self, token: int) -> Tensor:
        """The sums of the token at this position, [L, E]; raises IndexError when nobody asked for them."""
        (found,) = (self.rows_S == token).nonzero(as_tuple=True)
        if len(found) != 1:
            raise IndexError(f"shares by layer were not asked for token {token}, but for {self.rows_S.tolist()}")
        return self.sums_SLE[int(found)]
