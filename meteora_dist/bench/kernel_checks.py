"""Checks that need the GPU itself: kernels against the fp32 reference, batches, and a captured CUDA graph.

The same functions run small on a CPU in Triton's interpreter, but for the graph.

Shapes: T tokens, N linears of a group, H input width, O output width, E experts, K active ones, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from meteora_kernels.gate.choice import GateChoice
from meteora_kernels.routed_lora import plan
from meteora_kernels.routed_lora.reference import routed_lora_reference
from meteora_kernels.routed_lora.stack import LoraStack, stack, whole_part

SANITIZER = "compute-sanitizer --tool memcheck meteora bench kernels --check"
LIMITS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-2}
TOP_K = 2


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: ``found`` is a relative error or a greatest difference, ``limit`` the most that is right."""

    check: str
    case: str
    found: float
    limit: float

    @property
    def right(self) -> bool:
        """Whether it is; a number that is none is not."""
        return self.found <= self.limit


@dataclass(frozen=True, slots=True)
class Sizes:
    """A group of linears and the passes over it.

    Attributes:
        width: H.
        outputs: O of every linear.
        banks: Ranks of the experts of each bank, in turn, and E.
        tokens: T of each pass.
    """

    width: int = 4096
    outputs: tuple[int, ...] = (4096, 1024, 1024)
    banks: tuple[tuple[tuple[int, ...], int], ...] = (((8,), 28), ((8, 64, 1), 300))
    tokens: tuple[int, ...] = (1, 17, 64, 2048)


def check_kernels(device: torch.device, dtypes: Sequence[torch.dtype], sizes: Sizes | None = None) -> list[Finding]:
    """All checks on all banks, in all types."""
    sizes = sizes or Sizes()
    findings: list[Finding] = []
    for dtype in dtypes:
        for ranks, experts in sizes.banks:
            pairs = random_stack(sizes, ranks, experts, dtype, device)
            gate_PH = _random(device, 7, len(sizes.outputs) * experts, sizes.width) * sizes.width**-0.5
            case = f"{str(dtype).removeprefix('torch.')}, {experts} experts"
            for tokens in sizes.tokens:
                x_TH = _random(device, tokens, tokens, sizes.width).to(dtype)
                findings += _values(f"{case}, {tokens} tokens", x_TH, gate_PH, pairs)
            findings += _gradients(case, x_TH[: sizes.tokens[1]], pairs)
            findings.append(_alone(case, x_TH, gate_PH, pairs))
            if device.type == "cuda":
                findings.append(_captured(case, x_TH[:8], gate_PH, pairs))
    return findings


def random_stack(
    sizes: Sizes, ranks: Sequence[int], experts: int, dtype: torch.dtype, device: torch.device
) -> LoraStack:
    """Random experts in the regime their number asks for."""

    def pair(n: int, e: int) -> tuple[Tensor, Tensor, float]:
        rank = ranks[e % len(ranks)]
        a_RH = _random(device, 1000 * n + e, rank, sizes.width) * sizes.width**-0.5
        return a_RH, _random(device, 1 + 1000 * n + e, sizes.outputs[n], rank) * rank**-0.5, 2.0

    rows = [tuple(whole_part(pair(n, e), dtype) for n in range(len(sizes.outputs))) for e in range(experts)]
    return plan.located(plan.arrange(stack(rows, sizes.width, sizes.outputs, dtype, device)))


