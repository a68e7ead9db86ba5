"""What routing costs a layer: our operators against other ways of computing the same, and against the memory.

A case is one transformer layer's linears with a random bank. All ways compute the same outputs from the same inputs,
in turn in one run; medians are reported. On a GPU the operators are kernels, and time is the GPU's; elsewhere they
are torch's.

Shapes: T tokens, H input width, O output width, E experts, K active ones, R rank.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from meteora_dist.bench.kernel_ways import BankLayer, Way, ways_of
from meteora_dist.planning.known import shape_of

WARM_UP = 3


@dataclass(frozen=True, slots=True)
class KernelPlan:
    """What is measured: every way at every number of tokens and experts, ``repeats`` times, in turn.

    Attributes:
        model: A known model's name, or a folder with its config.
        tokens: T of every case.
        experts: E of every case.
        rank: R.
        top_k: K.
        layers: Layers a run goes through, so that caches do not hold all of them.
        repeats: Rounds.
        dtype: Of base model and experts.
        device: Where.
    """

    model: str
    tokens: tuple[int, ...]
    experts: tuple[int, ...]
    rank: int
    top_k: int
    layers: int
    repeats: int
    dtype: torch.dtype
    device: torch.device

    @property
    def rounds(self) -> int:
        """Rounds in all, over all cases."""
        return len(self.tokens) * len(self.experts) * (self.repeats + WARM_UP)


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One result, of one layer.

    Attributes:
        way: Who computed.
        tokens: T.
        experts: E.
        rank: R.
        milliseconds: Median.
        of_base: That time over the base linears' in the same run.
        bytes_moved: What has to be read and written at least: weights, gates, experts in use, inputs and outputs.
        floor_share: Share of the time that moving these bytes takes at the memory's speed.
    """

    way: str
    tokens: int
    experts: int
    rank: int
    milliseconds: float
    of_base: float
    bytes_moved: int
    floor_share: float


@torch.no_grad()
def measure_kernels(plan: KernelPlan, advance: Callable[[], None]) -> list[KernelRow]:
    """Measures all cases; ``advance`` is called after every round."""
    speed = memory_speed(plan.device)
    rows: list[KernelRow] = []
    for experts in plan.experts:
        generator = torch.Generator(plan.device).manual_seed(0)
        layers = [
            BankLayer.random(shape_of(plan.model), experts, plan.rank, plan.dtype, plan.device, generator)
            for _ in range(plan.layers)
        ]
        for tokens in plan.tokens:
            rows += _measure_case(plan, layers, tokens, speed, generator, advance)
    return rows


def _measure_case(
    plan: KernelPlan, layers: list[BankLayer], tokens: int, speed: float, generator: torch.Generator,
    advance: Callable[[], None],
) -> Iterator[KernelRow]:  # fmt: skip
    inputs = [
        [torch.randn(tokens, width, generator=generator, device=plan.device).to(plan.dtype) for width in layer.widths]
        for layer in layers
    ]
    ways = [ways_of(layer, tokens, plan.top_k) for layer in layers]
    names = list(ways[0])
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(plan.repeats + WARM_UP):
        for name in names:
            seconds = timed(lambda: _run([way[name] for way in ways], inputs), plan.device)  # noqa: B023
            if round_number >= WARM_UP:
                times[name].append(seconds / len(layers))
        advance()
    base = statistics.median(times["base"])
    for name in names:
        seconds = statistics.median(times[name])
        moved = layers[0].bytes_moved(name, inputs[0], plan.top_k)
        yield KernelRow(
            name, tokens, layers[0].experts, plan.rank, 1e3 * seconds, seconds / base, moved, moved / speed / seconds
        )


def _run(ways: list[Way], inputs: list[list[Tensor]]) -> None:
    for way, layer_inputs in zip(ways, inputs, strict=True):
        way(layer_inputs)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run of ``work``: the GPU's own where there is one."""
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    torch.cuda.synchronize(device)
    return 1e-3 * float(start.elapsed_time(end))


def memory_speed(device: torch.device, nbytes: int = 1 << 28) -> float:
    """Bytes a second that copies of a large tensor read and write here."""
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = [timed(lambda: target.copy_(source), device) for _ in range(WARM_UP + 5)]
    return 2 * nbytes / statistics.median(seconds[WARM_UP:])
