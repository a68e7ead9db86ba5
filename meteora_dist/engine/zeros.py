"""A large buffer of zeros that costs memory and time only where it is used."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class ZerosOnDemand(TorchFunctionMode):
    """While it is on, ``torch.zeros(bytes, dtype=torch.uint8)`` on the CPU is zeroed by the kernel, page by page.

    transformers makes the whole KV cache that way, gigabytes of it, when an engine starts.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Answers that one call, and passes on every other."""
        kwargs = kwargs or {}
        if func is torch.zeros and _is_large_buffer(args, **kwargs):
            pages = mmap.mmap(-1, args[0], flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            return torch.frombuffer(pages, dtype=torch.uint8)
        return func(*args, **kwargs)


def _is_large_buffer(
    args: tuple[Any, ...], dtype: torch.dtype | None = None, device: Any = "cpu", **others: Any
) -> bool:
    of_bytes = len(args) == 1 and isinstance(args[0], int) and args[0] >= mmap.PAGESIZE and dtype is torch.uint8
    return of_bytes and torch.device(device).type == "cpu" and not others
