"""Stacks and traffic for the tests of GPU kernels, small enough for Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from meteora_kernels.launch import Launch
from meteora_kernels.routed_lora.stack import LoraPart, LoraStack, stack, whole_part

FEW = Launch(1, 16, 2, 2, inputs=16, project_columns=16, outputs=32, pairs=16, warps=4, stages=1)
MANY = Launch(16, 32, 1, 2, inputs=16, project_columns=16, outputs=32, pairs=16, warps=4, stages=1)


def random_stack(
    g: torch.Generator,
    experts: int,
    ranks: Sequence[int],
    in_features: int = 21,
    widths: tuple[int, ...] = (19, 40),
    dtype: torch.dtype = torch.float32,
) -> LoraStack:
    """Experts with ranks in turn; expert 1, if there is one, lacks the last linear."""

    def part(n: int, e: int) -> LoraPart | None:
        if e == 1 and n == len(widths) - 1:
            return None
        rank = ranks[(e + n) % len(ranks)]
        a_RH, b_OR = torch.randn(rank, in_features, generator=g), torch.randn(widths[n], rank, generator=g)
        return whole_part((a_RH, b_OR, 0.5 + 0.25 * (e % 7)), dtype)

    return stack([tuple(part(n, e) for n in range(len(widths))) for e in range(experts)], in_features, widths, dtype)


def traffic(
    kind: str, tokens: int, linears: int, slots: int, experts: int, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """ids_TNK and weights_TNK: ``uniform``, ``one`` expert for all tokens, slots left ``empty``, or with ``holes``."""
    ids_TNK = torch.rand(tokens, linears, max(experts, slots), generator=g).argsort(-1)[..., :slots]
    ids_TNK = torch.where(ids_TNK < experts, ids_TNK, -1)
    if kind == "one":
        ids_TNK = torch.full_like(ids_TNK, -1)
        ids_TNK[..., 0] = experts - 1
    if kind == "empty":
        ids_TNK = torch.full_like(ids_TNK, -1)
    if kind == "holes":
        ids_TNK = ids_TNK.masked_fill(torch.rand(ids_TNK.shape, generator=g) < 0.4, -1)
    return ids_TNK, torch.rand(ids_TNK.shape, generator=g).masked_fill(ids_TNK < 0, 0.0)
