"""Which part of the linears of a group, and of their experts' pairs, a rank of a tp group holds: arithmetic only.

    split by outputs (column-parallel)          split by inputs (row-parallel)
      x_TH        whole on every rank             x_TH        a slice of H on every rank
      A_RH        some ranks R, all inputs        A_RH        all ranks R, the slice of H
      B_OR        a slice of O, all ranks R       B_OR        all outputs, some ranks R
      delta_TO    a slice of O on every rank      delta_TO    parts that add up, as the base linear's do

Between the two, x A^T is added up over the tp group: there every number is either held by one rank alone, or a sum of
parts. R is split evenly whatever R, E and tp are, so every rank does the same work for every token.

Shapes: T tokens, H input width, O_n output width of linear n, N linears, R rank.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal

from meteora_dist.adapters import PairCut
from meteora_dist.moe.linears import layer_of

Split = Literal["outputs", "inputs"]


@dataclass(frozen=True, slots=True)
class GroupShape:
    """N linears that share one input, and one rank's part of them.

    Attributes:
        names: Their module paths, in the order the block calls them.
        in_features: H of the whole model.
        out_features: O_n of the whole model.
        split: How a tp group shares them.
        tp: Ranks of the tp group.
        tp_rank: This rank's place in it.
    """

    names: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]
    split: Split = "outputs"
    tp: int = 1
    tp_rank: int = 0

    @property
    def layer(self) -> int:
        """Number of their decoder layer."""
        return layer_of(self.names[0])

    @property
    def inputs(self) -> slice:
        """The input features this rank sees."""
        return chunk(self.in_features, self.tp, self.tp_rank) if self.split == "inputs" else slice(0, self.in_features)

    @property
    def local_inputs(self) -> int:
        """How many they are."""
        return len(range(self.in_features)[self.inputs])

    def outputs(self, linear: int) -> slice:
        """The output features of linear n that this rank's deltas cover."""
        width = self.out_features[linear]
        return chunk(width, self.tp, self.tp_rank) if self.split == "outputs" else slice(0, width)

    @property
    def local_outputs(self) -> tuple[int, ...]:
        """How many they are, for every linear."""
        return tuple(len(range(width)[self.outputs(n)]) for n, width in enumerate(self.out_features))

    def cut(self, linear: int, rank: int, digest: str) -> PairCut:
        """What this rank holds of an expert's pair at linear n.

        Args:
            linear: n.
            rank: R of the pair.
            digest: Of the expert; it decides which tp ranks hold one of R's ranks more where R does not divide.
        """
        turn = zlib.crc32(f"{digest}{self.names[linear]}".encode())
        ranks, every = share(rank, self.tp, self.tp_rank, turn), slice(0, rank)
        by_outputs = self.split == "outputs"
        return PairCut(
            inputs=self.inputs,
            outputs=self.outputs(linear),
            ranks_a=ranks if by_outputs else every,
            ranks_b=every if by_outputs else ranks,
        )


def chunk(size: int, parts: int, index: int) -> slice:
    """Part ``index`` of ``size`` features, as transformers' plans split them: the last parts may be shorter."""
    step = -(-size // parts)
    return slice(min(size, step * index), min(size, step * (index + 1)))


def share(size: int, parts: int, index: int, turn: int) -> slice:
    """Part ``index`` of ``size``, in lengths that differ by one at most; ``turn`` moves the longer ones around.

    Eight over three, turn 0: 3, 3 and 2. Turn 1: 2, 3 and 3, where part 1 comes first and part 0 last.
    """
    place = (index - turn) % parts
    each, rest = divmod(size, parts)
    start = place * each + min(place, rest)
    return slice(start, start + each + (place < rest))
