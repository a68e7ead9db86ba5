"""Ways of computing a routed layer, of which one is ours.

    base      the linears alone
    one LoRA  a fixed expert on every linear, as PEFT computes it: nothing is routed
    gather    as the MeteoRA reference does: the A and B of every (token, slot) copied, then two batched products
    loop      as the MeteoRA reference trains: expert by expert, those of its tokens
    routed    ours: routed linears, each beside its plain one
    served    ours on a CPU: as inference runs them there, with packed weights

Shapes: T tokens, N linears of a group, H input width, O output width, E experts, K active ones, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from meteora_dist.model.fast_layers import FusedLinears
from meteora_dist.model.packed import can_pack
from meteora_dist.moe.dispatcher import LocalDispatcher, targets_of
from meteora_dist.moe.experts import stack_experts
from meteora_dist.moe.layer import GroupState, RoutedGroup, RoutedLinear, RoutingContext, SharedDeltas
from meteora_dist.moe.placement import contiguous
from meteora_dist.moe.routing import RoutingChoice, StepRouting, plan_step
from meteora_dist.moe.sharding import GroupShape
from meteora_dist.planning.shapes import ModelShape
from meteora_kernels.routed_lora.plan import located
from meteora_kernels.routed_lora.stack import LoraPart

Way = Callable[[Sequence[Tensor]], list[Tensor]]
"""Takes the input of every group of linears; returns the output of every linear."""

SCALE = 2.0


@dataclass(frozen=True, slots=True)
class BankLinear:
    """A linear and all that experts have for it.

    Attributes:
        base: The linear.
        gate_EH: Its gate, fp32.
        a_ERH: A of every expert.
        b_ERO: Transposed B of every expert.
    """

    base: nn.Linear
    gate_EH: Tensor
    a_ERH: Tensor
    b_ERO: Tensor


@dataclass(frozen=True, slots=True)
class BankLayer:
    """The linears of one layer, those with a shared input together."""

    groups: tuple[tuple[BankLinear, ...], ...]
    names: tuple[tuple[str, ...], ...]

    @classmethod
    def random(
        cls, shape: ModelShape, experts: int, rank: int, dtype: torch.dtype, device: torch.device, g: torch.Generator
    ) -> BankLayer:
        """A layer of a model's shape with ``experts`` experts of rank ``rank``."""

        def some(*size: int, scale: float) -> Tensor:
            return scale * torch.randn(size, generator=g, device=device)

        def one(width: int, out: int) -> BankLinear:
            base = nn.Linear(width, out, bias=False, dtype=dtype, device=device).requires_grad_(False)
            base.weight.copy_(some(out, width, scale=width**-0.5))
            a_ERH = some(experts, rank, width, scale=width**-0.5).to(dtype)
            b_ERO = some(experts, rank, out, scale=rank**-0.5).to(dtype)
            return BankLinear(base, some(experts, width, scale=width**-0.5), a_ERH, b_ERO)

        groups = tuple(tuple(one(part.in_features, part.out_features) for part in group) for group in shape.groups)
        return cls(groups, tuple(tuple(part.name for part in group) for group in shape.groups))

    @property
    def experts(self) -> int:
        """E."""
        return self.groups[0][0].gate_EH.shape[0]

    @property
    def widths(self) -> tuple[int, ...]:
        """Input width of every group."""
        return tuple(group[0].base.in_features for group in self.groups)

    def bytes_moved(self, way: str, inputs: Sequence[Tensor], top_k: int) -> int:
        """The least a way has to read and write: every expert in use once, every input and output once."""
        moved = 0
        for group, x_TH in zip(self.groups, inputs, strict=True):
            moved += x_TH.nbytes
            for part in group:
                moved += part.base.weight.nbytes + x_TH.shape[0] * part.base.out_features * x_TH.element_size()
                used = {"base": 0, "one LoRA": 1}.get(way)
                if used is None:
                    # Each expert is chosen alike by random gates; so many are, if none is chosen twice.
                    used = min(self.experts, x_TH.shape[0] * top_k)
                    moved += part.gate_EH.nbytes
                moved += used * (part.a_ERH[0].nbytes + part.b_ERO[0].nbytes)
        return moved


def ways_of(layer: BankLayer, tokens: int, top_k: int) -> dict[str, Way]:
    """Every way that there is on this device, ready to run on ``tokens`` tokens."""
    ways = {
        "base": lambda inputs: _each(layer, inputs, lambda part, x_TH: part.base(x_TH)),
        "one LoRA": lambda inputs: _each(layer, inputs, _one_lora),
        "gather": lambda inputs: _each(layer, inputs, lambda part, x_TH: _gather(part, x_TH, top_k)),
        "loop": lambda inputs: _each(layer, inputs, lambda part, x_TH: _loop(part, x_TH, top_k)),
        "routed": _routed(layer, tokens, top_k),
    }
    weight = layer.groups[0][0].base.weight
    if weight.device.type == "cpu" and can_pack(weight.dtype):
        ways["served"] = _served(layer, tokens, top_k)
    return ways


