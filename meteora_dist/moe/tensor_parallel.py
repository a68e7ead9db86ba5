"""Routed linears in a tp group: what its ranks add up, and how a delta meets transformers' own tensor parallelism.

transformers splits the base model by a plan: it replaces the ``forward`` of each planned linear by one that runs the
plan's style around the local product. A column-parallel linear needs no more than that. The delta of a row-parallel
one is a part, like the local product, and has to be added before the style adds up the parts of all ranks.

Shapes: T tokens, H input width, O output width.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES, replace_layer_number_by_wildcard
from transformers.distributed.tensor_parallel import TensorParallelLayer

from meteora_dist.moe.layer import RoutedLinear, SharedDeltas
from meteora_dist.moe.sharding import Split
from meteora_dist.moe.wire import ExchangeKind, Wire


class TensorParallel:
    """The ranks that share one base model, as one of them sees it; all of them make the same calls in the same order.

    Attributes:
        mesh: The tp ranks.
        size: How many they are.
        rank: This one's place among them.
    """

    def __init__(self, mesh: DeviceMesh, wire: Wire) -> None:
        """Binds the one-dimensional mesh of a tp group; ``wire`` counts what is added up."""
        self.mesh = mesh
        self.size: int = mesh.size()
        self.rank: int = mesh.get_local_rank()
        self._group = mesh.get_group()
        self._wire = wire

    @classmethod
    def of(cls, model: PreTrainedModel, wire: Wire) -> TensorParallel | None:
        """The tp group transformers has loaded ``model`` for, or None where a rank holds it whole."""
        # transformers keeps the mesh there for its own generation code, and names it nowhere else.
        mesh: DeviceMesh | None = model._device_mesh
        return None if mesh is None else cls(mesh["tp"], wire)

    def add_up(self, parts: Tensor, kind: ExchangeKind) -> Tensor:
        """Adds up the ranks' ``parts`` [T, ...] in place; no rows on one rank means none on any."""
        if parts.shape[0]:
            with self._wire.count(kind, parts.shape[0], parts.nbytes):
                dist.all_reduce(parts, group=self._group)
        return parts


class RowParallelLinear(RoutedLinear):
    """A routed linear whose base is split by inputs: local product and delta are parts, and are added up together."""

    def __init__(
        self, base_layer: nn.Linear, shared: SharedDeltas, index: int, style: TensorParallelLayer, mesh: DeviceMesh
    ) -> None:
        """Wraps ``base_layer``, on which transformers has installed ``style`` over ``mesh``. For inference only."""
        super().__init__(base_layer, shared, index)
        self._style = style
        self._mesh = mesh

    def forward(self, x: Tensor) -> Tensor:
        """Y [..., O], the same on every rank, of its slice x [..., H]; what ``style`` does, with the delta inside."""
        base = self.base_layer
        (x,), _ = self._style.transform_inputs_pre_forward(base, (x,), {}, self._mesh)
        with self._style.context_around_forward(base, self._mesh):
            # The class's own forward: the instance's would add up the parts too early.
            y: Tensor = type(base).forward(base, x)
        y = self.with_delta(y, x)
        total: Tensor = self._style.transform_output_post_forward(base, y, self._mesh)
        return total


def split_of(model: PreTrainedModel, linear: str) -> Split | None:
    """How the model's plan splits a linear over its tp group; None for another way than routed linears can follow."""
    splits: dict[str, Split] = {"colwise": "outputs", "rowwise": "inputs"}
    return splits.get(_style_name(model, linear))


def routed_linear(
    model: PreTrainedModel, name: str, tp: TensorParallel | None, shared: SharedDeltas, index: int
) -> RoutedLinear:
    """The routed linear that takes the place of linear ``name``."""
    base = model.get_submodule(name)
    assert isinstance(base, nn.Linear), f"{name} was found among the linears"
    if tp is None or split_of(model, name) == "outputs":
        return RoutedLinear(base, shared, index)
    return RowParallelLinear(base, shared, index, ALL_PARALLEL_STYLES[_style_name(model, name)], tp.mesh)


def _style_name(model: PreTrainedModel, linear: str) -> str:
    return model.tp_plan.get(replace_layer_number_by_wildcard(linear), "")
