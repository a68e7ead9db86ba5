"""Finds a device's row of the launch table: one size after the other, the fastest, until nothing gets faster."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import patch

import torch

from meteora_dist.bench.kernel_checks import Sizes, random_stack
from meteora_dist.bench.kernels import timed
from meteora_kernels.gate.choice import GateChoice
from meteora_kernels.launch import DEFAULT, Tiles, parse_table, tiles_of
from meteora_kernels.routed_lora import plan

CANDIDATES: Mapping[str, Sequence[int]] = {
    "splits": (4, 8, 16),
    "inputs": (64, 128, 256),
    "project_columns": (16, 32, 64),
    "outputs": (64, 128, 256),
    "warps": (2, 4, 8),
    "stages": (1, 2, 3, 4),
    "few_tokens": (32, 64, 128),
    "dense_columns": (256, 512, 1024),
}
TOKENS = (1, 16, 64, 2048)
BANKS = (((8,), 28), ((8,), 96), ((8,), 1024))


def tuned(start: Tiles, candidates: Mapping[str, Sequence[int]], seconds_of: Callable[[Tiles], float]) -> Tiles:
    """The fastest sizes that changing one at a time leads to.

    Args:
        start: Where to begin.
        candidates: Values of each field.
        seconds_of: Time of a workload with given sizes; infinite where they do not fit.
    """
    best, least = start, seconds_of(start)
    while True:
        before = best
        for field, values in candidates.items():
            for value in values:
                changed = replace(best, **{field: value})
                if changed != best and (seconds := seconds_of(changed)) < least:
                    best, least = changed, seconds
        if best == before:
            return best


def tune_device(device: torch.device, path: Path) -> str:
    """Measures, and writes the row of this device into the table at ``path``; says what it has found."""
    name = plan.device_name(device)
    start = tiles_of(name)
    found = tuned(start, CANDIDATES, lambda tiles: workload_seconds(device, tiles))
    rows = json.loads(path.read_text()) if path.exists() else {DEFAULT: asdict(start)}
    rows[name] = asdict(found)
    parse_table(rows)
    path.write_text(json.dumps(rows, indent=1) + "\n")
    return f"{name}: {found}\nwritten to {path}"


def workload_seconds(device: torch.device, tiles: Tiles, sizes: Sizes | None = None, repeats: int = 7) -> float:
    """Time of decoding and prefill passes over banks of several sizes, each as a share that counts alike."""
    sizes = sizes or Sizes(banks=BANKS, tokens=TOKENS)
    total = 0.0
    with patch.object(plan, "tiles_of", lambda _: tiles):
        for ranks, experts in sizes.banks:
            pairs = random_stack(
                sizes, ranks, experts, torch.bfloat16 if device.type == "cuda" else torch.float32, device
            )
            gate_PH = torch.randn(len(sizes.outputs) * experts, sizes.width, device=device)
            for tokens in sizes.tokens:
                x_TH = torch.randn(tokens, sizes.width, device=device, dtype=pairs.dtype)

                def run() -> object:
                    return plan.fused(x_TH, gate_PH, GateChoice(2), pairs)  # noqa: B023

                try:
                    run()
                    seconds = statistics.median(timed(run, device) for _ in range(repeats))
                except RuntimeError:
                    # Tiles that need more shared memory or registers than there are.
                    return float("inf")
                total += seconds / (tokens + 64)
    return total
