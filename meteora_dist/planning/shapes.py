"""The shape of a dense Llama-like model: its linears and its parameters, counted from config.json.

Shapes: H hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from meteora_dist.errors import PlanError
from meteora_dist.moe.linears import ROW_PARALLEL, SHARED_INPUTS

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_OPTIONAL = ("num_key_value_heads", "head_dim")
_SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias")
_KINDS = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class LinearShape:
    """One linear of a layer: ``name`` is the last part of its module path."""

    name: str
    in_features: int
    out_features: int
    bias: bool = False

    @property
    def row_parallel(self) -> bool:
        """Whether a tp group splits it by input features."""
        return self.name in ROW_PARALLEL

    def local(self, tp: int) -> tuple[int, int]:
        """(input, output) features of one rank of a tp group."""
        if self.row_parallel:
            return self.in_features // tp, self.out_features
        return self.in_features, self.out_features // tp

    def parameters(self, tp: int) -> int:
        """Weight and bias numbers of one rank of a tp group."""
        in_features, out_features = self.local(tp)
        return in_features * out_features + self.bias * out_features


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a model that decide what it takes.

    Attributes:
        hidden: H.
        mlp: Width inside the MLP.
        layers: How many layers.
        heads: Query heads of a layer.
        kv_heads: Key and value heads of a layer.
        head_dim: Numbers of a head.
        vocabulary: V.
        tied: Whether the output layer is the embedding.
        qkv_bias: Whether q, k and v have biases.
        o_bias: Whether o has one.
        mlp_bias: Whether the MLP's linears have biases.
        qk_norm: Whether each head's queries and keys are normalised.
    """

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @property
    def groups(self) -> tuple[tuple[LinearShape, ...], ...]:
        """The linears of a layer, those that share an input together, in the order of a pass."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        linears = {
            "q_proj": (self.hidden, queries, self.qkv_bias),
            "k_proj": (self.hidden, keys, self.qkv_bias),
            "v_proj": (self.hidden, keys, self.qkv_bias),
            "o_proj": (queries, self.hidden, self.o_bias),
            "gate_proj": (self.hidden, self.mlp, self.mlp_bias),
            "up_proj": (self.hidden, self.mlp, self.mlp_bias),
            "down_proj": (self.mlp, self.hidden, self.mlp_bias),
        }
        return tuple(tuple(LinearShape(name, *linears[name]) for name in names) for names in SHARED_INPUTS)

    def parameters(self, tp: int = 1) -> int:
        """Parameters of one rank of a tp group; norms are on every rank, the vocabulary is split in runs."""
        norms = 2 * self.hidden + 2 * self.head_dim * self.qk_norm
        layer = sum(linear.parameters(tp) for group in self.groups for linear in group) + norms
        tables = (1 if self.tied else 2) * -(-self.vocabulary // tp) * self.hidden
        return self.layers * layer + tables + self.hidden

    def refusal(self, tp: int) -> str | None:
        """Why ``tp`` ranks cannot split this model; None when they can."""
        parts = {"attention heads": self.heads, "key-value heads": self.kv_heads, "MLP features": self.mlp}
        for what, count in parts.items():
            if count % tp:
                return f"tp {tp} does not divide the {count} {what}"
        return None


def from_config(fields: Mapping[str, Any], where: str) -> ModelShape:
    """The shape in a transformers config.json.

    Args:
        fields: Its content.
        where: Its path, for messages.

    Raises:
        PlanError: It is of another kind of model, or a size is missing or no positive whole number; names the field.
    """
    kind = fields.get("model_type")
    if kind not in _KINDS:
        raise PlanError(f"{where}: model_type is {kind!r}; this arithmetic knows {', '.join(_KINDS)}")
    # Only Llama's own default is one key-value head a query head.
    needed = _SIZES if kind == "llama" else (*_SIZES, "num_key_value_heads")
    if missing := [name for name in needed if fields.get(name) is None]:
        raise PlanError(f"{where}: lacks {', '.join(missing)}")
    sizes = {name: fields[name] for name in (*_SIZES, *_OPTIONAL) if fields.get(name) is not None}
    for name, value in sizes.items():
        if type(value) is not int or value < 1:
            raise PlanError(f"{where}: {name} is {value!r}; it must be a whole number of at least 1")
    for name in _SWITCHES:
        if type(fields.get(name, False)) is not bool:
            raise PlanError(f"{where}: {name} is {fields[name]!r}; it must be true or false")
    heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
    attention_bias = fields.get("attention_bias", False)
    return ModelShape(
        hidden=hidden,
        mlp=sizes["intermediate_size"],
        layers=sizes["num_hidden_layers"],
        heads=heads,
        kv_heads=sizes.get("num_key_value_heads", heads),
        # Qwen3 declares its own default; the others divide the width among the heads.
        head_dim=sizes.get("head_dim", 128 if kind == "qwen3" else hidden // heads),
        vocabulary=sizes["vocab_size"],
        tied=fields.get("tie_word_embeddings", False),
        qkv_bias=kind == "qwen2" or (kind != "mistral" and attention_bias),
        o_bias=kind in ("llama", "qwen3") and attention_bias,
        mlp_bias=kind == "llama" and fields.get("mlp_bias", False),
        qk_norm=kind == "qwen3",
    )
