"""The linears of a Llama-like block that may be routed: which read one input, and how a tp group splits them."""

from __future__ import annotations

SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Linears that read one input, in the order the block calls them."""

ROW_PARALLEL = frozenset({"o_proj", "down_proj"})
"""Linears a tp group splits by input features, as transformers' plans do; it splits the others by output features."""
