"""A routed group some of whose experts are trained: a parameter of its own that is put in force whenever it is called.

Shapes: T tokens, N linears that share an input of width H, K slots, O_n output widths, R rank.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from meteora_dist.adapters import Adapter
from meteora_dist.adapters.write import write_changed
from meteora_dist.moe.experts import with_experts
from meteora_dist.moe.layer import RoutedGroup
from meteora_dist.training.objective import Gather


class GroupExperts(nn.Module):
    """The matrices of trained experts, and the group that computes with them.

    They are one parameter of this module, none of a child: ZeRO stage 3 gathers it when, and only when, it is called.
    One for all of them, because ZeRO adds up the gradients of workers in the order they come, and which experts tokens
    use, and which none does, differs from worker to worker.

    Attributes:
        group: With frozen experts for those that are not trained.
        lora: The matrices one after another, flat, fp32; None without any.
    """

    def __init__(self, group: RoutedGroup, experts: Collection[int]) -> None:
        """Takes the matrices of these ``experts`` from ``group``, which has one generation."""
        super().__init__()
        self.group = group
        self._stack = group.state.stack
        held = [(n, e, part) for e in sorted(experts) for n, part in enumerate(self._stack.experts[e]) if part]
        self._places = [(n, e, part.a_RH.shape, part.b_RO.shape) for n, e, part in held]
        flat = [matrix.float().flatten() for _, _, part in held for matrix in (part.a_RH, part.b_RO)]
        self.lora = nn.Parameter(torch.cat(flat)) if flat else None

    @property
    def names(self) -> tuple[str, ...]:
        """Module paths of the N linears."""
        return self.group.names

    def deltas(self, x_TH: Tensor, slots_TNK: Tensor, weights_TNK: Tensor) -> tuple[Tensor, ...]:
        """As ``RoutedGroup.deltas``, with the experts as they are now, in the dtype of the model."""
        if self.lora is None:
            return self.group.deltas(x_TH, slots_TNK, weights_TNK)
        self._install(self.lora.to(self._stack.dtype))
        first, *others = self.group.deltas(x_TH, slots_TNK, weights_TNK)
        # Where no token uses a trained expert, there is a gradient of zeros all the same.
        return first + 0 * self.lora[0].to(first.dtype), *others

    def _install(self, flat: Tensor) -> None:
        experts = [list(expert) for expert in self._stack.experts]
        for n, e, a_RH, b_RO in self._matrices(flat):
            part = experts[e][n]
            assert part is not None, "only pairs that are there are trained"
            experts[e][n] = replace(part, a_RH=a_RH, b_RO=b_RO)
        stack = with_experts(self._stack, [tuple(expert) for expert in experts])
        self.group.state = replace(self.group.state, stack=stack)

    def export(self, names: Sequence[str], gather: Gather) -> dict[str, Tensor]:
        """The trained pairs by ``lora.<expert>.<linear>.a`` [R, H] and ``.b`` [O, R]; ``names`` are all experts'."""
        if self.lora is None:
            return {}
        found: dict[str, Tensor] = {}
        for n, e, a_RH, b_RO in self._matrices(gather(self.lora).cpu()):
            name = f"lora.{names[e]}.{self.names[n]}"
            found |= {f"{name}.a": a_RH.clone(), f"{name}.b": b_RO.T.contiguous()}
        return found

    def _matrices(self, flat: Tensor) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """(linear, expert, A, B transposed) of every trained pair."""
        pieces = iter(flat.split([shape.numel() for _, _, *pair in self._places for shape in pair]))
        for n, e, shape_a, shape_b in self._places:
            yield n, e, next(pieces).view(shape_a), next(pieces).view(shape_b)


def write_trained_adapter(folder: Path, expert: str, adapter: Adapter, trained: Mapping[str, Tensor]) -> Path:
    """Writes ``adapter`` with the matrices that training has exported for ``expert``; returns the folder."""
    names = {linear: f"lora.{expert}.{linear}" for linear in adapter.shapes}
    pairs = {linear: (trained[f"{name}.a"], trained[f"{name}.b"]) for linear, name in names.items()}
    return write_changed(adapter, folder, pairs)