def _values(case: str, x_TH: Tensor, gate_PH: Tensor, pairs: LoraStack) -> Iterator[Finding]:
    """Of the fused pass; its choice is checked by its weights, and by what the reference makes of it."""
    chosen, deltas = plan.fused(x_TH, gate_PH, GateChoice(TOP_K), pairs)
    logits_TNE = (x_TH.double() @ gate_PH.double().T).view(x_TH.shape[0], pairs.num_linears, -1)
    best_TNK = logits_TNE.gather(-1, chosen.local_TNK)
    # Not the ids: two logits may be as close as fp32 can tell them apart.
    missed = (logits_TNE.topk(TOP_K, dim=-1).values - best_TNK).abs().max() / logits_TNE.abs().max()
    yield Finding("choice", case, float(missed), 1e-5)
    expected = routed_lora_reference(x_TH, pairs, chosen.local_TNK, torch.softmax(best_TNK, -1).float())
    yield Finding("values", case, _error(deltas, expected), LIMITS[x_TH.dtype])
    apart = plan.routed_lora(x_TH, pairs, chosen.local_TNK, chosen.weights_TNK)
    yield Finding("values apart", case, _error(apart, expected), LIMITS[x_TH.dtype])


def _gradients(case: str, x_TH: Tensor, pairs: LoraStack) -> Iterator[Finding]:
    tokens, linears = x_TH.shape[0], pairs.num_linears
    scores = _random(x_TH.device, 3, tokens * linears, pairs.num_experts)
    ids_TNK = scores.topk(TOP_K, dim=-1).indices.view(tokens, linears, TOP_K)
    weights_TNK = torch.softmax(_random(x_TH.device, 4, tokens, linears, TOP_K), dim=-1)
    grads = []
    for operator in (plan.routed_lora, routed_lora_reference):
        x, weights = x_TH.clone().requires_grad_(), weights_TNK.clone().requires_grad_()
        part = pairs.experts[int(ids_TNK[0, 0, 0])][0]
        leaves = [pairs.packed.a_CH, *pairs.packed.b_CO] if pairs.packed else [part.a_RH, part.b_RO] if part else []
        # The views of a packed matrix are of no use to the reference: it is compared by input and weights alone.
        learned = [] if pairs.packed else [leaf.requires_grad_() for leaf in leaves]
        deltas = operator(x, pairs, ids_TNK, weights)
        total = sum((delta.float().square().sum() for delta in deltas), torch.zeros((), device=x.device))
        grads.append(torch.autograd.grad(total, [x, weights, *learned]))
        for leaf in learned:
            leaf.requires_grad_(False)
    for name, actual, expected in zip(("input", "weights", "A", "B"), *grads, strict=False):
        yield Finding(f"gradient of {name}", case, _error([actual], [expected]), 2 * LIMITS[x_TH.dtype])


def _alone(case: str, x_TH: Tensor, gate_PH: Tensor, pairs: LoraStack) -> Finding:
    """The last token in its batch, and on its own."""
    _, together = plan.fused(x_TH, gate_PH, GateChoice(TOP_K), pairs)
    _, alone = plan.fused(x_TH[-1:], gate_PH, GateChoice(TOP_K), pairs)
    apart = [float((many[-1:] - one).abs().max()) for many, one in zip(together, alone, strict=True)]
    return Finding("alone and in a batch", case, max(apart), 0.0)


def _captured(case: str, x_TH: Tensor, gate_PH: Tensor, pairs: LoraStack) -> Finding:
    """A replayed CUDA graph on new inputs, against the same pass launched."""
    static_TH = torch.zeros_like(x_TH)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        plan.fused(static_TH, gate_PH, GateChoice(TOP_K), pairs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, captured = plan.fused(static_TH, gate_PH, GateChoice(TOP_K), pairs)
    static_TH.copy_(x_TH)
    graph.replay()
    _, launched = plan.fused(x_TH, gate_PH, GateChoice(TOP_K), pairs)
    apart = [float((one - other).abs().max()) for one, other in zip(captured, launched, strict=True)]
    return Finding("CUDA graph", case, max(apart), 0.0)


def _error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The greatest relative error of a tensor, in the norm."""
    pairs = zip(actual, expected, strict=True)
    return max(float((a.float() - e.float()).norm() / e.float().norm().clamp_min(1e-30)) for a, e in pairs)


def _random(device: torch.device, seed: int, *size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator(device).manual_seed(seed), device=device)
