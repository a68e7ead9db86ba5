"""The linears of a Llama-like block that may be routed: which read one input, and how a tp group splits them."""

from __future__ import annotations

import re

SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Linears that read one input, in the order the block calls them."""

ROW_PARALLEL = frozenset({"o_proj", "down_proj"})
"""Linears a tp group splits by input features, as transformers' plans do; it splits the others by output features."""

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def layer_of(linear: str) -> int:
    """Number of the decoder layer that the linear at this module path is part of; 0 when it is part of none."""
    found = _LAYER.search(linear)
    return int(found[1]) if found else 0
