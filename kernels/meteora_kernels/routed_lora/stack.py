"""The LoRA pairs of many experts for linears that share one input, as one process holds them.

A process may hold a whole pair, or a part of it: some of its ranks, inputs or outputs. Every expert keeps tensors of
its own, so a stack with other experts is made from the parts of an old one without copying a matrix.

A matrix on the meta device has a shape and no numbers: it stands for one that is not here yet. Once its stack is laid
out (``with_room``, or ``pack``) there is memory in its place, to be filled where it lies.

Shapes: H input width, O_n output width of linear n (of the part held here), N linears, E experts, R rank. A missing
pair has rank 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from meteora_kernels.routed_lora.cpu.operators import Group
    from meteora_kernels.routed_lora.tables import Tables

Pair = tuple[Tensor, Tensor, float]
"""a_RH, b_OR and the scale s of one expert: delta = s (x a^T) b^T."""


@dataclass(frozen=True, slots=True)
class LoraPart:
    """What this process holds of one expert's pair at one linear.

    Attributes:
        a_RH: Some neighbouring rows of A.
        b_RO: Some neighbouring rows of B transposed.
        scale: s.
        rank: R of the whole pair.
        first_a: Number of the first row of ``a_RH`` among the R rows of A.
        first_b: Number of the first row of ``b_RO`` among the R rows of B transposed.
    """

    a_RH: Tensor
    b_RO: Tensor
    scale: float
    rank: int
    first_a: int = 0
    first_b: int = 0

    @property
    def whole(self) -> bool:
        """Whether all R rows of both matrices are here."""
        return self.a_RH.shape[0] == self.b_RO.shape[0] == self.rank


Expert = tuple[LoraPart | None, ...]
"""One expert at the N linears of a stack; None where it lacks one."""


@dataclass(frozen=True, slots=True)
class Packed:
    """The matrices of a stack of whole pairs, side by side.

    Attributes:
        a_CH: All A matrices, ordered by linear, then by expert, then by rank; C is their rows in all.
        b_CO: For each linear, its experts' transposed B matrices, [C_n, O_n].
        pair_of_C: For every row of ``a_CH``, n * E + e of the pair it belongs to.
    """

    a_CH: Tensor
    b_CO: tuple[Tensor, ...]
    pair_of_C: Tensor


@dataclass(frozen=True, slots=True)
class LoraStack:
    """Experts of N linears that share one input.

    Attributes:
        experts: E experts; their index is the id that operators take.
        in_features: H.
        out_features: O_n of every linear.
        dtype: Of inputs and deltas. Matrices have it too, or are bfloat16 (see ``plan.held_dtype``).
        scales_NE: s of every pair; 0 where the expert lacks the linear.
        max_rank: Largest R of a whole pair, 0 without any; equal in all processes that share the experts.
        packed: The same matrices side by side, of which those of ``experts`` are views; None where they are not.
        tables: Where kernels find the matrices; None before ``plan.located``, and where no kernels run.
        compiled: The same for the operation compiled for this CPU, outputs side by side; None where it does not run.
    """

    experts: tuple[Expert, ...]
    in_features: int
    out_features: tuple[int, ...]
    dtype: torch.dtype
    scales_NE: Tensor
    max_rank: int
    packed: Packed | None = None
    tables: Tables | None = None
    compiled: Group | None = None

    @property
    def num_linears(self) -> int:
        """N."""
        return len(self.out_features)

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.experts)

    @property
    def columns(self) -> tuple[int, ...]:
        """Rows of A held here, over all experts, of every linear."""
        return tuple(sum(p.a_RH.shape[0] for e in self.experts if (p := e[n])) for n in range(self.num_linears))

    @property
    def whole(self) -> bool:
        """Whether every pair is here with all its rows."""
        return all(part.whole for expert in self.experts for part in expert if part)

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        """All of them, A before transposed B, expert by expert."""
        parts = [part for expert in self.experts for part in expert if part]
        return tuple(matrix for part in parts for matrix in (part.a_RH, part.b_RO))

    @property
    def matrix_dtypes(self) -> frozenset[torch.dtype]:
        """Types of the matrices; the stack's own without any."""
        return frozenset(matrix.dtype for matrix in self.matrices) or frozenset({self.dtype})

    @property
    def nbytes(self) -> int:
        """Memory of the matrices in bytes."""
        return sum(matrix.nbytes for matrix in self.matrices)


def stack(
    experts: Sequence[Expert],
    in_features: int,
    out_features: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> LoraStack:
    """Joins experts, each with its part at every linear; no matrix is copied.

    Args:
        experts: E experts of N linears.
        in_features: H.
        out_features: O_n of every linear.
        dtype: Of inputs and deltas.
        device: Where the matrices are.
    """
    scales = [[part.scale if (part := expert[n]) else 0.0 for expert in experts] for n in range(len(out_features))]
    return LoraStack(
        experts=tuple(experts),
        in_features=in_features,
        out_features=tuple(out_features),
        dtype=dtype,
        scales_NE=torch.tensor(scales, dtype=torch.float32, device=device).view(len(out_features), len(experts)),
        max_rank=max((part.rank for expert in experts for part in expert if part), default=0),
    )


def whole_part(pair: Pair, dtype: torch.dtype) -> LoraPart:
    """A pair of which nothing is elsewhere."""
    a_RH, b_OR, scale = pair
    return LoraPart(a_RH.to(dtype).contiguous(), b_OR.to(dtype).T.contiguous(), scale, a_RH.shape[0])


def with_room(stack: LoraStack) -> LoraStack:
    """The stack with uninitialised matrices in the place of those that are not here yet."""
    device = stack.scales_NE.device

    def here(matrix: Tensor) -> Tensor:
        return torch.empty(matrix.shape, dtype=matrix.dtype, device=device) if matrix.is_meta else matrix

    experts = [
        tuple(part and replace(part, a_RH=here(part.a_RH), b_RO=here(part.b_RO)) for part in expert)
        for expert in stack.experts
    ]
    return replace(stack, experts=tuple(experts))
