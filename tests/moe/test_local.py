"""Deltas added in place against the group that computes them, whatever the pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from meteora_dist.bank import Bank
from meteora_dist.bench.synthetic import write_synthetic_bank
from meteora_dist.model.load import load_base
from meteora_dist.moe.inject import inject
from meteora_dist.moe.local import LocalDeltas
from meteora_dist.moe.routed_model import RoutedModel
from meteora_dist.moe.routing import BASE, RoutingChoice, StepRouting, named, plan_step
from tests.support.tiny import SPECS, load_tiny_llama

EXPERTS = len(SPECS)
PASSES = {
    "auto": [RoutingChoice()],
    "auto top-1": [RoutingChoice(top_k=1)],
    "one adapter": [named(2)],
    "a blend": [RoutingChoice(mode="fixed", experts=((3, 0.6), (1, 0.4)))],
    "adapters in turn": [named(0), named(3), named(1)],
    "everything": [RoutingChoice(), BASE, named(1), RoutingChoice(top_k=1, temperature=3.0)],
}


@pytest.fixture(scope="module")
def routed(tiny_base: Path, tiny_bank: Bank) -> RoutedModel:
    return inject(load_tiny_llama(tiny_base), tiny_bank, torch.float32)


def step_of(choices: Sequence[RoutingChoice], tokens: int, trace: bool) -> StepRouting:
    lengths = [tokens // len(choices)] * (len(choices) - 1)
    return plan_step(choices, [*lengths, tokens - sum(lengths)], EXPERTS, 2, trace)


@pytest.mark.parametrize("trace", [False, True], ids=["plain", "traced"])
@pytest.mark.parametrize("tokens", [4, 70, 602])
@pytest.mark.parametrize("kind", PASSES)
def test_it_adds_counts_and_records_what_the_group_does(
    routed: RoutedModel, kind: str, tokens: int, trace: bool
) -> None:
    for group in routed.groups[:4]:
        generator = torch.Generator().manual_seed(tokens)
        x_TH = torch.randn(tokens, group.shape.in_features, generator=generator)
        widths = group.shape.out_features
        ends = torch.tensor([0, *widths]).cumsum(0).tolist()
        found, expected = torch.zeros(tokens, ends[-1]), torch.zeros(tokens, ends[-1])
        columns = [slice(*pair) for pair in pairwise(ends)]
        steps = [step_of(PASSES[kind], tokens, trace) for _ in range(2)]
        counts = [torch.tensor(list(routed.loads.values()))]
        with torch.no_grad(), routed.context.routed(steps[0]):
            LocalDeltas(group, columns, ends[-1]).add_to(found, x_TH)
        counts.append(torch.tensor(list(routed.loads.values())))
        with torch.no_grad(), routed.context.routed(steps[1]):
            expected += torch.cat(group(x_TH), dim=1)
        counts.append(torch.tensor(list(routed.loads.values())))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(counts[1] - counts[0], counts[2] - counts[1])
        if trace:
            torch.testing.assert_close(steps[0].shares_TE, steps[1].shares_TE)


def test_a_pass_of_the_base_model_adds_nothing(routed: RoutedModel) -> None:
    group = routed.groups[1]
    y_TY = torch.ones(3, group.shape.out_features[0])
    LocalDeltas(group, [slice(None)], y_TY.shape[1]).add_to(y_TY, torch.randn(3, group.shape.in_features))
    assert torch.equal(y_TY, torch.ones(3, group.shape.out_features[0]))


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer with the widths of SmolLM2-135M."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=1,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    folder = tmp_path_factory.mktemp("wide-base")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[8, 128])
def wide(request: pytest.FixtureRequest, wide_base: Path, tmp_path_factory: pytest.TempPathFactory) -> RoutedModel:
    bank = write_synthetic_bank(tmp_path_factory.mktemp("wide") / "bank", wide_base, request.param, rank=8)
    return inject(load_base(wide_base, torch.float32), bank, torch.float32)


@pytest.mark.parametrize("choice", [RoutingChoice(), named(1)], ids=["auto", "named"])
def test_4096_tokens_need_at_most_twice_the_memory_of_their_outputs(wide: RoutedModel, choice: RoutingChoice) -> None:
    group = wide.groups[0]
    ends = torch.tensor([0, *group.shape.out_features]).cumsum(0).tolist()
    y_TY = torch.zeros(4096, ends[-1])
    x_TH = torch.randn(4096, group.shape.in_features)
    deltas = LocalDeltas(group, [slice(*pair) for pair in pairwise(ends)], ends[-1])
    step = plan_step([choice], [4096], wide.num_experts, 2)

    def run() -> None:
        with torch.no_grad(), group.context.routed(step):
            deltas.add_to(y_TY, x_TH)

    assert most_held(run) <= 2 * y_TY.nbytes


class Held(TorchDispatchMode):
    """Watches the memory of the tensors that operations make while it is on.

    Attributes:
        most: Bytes of those that lived at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._made: list[tuple[weakref.ref[Tensor], int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = {place for _, place, _ in self._made}
        given = {place_of(tensor) for tensor in tree_leaves((args, kwargs)) if is_dense(tensor)} - made
        for tensor in tree_leaves(result):
            if is_dense(tensor) and place_of(tensor) not in given:
                self._made.append((weakref.ref(tensor), place_of(tensor), tensor.untyped_storage().nbytes()))
        self._made = [entry for entry in self._made if entry[0]() is not None]
        self.most = max(self.most, sum({place: size for _, place, size in self._made}.values()))
        return result


def is_dense(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided


def place_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def most_held(run: Callable[[], object]) -> int:
    with Held() as held:
        run()
    return held.most


def test_memory_is_seen() -> None:
    def run() -> Tensor:
        first = torch.ones(1000, 1000).view(-1) + torch.ones(1000, 1000).view(-1)
        return first.mul_(2).sum()

    assert 12_000_000 <= most_held(run) < 13_000_000
