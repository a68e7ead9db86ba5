"""Compiles every kernel launched inside for a GPU this machine need not have, instead of running it.

It needs a process that has imported triton with TRITON_INTERPRET=0; nothing is computed, outputs stay uninitialised.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from meteora_kernels.gate.choice import GateChoice
from meteora_kernels.gate.kernel import choose
from meteora_kernels.launch import DEFAULT, launch_of, tiles_of
from meteora_kernels.pair_order.kernel import pair_order
from meteora_kernels.permute.kernel import permute, unpermute
from meteora_kernels.routed_lora.dense import pack
from meteora_kernels.routed_lora.operators import fused, routed_lora
from meteora_kernels.routed_lora.outer.kernel import launch_outer
from meteora_kernels.routed_lora.stack import LoraStack
from meteora_kernels.routed_lora.tables import tables_of
from tests.kernels.gpu_cases import random_stack

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


@contextmanager
def compiling_only(capability: int) -> Iterator[dict[str, list[int]]]:
    """Yields the bytes of shared memory of every compilation by kernel name; ``capability`` is 90 for an H100."""
    found: dict[str, list[int]] = {}
    seen: set[str] = set()
    original = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = [param.name for param in self.params]
        options = {name: value for name, value in kwargs.items() if name not in names}
        values = dict(zip(names, args, strict=False)) | {n: v for n, v in kwargs.items() if n in names}
        signature, constants = {}, {}
        for index, param in enumerate(self.params):
            value = values[param.name]
            signature[param.name] = _type(value, param.is_constexpr, param.do_not_specialize)
            if signature[param.name] == "constexpr":
                constants[(index,)] = value
        key = f"{self.__name__} {signature} {constants} {options}"
        if key in seen:
            return
        seen.add(key)
        source = ASTSource(self, signature, constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        found.setdefault(self.__name__, []).append(compiled.metadata.shared)

    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = original


def _type(value: Any, constant: bool, general: bool) -> str:
    # As the launcher has it: None and 1 become part of the program.
    if constant or value is None or (isinstance(value, int) and value == 1 and not general):
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def compile_all(capability: int) -> dict[str, list[int]]:
    """Compiles what bf16 passes of 1, 16 and 4,096 tokens launch, with and without gradients; both regimes."""
    g = torch.Generator().manual_seed(0)
    with compiling_only(capability) as found:
        for experts, ranks in ((4, (8,)), (40, (8, 64))):
            stack = random_stack(g, experts, ranks, 256, (256, 128), torch.bfloat16)
            for laid_out in (stack, pack(stack)):
                for tokens in (1, 16, 4096):
                    _launch(laid_out, tokens)
    return found


def _launch(stack: LoraStack, tokens: int) -> None:
    tiles = tiles_of(DEFAULT)
    launch, tables = launch_of(tokens, tiles), tables_of(stack, tiles.outputs)
    gate_PH = torch.zeros(2 * stack.num_experts, stack.in_features)
    x_TH = torch.zeros(tokens, stack.in_features, dtype=stack.dtype)
    every = torch.arange(stack.num_experts)
    ids_TK, weights_TK = torch.zeros(tokens, 2, dtype=torch.long), torch.zeros(tokens, 2)
    mixed = GateChoice(
        2, True, torch.ones(tokens, dtype=torch.bool), torch.ones(tokens, dtype=torch.long), torch.ones(tokens, 1),
        ids_TK, weights_TK, every > 1, torch.zeros(2, 1, dtype=torch.bool), every, every,
    )  # fmt: skip
    named = GateChoice(2, gated=False, ids_TK=ids_TK, weights_TK=weights_TK)
    for choice in (GateChoice(2), mixed, named):
        fused(x_TH, gate_PH if choice.gated else None, choice, stack, tables, launch)
    ids_TNK, weights_TNK = torch.zeros(tokens, 2, 2, dtype=torch.long), torch.zeros(tokens, 2, 2)
    routed_lora(x_TH, stack, tables, ids_TNK, weights_TNK, launch)
    deltas = routed_lora(x_TH.requires_grad_(), stack, tables, ids_TNK, weights_TNK.requires_grad_(), launch)
    sum(delta.sum() for delta in deltas).backward()
    order = pair_order(ids_TNK, stack.num_experts)
    shrunk = torch.zeros(tokens, 2, 2, stack.max_rank)
    launch_outer(shrunk, x_TH.detach(), tables.a, stack.scales_NE, weights_TNK.detach(), order, launch)
    local_DTNK, position_DT = ids_TNK.expand(2, *ids_TNK.shape), torch.zeros(2, tokens, dtype=torch.long)
    rows_SH, _, _ = permute(x_TH.detach(), local_DTNK, weights_TNK.detach(), position_DT, 2 * tokens)
    unpermute(rows_SH, position_DT, tokens)
    logits_TNE = torch.zeros(tokens, 2, stack.num_experts, requires_grad=True)
    for choice in (GateChoice(2), replace(mixed, slot_E=None, local_G=None, ids_TK=None, weights_TK=None)):
        choose(logits_TNE, choice, tokens, 2).weights_TNK.sum().backward()


if __name__ == "__main__":
    for wanted in map(int, sys.argv[1:]):
        for name, shared in sorted(compile_all(wanted).items()):
            print(f"sm_{wanted} {name}: {len(shared)} variants, at most {max(shared)} bytes of shared memory")
