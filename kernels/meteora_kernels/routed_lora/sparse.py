"""Routed LoRA for few tokens on the CPU, added in place: each token meets the rows of its own experts and no others.

The shrink is a product of which only some entries are wanted (``torch.sparse.sampled_addmm``), the expand a weighted
sum of rows (``torch.embedding_bag``). Both read matrices where they lie, so the time does not depend on the number of
experts, and every token is computed for itself, so its result does not depend on the others. Formula and twin:
``reference.py``.

Shapes: as there; P = N * E pairs, R the largest rank of the stack.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import linear

from meteora_kernels.routed_lora.stack import Expert, LoraStack

WORTHWHILE = 8
"""Rows of A for each one a token wants above which this regime is faster than the dense one, for few tokens."""


@dataclass(frozen=True, slots=True)
class PairRows:
    """Where a packed stack has the rows of each pair.

    Attributes:
        rows_PR: Their numbers among all rows of A; beyond a pair's rank any row of its linear.
        scales_PR: s of the pair; 0 beyond its rank.
        first_N1: Number of the first row of each linear.
        pairs_N1: Number of the first pair of each linear.
    """

    rows_PR: Tensor
    scales_PR: Tensor
    first_N1: Tensor
    pairs_N1: Tensor


def pair_rows(stack: LoraStack) -> PairRows:
    """Looks up the rows of a packed stack."""
    _hear_once_that_sparse_csr_is_beta()
    rows: list[list[int]] = []
    scales: list[list[float]] = []
    firsts, first = [], 0
    for n in range(stack.num_linears):
        firsts.append(first)
        row = first
        for expert in stack.experts:
            rank, scale = (part.rank, part.scale) if (part := expert[n]) else (0, 0.0)
            beyond = stack.max_rank - rank
            rows.append([*range(row, row + rank), *[firsts[n]] * beyond])
            scales.append([scale] * rank + [0.0] * beyond)
            row += rank
        first = row
    pairs_N = torch.arange(stack.num_linears) * stack.num_experts
    # A linear without any row, the last ones of the stack, points at one that exists.
    return PairRows(
        torch.tensor(rows).clamp_max(max(first - 1, 0)),
        torch.tensor(scales),
        torch.tensor(firsts)[:, None],
        pairs_N[:, None],
    )


def worthwhile(stack: LoraStack, slots: int) -> bool:
    """Whether a packed stack has so many experts that few tokens of K = ``slots`` are better served by this regime."""
    packed = stack.packed
    assert packed is not None, "the sparse regime reads packed matrices"
    return len(packed.a_CH) > WORTHWHILE * stack.num_linears * slots * stack.max_rank


def add_routed_lora_sparse(
    outputs: Sequence[Tensor],
    x_TH: Tensor,
    stack: LoraStack,
    where: PairRows,
    ids_TNK: Tensor,
    weights_TNK: Tensor,
) -> None:
    """Adds the deltas of the N linears to ``outputs``, each [T, O_n]. fp32, without gradients.

    Args:
        outputs: Changed in place.
        x_TH: As in the reference, as are the others.
        stack: Packed.
        where: Its rows.
        ids_TNK: Expert of every slot, -1 where empty.
        weights_TNK: Weight of every slot.
    """
    packed = stack.packed
    assert packed is not None, "the sparse regime reads packed matrices"
    tokens, linears = ids_TNK.shape[:2]
    # An empty slot points at expert 0 with weight 0 and adds nothing.
    pairs_S = (ids_TNK.clamp_min(0) + where.pairs_N1).flatten()
    rows_SR = where.rows_PR.index_select(0, pairs_S)
    weights_SR = where.scales_PR.index_select(0, pairs_S).mul_(weights_TNK.reshape(-1, 1))
    weights_SR.mul_(_sampled(x_TH, packed.a_CH, rows_SR.view(tokens, -1)).view_as(weights_SR))
    if linears == 1:
        rows_NS, weights_NS = rows_SR.view(1, -1), weights_SR.view(1, -1)
    else:
        rows_TNJ, weights_TNJ = rows_SR.view(tokens, linears, -1) - where.first_N1, weights_SR.view(tokens, linears, -1)
        rows_NS, weights_NS = (of.transpose(0, 1).flatten(1) for of in (rows_TNJ, weights_TNJ))
    bags_T = _ends(tokens, rows_NS.shape[1] // tokens)[:-1]
    for n, (y_TO, b_CO) in enumerate(zip(outputs, packed.b_CO, strict=True)):
        if b_CO.shape[0]:
            y_TO.add_(torch.embedding_bag(b_CO, rows_NS[n], bags_T, False, 0, False, weights_NS[n])[0])


def add_expert(outputs: Sequence[Tensor], x_TH: Tensor, expert: Expert, weight: float) -> None:
    """Adds one expert's deltas, the same for all tokens, times ``weight``; otherwise as ``add_routed_lora_sparse``."""
    for y_TO, part in zip(outputs, expert, strict=True):
        if part is not None:
            y_TO.addmm_(linear(x_TH, part.a_RH), part.b_RO, alpha=weight * part.scale)


def _sampled(x_TH: Tensor, a_CH: Tensor, rows_TJ: Tensor) -> Tensor:
    """``x[t] . a[rows[t, j]]`` of every entry, flat."""
    tokens, wanted = rows_TJ.shape
    ends, nothing = _ends(tokens, wanted), x_TH.new_zeros(tokens * wanted)
    pattern = torch.sparse_csr_tensor(ends, rows_TJ.flatten(), nothing, (tokens, a_CH.shape[0]), check_invariants=False)
    entries_S: Tensor = torch.sparse.sampled_addmm(pattern, x_TH, a_CH.T, beta=0.0).values()
    return entries_S


@lru_cache(maxsize=256)
def _ends(tokens: int, each: int) -> Tensor:
    """0 and the ends of neighbouring runs of ``each`` entries, one run a token; every layer asks for the same."""
    return torch.arange(0, tokens * each + 1, each)


def _hear_once_that_sparse_csr_is_beta() -> None:
    """Torch says so at the first such tensor of a process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.long), torch.tensor([]), (1, 1))
