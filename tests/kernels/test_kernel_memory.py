"""What the operators allocate and launch at 4,096 tokens, with many experts; kernels are not run for that."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from meteora_kernels.gate.choice import GateChoice
from meteora_kernels.launch import DEFAULT, launch_of, tiles_of
from meteora_kernels.routed_lora import operators
from meteora_kernels.routed_lora.dense import pack
from meteora_kernels.routed_lora.stack import LoraPart, stack
from meteora_kernels.routed_lora.tables import tables_of

TOKENS, WIDTH = 4096, 256


class _Peak(TorchDispatchMode):
    """Follows the bytes of all tensors made inside, and keeps the highest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.highest = 0

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and str(func).startswith(("aten.empty", "aten.cat", "aten.zeros")):
            size = made.untyped_storage().nbytes()
            self.now += size
            self.highest = max(self.highest, self.now)
            weakref.finalize(made.untyped_storage(), self._gone, size)
        return made

    def _gone(self, size: int) -> None:
        self.now -= size


@pytest.mark.parametrize(("experts", "dense"), [(8, True), (28, True), (28, False), (1024, False), (10_000, False)])
@pytest.mark.parametrize("fused", [True, False])
def test_between_the_launches_is_at_most_twice_the_output(experts: int, dense: bool, fused: bool) -> None:
    # All experts share one pair of matrices: only what the operators allocate counts.
    part = LoraPart(torch.zeros(8, WIDTH), torch.zeros(8, WIDTH), 1.0, 8)
    pairs = stack([(part, part, part)] * experts, WIDTH, (WIDTH, WIDTH, WIDTH), torch.float32)
    pairs = pack(pairs) if dense else pairs
    tiles = tiles_of(DEFAULT)
    launch, tables = launch_of(TOKENS, tiles), tables_of(pairs, tiles.outputs)
    x_TH, gate_PH = torch.zeros(TOKENS, WIDTH), torch.zeros(3 * experts, WIDTH)
    ids_TNK, weights_TNK = torch.zeros(TOKENS, 3, 2, dtype=torch.long), torch.zeros(TOKENS, 3, 2)
    with patch.object(GridExecutor, "__call__", lambda *_, **__: None), _Peak() as peak:
        if fused:
            _, deltas = operators.fused(x_TH, gate_PH, GateChoice(2), pairs, tables, launch)
        else:
            deltas = operators.routed_lora(x_TH, pairs, tables, ids_TNK, weights_TNK, launch)
    output = sum(delta.nbytes for delta in deltas)
    assert peak.now >= output
    assert peak.highest - output <= 2 * output


@pytest.mark.parametrize("gates", [28, 1024])
def test_prefill_takes_three_launches(gates: int) -> None:
    # q, k and v of Llama-3.1-8B in bfloat16; as many tokens as a prefill brings.
    part = [LoraPart(torch.zeros(8, 4096).bfloat16(), torch.zeros(8, o).bfloat16(), 1.0, 8) for o in (4096, 1024, 1024)]
    pairs = stack([tuple(part)] * gates, 4096, (4096, 1024, 1024), torch.bfloat16)
    tiles = tiles_of(DEFAULT)
    x_TH, gate_PH = torch.zeros(TOKENS, 4096, dtype=torch.bfloat16), torch.zeros(3 * gates, 4096)
    launched: list[str] = []
    with patch.object(GridExecutor, "__call__", lambda self, *_, **__: launched.append(self.fn.__name__)):
        tables = tables_of(pairs, tiles.outputs)
        operators.fused(x_TH, gate_PH, GateChoice(2), pairs, tables, launch_of(TOKENS, tiles))
    assert launched == ["project_kernel", "route_shrink_kernel", "expand_kernel"]
