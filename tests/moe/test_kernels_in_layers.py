"""A whole model on GPU kernels, which Triton interprets, equals the same model on torch; and what a layer launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from meteora_dist.bank import Bank
from meteora_dist.moe.inject import inject
from meteora_dist.moe.routed_model import RoutedModel
from meteora_dist.moe.routing import BASE, RoutingChoice, named, plan_step
from meteora_kernels.launch import tiles_of
from meteora_kernels.routed_lora import plan
from tests.support.tiny import LAYERS, SPECS, VOCABULARY, load_tiny_llama

EXPERTS = len(SPECS)
MIXED = [RoutingChoice(top_k=1), BASE, named(1), RoutingChoice(mode="fixed", experts=((3, 0.6), (1, 0.4)))]
AUTO = [RoutingChoice(temperature=2.0)]
PROMPT = 4
IDS_1L = torch.randint(VOCABULARY, (1, PROMPT), generator=torch.Generator().manual_seed(1))
REGIMES = pytest.mark.parametrize("dense_columns", [512, 0], ids=["dense", "grouped"])


@contextmanager
def on_kernels(dense_columns: int, few_tokens: int = 2) -> Iterator[None]:
    """As on a GPU, with small tiles for a small model."""
    sizes = {"dense_columns": dense_columns, "few_tokens": few_tokens}
    small = replace(tiles_of("cpu"), splits=2, inputs=16, outputs=32, **sizes)
    with patch.object(plan, "runs_kernels", lambda device: True), patch.object(plan, "tiles_of", lambda device: small):
        yield


def forward(routed: RoutedModel, choices: list[RoutingChoice], trace: bool = False) -> Tensor:
    tokens = IDS_1L.shape[1] // len(choices)
    step = plan_step(choices, [tokens] * len(choices), EXPERTS, 2, trace)
    with torch.no_grad(), routed.context.routed(step):
        logits: Tensor = routed.model(IDS_1L, use_cache=False).logits[0]
    return logits if step.shares_TE is None else torch.cat([logits, step.shares_TE], dim=-1)


@pytest.mark.parametrize(
    ("dense_columns", "choices", "trace"),
    [(512, AUTO, False), (0, MIXED, False), (512, MIXED, True), (0, AUTO, True)],
    ids=["dense-auto", "grouped-mixed", "dense-mixed-traced", "grouped-auto-traced"],
)
def test_model_on_kernels_equals_torch(
    tiny_base: Path, tiny_bank: Bank, dense_columns: int, choices: list[RoutingChoice], trace: bool
) -> None:
    expected = inject(load_tiny_llama(tiny_base), tiny_bank, torch.float32)
    wanted = forward(expected, choices, trace)
    with on_kernels(dense_columns):
        routed = inject(load_tiny_llama(tiny_base), tiny_bank, torch.float32)
        assert all((group.state.stack.packed is None) == (not dense_columns) for group in routed.groups)
        torch.testing.assert_close(forward(routed, choices, trace), wanted, rtol=1e-4, atol=1e-4)
    assert routed.loads == expected.loads


class _Launches(TorchDispatchMode):
    """Counts what a GPU would be given to do: kernels of ours, and torch operators that compute or copy."""

    FREE = ("aten.empty", "aten.view", "aten.t.", "aten._unsafe_view", "aten.slice", "aten.split", "aten.select",
            "aten.unbind", "aten.detach", "aten.as_strided", "aten.new_empty", "aten.expand", "aten.alias",
            "aten.permute")  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if not str(func).startswith(self.FREE):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def launches() -> Iterator[list[str]]:
    counted, original = _Launches(), GridExecutor.__call__

    def launch(self: GridExecutor, *args: object, **kwargs: object) -> None:
        counted.seen.append(self.fn.__name__)
        # What the interpreter does to run a kernel is not the program's.
        with torch.utils._python_dispatch._disable_current_modes():
            original(self, *args, **kwargs)

    with patch.object(GridExecutor, "__call__", launch), counted:
        yield counted.seen


@REGIMES
@pytest.mark.parametrize("choices", [AUTO, MIXED], ids=["auto", "mixed"])
def test_a_layer_takes_twelve_launches_beside_the_base_model(
    tiny_base: Path, tiny_bank: Bank, dense_columns: int, choices: list[RoutingChoice]
) -> None:
    with on_kernels(dense_columns, PROMPT):
        routed = inject(load_tiny_llama(tiny_base), tiny_bank, torch.float32)
        step = plan_step(choices, [PROMPT // len(choices)] * len(choices), EXPERTS, 2)
        routed.context.step = step
        for group in routed.groups[:4]:
            x_TH = torch.randn(PROMPT, group.shape.in_features)
            with torch.no_grad(), launches() as seen:
                group(x_TH)
            assert len(seen) <= 3, seen
    assert len(routed.groups) == 4 * LAYERS


def test_the_base_product_takes_the_delta_in(tiny_base: Path, tiny_bank: Bank) -> None:
    # A routed linear multiplies as often as a plain one: once, with the delta as what it adds to.
    with on_kernels(512, PROMPT):
        routed = inject(load_tiny_llama(tiny_base), tiny_bank, torch.float32)
        routed.context.step = plan_step(AUTO, [PROMPT], EXPERTS, 2)
        down = routed.model.get_submodule("model.layers.0.mlp.down_proj")
        x_1TH = torch.randn(1, PROMPT, routed.groups[3].shape.in_features)
        with torch.no_grad(), launches() as seen:
            y_1TO = down(x_1TH)
        assert seen[3:] == ["aten.addmm_.default"], seen
        routed.context.step = plan_step(AUTO, [PROMPT], EXPERTS, 2)
    with torch.no_grad():
        torch.testing.assert_close(y_1TO, down(x_1TH), rtol=1e-4, atol=1e-4)


def test_gates_learn_through_kernels(tiny_base: Path, tiny_bank: Bank) -> None:
    def gradients() -> list[Tensor]:
        routed = inject(load_tiny_llama(tiny_base), tiny_bank, torch.float32)
        decoder = routed.model.get_decoder()
        decoder.layers = decoder.layers[:1]
        gates = [gate.requires_grad_() for group in routed.groups[:4] for gate in group.state.gates]
        with routed.context.routed(plan_step(AUTO, [PROMPT], EXPERTS, 2)):
            routed.model(IDS_1L, use_cache=False).logits.square().mean().backward()
        return [gate.grad for gate in gates if gate.grad is not None]

    wanted = gradients()
    with on_kernels(0):
        found = gradients()
    assert len(found) == len(wanted) == 4
    for actual, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)
