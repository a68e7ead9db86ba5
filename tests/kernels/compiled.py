"""Compiles every kernel launched inside for a GPU this machine need not have, instead of running it.

It needs a process that has imported triton with TRITON_INTERPRET=0; nothing is computed, outputs stay uninitialised.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

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
            signature[param.name] = _type(value, param.is_constexpr)
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


def _type(value: Any, constant: bool) -> str:
    # As the launcher has it: None and 1 become part of the program.
    if constant or value is None or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"