def _each(layer: BankLayer, inputs: Sequence[Tensor], one: Callable[[BankLinear, Tensor], Tensor]) -> list[Tensor]:
    return [one(part, x_TH) for group, x_TH in zip(layer.groups, inputs, strict=True) for part in group]


def _one_lora(part: BankLinear, x_TH: Tensor) -> Tensor:
    y_TO: Tensor = part.base(x_TH)
    return y_TO + SCALE * (linear(x_TH, part.a_ERH[0]) @ part.b_ERO[0])


def _top_k(part: BankLinear, x_TH: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    values_TK, ids_TK = torch.topk(linear(x_TH.float(), part.gate_EH), top_k)
    return ids_TK, torch.softmax(values_TK, dim=-1)


def _gather(part: BankLinear, x_TH: Tensor, top_k: int) -> Tensor:
    """The accelerated forward of the MeteoRA reference (its ``torch v1``): copies of matrices, and two ``bmm``."""
    ids_TK, weights_TK = _top_k(part, x_TH, top_k)
    pairs_P = ids_TK.flatten()
    x_P1H = x_TH.repeat_interleave(top_k, dim=0)[:, None]
    shrunk_P1R = torch.bmm(x_P1H, part.a_ERH[pairs_P].transpose(1, 2))
    delta_PO = torch.bmm(shrunk_P1R, part.b_ERO[pairs_P])[:, 0] * SCALE
    weighted_TKO = delta_PO.view(*ids_TK.shape, -1) * weights_TK[..., None].to(x_TH.dtype)
    y_TO: Tensor = part.base(x_TH)
    return y_TO + weighted_TKO.sum(1)


def _loop(part: BankLinear, x_TH: Tensor, top_k: int) -> Tensor:
    ids_TK, weights_TK = _top_k(part, x_TH, top_k)
    y_TO: Tensor = part.base(x_TH)
    for expert in range(part.gate_EH.shape[0]):
        tokens, slots = (ids_TK == expert).nonzero(as_tuple=True)
        delta_PO = linear(x_TH[tokens], part.a_ERH[expert]) @ part.b_ERO[expert]
        y_TO.index_add_(0, tokens, delta_PO * (SCALE * weights_TK[tokens, slots, None]).to(x_TH.dtype))
    return y_TO


def _routed(layer: BankLayer, tokens: int, top_k: int) -> Way:
    context, linears = _linears(layer)
    step = _step(layer, tokens, top_k)

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        with context.routed(step):
            return [one(x_TH) for group, x_TH in zip(linears, inputs, strict=True) for one in group]

    return run


def _served(layer: BankLayer, tokens: int, top_k: int) -> Way:
    context, linears = _linears(layer)
    step = _step(layer, tokens, top_k)
    fused = [FusedLinears(group) for group in linears]
    widths = [[part.base.out_features for part in group] for group in layer.groups]

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        with context.routed(step):
            outputs = [one(x_TH) for one, x_TH in zip(fused, inputs, strict=True)]
        return [y_TO for y_TY, parts in zip(outputs, widths, strict=True) for y_TO in y_TY.split(parts, dim=1)]

    return run


def _step(layer: BankLayer, tokens: int, top_k: int) -> StepRouting:
    with torch.device(layer.groups[0][0].base.weight.device):
        return plan_step([RoutingChoice(top_k=top_k)], [tokens], layer.experts, min(top_k, layer.experts))


def _linears(layer: BankLayer) -> tuple[RoutingContext, list[list[RoutedLinear]]]:
    context = RoutingContext(tuple(f"expert-{e}" for e in range(layer.experts)))
    linears = []
    for group, names in zip(layer.groups, layer.names, strict=True):
        shared = SharedDeltas(_group(group, names, context))
        linears.append([RoutedLinear(part.base, shared, index) for index, part in enumerate(group)])
    return context, linears


def _group(group: Sequence[BankLinear], names: tuple[str, ...], context: RoutingContext) -> RoutedGroup:
    experts, rank, width = group[0].a_ERH.shape
    base = group[0].base.weight
    shape = GroupShape(names, width, tuple(part.base.out_features for part in group))
    pairs = [tuple(LoraPart(part.a_ERH[e], part.b_ERO[e], SCALE, rank) for part in group) for e in range(experts)]
    state = GroupState(
        gates=(torch.cat([part.gate_EH for part in group]),),
        absent=(None,),
        targets_DG=targets_of(contiguous(experts, 1), 0, base.device),
        stack=located(stack_experts(pairs, shape, base.dtype, base.device)),
    )
    return RoutedGroup(shape, state, LocalDispatcher(), context)
