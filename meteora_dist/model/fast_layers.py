"""Decoder layers of Llama's kind for inference on the CPU, in few operations.

A step of a small model spends its time in reading weights and in starting operations. So linears with one input are
one product of packed weights (``packed``), query and key are turned together, and sums are made in place. The twin is
transformers' own layer, which this one replaces: same weights, same arguments, and nearly the same numbers.

Shapes: T tokens of the pass, H hidden width, O output width of linears side by side, A attention heads,
G key-value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import PreTrainedModel

from meteora_dist.model.packed import PackedLinear, can_pack
from meteora_dist.model.paged_attention import AttentionPlan, attend, serves, use_paged_attention
from meteora_dist.moe.in_place import DeltasInPlace
from meteora_dist.moe.layer import RoutedLinear

LIKE_LLAMA = frozenset({"llama", "mistral", "qwen2"})
"""Model types whose layers compute what ``FastLayer`` does."""


def speed_up(model: PreTrainedModel) -> None:
    """Makes a frozen, possibly routed model fast in continuous batching on the CPU; it can do nothing else after that.

    Weights of layers are replaced by packed ones, layer by layer, so that memory grows by one layer's only for a while.
    A model of another kind, on another device or split over a tp group keeps its layers.
    """
    config = model.config.get_text_config()
    if model.device.type != "cpu" or not serves(config):
        return
    use_paged_attention(model)
    if config.model_type not in LIKE_LLAMA or model._device_mesh is not None or not can_pack(model.dtype):
        return
    decoder = model.get_decoder()
    for index, layer in enumerate(decoder.layers):
        decoder.layers[index] = FastLayer(layer, index)
    decoder.rotary_emb = SignedRotary(decoder.rotary_emb)
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        model.set_output_embeddings(PackedLinear([head]))


class SignedRotary(nn.Module):
    """The angles of ``rotary`` as ``turn`` takes them, once for all layers of a pass."""

    def __init__(self, rotary: nn.Module) -> None:
        """Wraps transformers' module."""
        super().__init__()
        self.rotary = rotary

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos_T1D and sin_T1D, the latter negative in its first half, of x [1, T, H] and position_ids [1, T]."""
        cos, sin = self.rotary(x, position_ids)
        half = sin.shape[-1] // 2
        return cos[0, :, None], torch.cat((-sin[0, :, None, :half], sin[0, :, None, half:]), dim=-1)


class FusedLinears(nn.Module):
    """Linears that read one input, with what their routed experts add: one tensor for all of their outputs."""

    def __init__(self, linears: Sequence[nn.Module]) -> None:
        """Packs ``linears``, plain or routed, in the order in which their block calls them."""
        super().__init__()
        bases, group, first = [], None, 0
        columns: list[slice] = []
        for linear in linears:
            base = linear.base_layer if isinstance(linear, RoutedLinear) else linear
            assert isinstance(base, nn.Linear), "blocks of Llama's kind have plain linears"
            if isinstance(linear, RoutedLinear):
                group = linear.group
                columns.append(slice(first, first + base.out_features))
            bases.append(base)
            first += base.out_features
        self._base = PackedLinear(bases)
        self._deltas = None if group is None else DeltasInPlace(group, columns, first)

    def forward(self, x_TH: Tensor) -> Tensor:
        """The outputs y_TY."""
        if self._deltas is None:
            return cast(Tensor, self._base(x_TH))
        # Rows are on their way to other ranks while the base's product is made.
        add_deltas = self._deltas.begin(x_TH)
        y_TY: Tensor = self._base(x_TH)
        add_deltas(y_TY)
        return y_TY


class FastLayer(nn.Module):
    """A decoder layer: attention and gated MLP, each after an RMS norm and around a residual."""

    def __init__(self, layer: Any, index: int) -> None:
        """Takes over the weights of transformers' ``layer``, number ``index`` of the model."""
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self._qkv = FusedLinears([attention.q_proj, attention.k_proj, attention.v_proj])
        self._o = FusedLinears([attention.o_proj])
        self._gate_up = FusedLinears([mlp.gate_proj, mlp.up_proj])
        self._down = FusedLinears([mlp.down_proj])
        self._norm, self._mlp_norm = FastNorm(layer.input_layernorm), FastNorm(layer.post_attention_layernorm)
        self._act = silu if isinstance(mlp.act_fn, nn.SiLU) else mlp.act_fn
        self._index, self._scaling = index, float(attention.scaling)
        width = attention.head_dim
        heads = _width(attention.q_proj) // width
        kv_heads = _width(attention.k_proj) // width
        self._heads, self._turned, self._all_heads = heads, heads + kv_heads, heads + 2 * kv_heads

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_plan: AttentionPlan,
        **others: Any,
    ) -> Tensor:
        """Hidden states [1, T, H] after the layer, from those before it."""
        h_TH = hidden_states[0]
        heads, turned = self._heads, self._turned
        qkv_TAD = self._qkv(self._norm(h_TH)).unflatten(-1, (self._all_heads, -1))
        qk_TAD = turn(qkv_TAD[:, :turned], *position_embeddings)
        o_TAD = attend(
            qk_TAD[:, :heads], qk_TAD[:, heads:], qkv_TAD[:, turned:], self._index, self._scaling, attention_plan
        )
        h_TH = self._o(o_TAD.flatten(1)).add_(h_TH)
        gate_up_TY = self._gate_up(self._mlp_norm(h_TH))
        gate_TO, up_TO = gate_up_TY.tensor_split(2, dim=1)
        out_TH: Tensor = self._down(self._act(gate_TO) * up_TO)
        return out_TH.add_(h_TH)[None]


class FastNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` with the root in fp32: Llama's norm in five operations."""

    def __init__(self, norm: Any) -> None:
        """Takes over the weight of transformers' ``norm``."""
        super().__init__()
        self.weight = norm.weight
        self._eps = torch.tensor(float(norm.variance_epsilon))

    def forward(self, x_TH: Tensor) -> Tensor:
        """The norm of x_TH, in its dtype."""
        wide_TH = x_TH.float()
        length_T1 = torch.linalg.vector_norm(wide_TH, dim=-1, keepdim=True)
        scale_T1 = torch.addcmul(self._eps, length_T1, length_T1, value=1 / x_TH.shape[-1]).rsqrt_()
        return (wide_TH * scale_T1).to(x_TH.dtype).mul_(self.weight)


def turn(x_TAD: Tensor, cos_T1D: Tensor, signed_sin_T1D: Tensor) -> Tensor:
    """Rotary position embedding of heads whose halves are turned against each other."""
    return x_TAD.roll(x_TAD.shape[-1] // 2, -1).mul_(signed_sin_T1D).addcmul_(x_TAD, cos_T1D)


def _width(linear: nn.Module) -> int:
    base = linear.base_layer if isinstance(linear, RoutedLinear) else linear
    assert isinstance(base, nn.Linear)
    return base.out_features
