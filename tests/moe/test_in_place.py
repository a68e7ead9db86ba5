"""Deltas added in place against the group that computes them, whatever the pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from meteora_dist.bank import Bank
from meteora_dist.bench.synthetic import write_synthetic_bank
from meteora_dist.model.load import load_base
from meteora_dist.moe.equal_exchange import AdaptiveDispatcher
from meteora_dist.moe.in_place import DeltasInPlace
from meteora_dist.moe.inject import inject
from meteora_dist.moe.placement import Placement
from meteora_dist.moe.routed_model import Place, RoutedModel
from meteora_dist.moe.routing import BASE, RoutingChoice, StepRouting, named, plan_step
from meteora_dist.moe.shared_swap import quickest_swap
from meteora_dist.moe.wire import Wire
from tests.support.ranks import run_ranks
from tests.support.tiny import SPECS, load_tiny_llama

EXPERTS, SLOTS = len(SPECS), 2
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
    return plan_step(choices, [*lengths, tokens - sum(lengths)], EXPERTS, SLOTS, trace)


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
            DeltasInPlace(group, columns, ends[-1]).begin(x_TH)(found)
        counts.append(torch.tensor(list(routed.loads.values())))
        with torch.no_grad(), routed.context.routed(steps[1]):
            expected += torch.cat(group(x_TH), dim=1)
        counts.append(torch.tensor(list(routed.loads.values())))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(counts[1] - counts[0], counts[2] - counts[1])
        if trace:
            torch.testing.assert_close(steps[0].shares_TE, steps[1].shares_TE)


TOKENS = {"decoding": (3, 5, 2), "one is idle": (4, 0, 1), "one alone": (0, 0, 7), "prefill": (70, 33, 100)}
TWIN = 1
"""The rank that computes as ``RoutedGroup`` does, among others that do not."""


def _spread(rank: int, base: Path, bank_path: Path, dtype: torch.dtype) -> None:
    """Deltas of this rank's tokens, experts on three ranks, against those of a rank that holds all of them."""
    world = dist.group.WORLD
    assert world is not None
    bank, wire = Bank.open(bank_path), Wire()
    dispatcher = AdaptiveDispatcher(world, quickest_swap(world, timedelta(seconds=60)), wire)
    placement = Placement(owners=((0, 1), (1,), (2,), (0,)), groups=3)
    spread = inject(load_tiny_llama(base).to(dtype), bank, dtype, placement, Place(rank, dispatcher, wire))
    alone = inject(load_tiny_llama(base).to(dtype), bank, dtype)
    for tokens in TOKENS.values():
        for number, choices in enumerate(PASSES.values()):
            generator = torch.Generator().manual_seed(10 * number + rank)
            steps = [step_of(choices, tokens[rank], True) for _ in range(2)]
            dispatcher.expect(max(tokens))
            for group, whole in zip(spread.groups, alone.groups, strict=True):
                ends = torch.tensor([0, *group.shape.out_features]).cumsum(0).tolist()
                if not tokens[rank]:
                    group.serve(SLOTS)
                    continue
                deltas = DeltasInPlace(group, [slice(*pair) for pair in pairwise(ends)], ends[-1])
                x_TH = torch.randn(tokens[rank], group.shape.in_features, generator=generator).to(dtype)
                found, expected = torch.zeros(2, tokens[rank], ends[-1], dtype=dtype)
                with torch.no_grad(), spread.context.routed(steps[0]):
                    if rank == TWIN:
                        found += torch.cat(group(x_TH), dim=1)
                    else:
                        deltas.begin(x_TH)(found)
                with torch.no_grad(), alone.context.routed(steps[1]):
                    expected += torch.cat(whole(x_TH), dim=1)
                tolerance = 1e-4 if dtype == torch.float32 else 3e-2
                torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
            if tokens[rank]:
                torch.testing.assert_close(steps[0].shares_TE, steps[1].shares_TE)
    assert spread.loads == alone.loads
    assert wire.rows("dispatch") > 0
    assert wire.rows("sizes") == 0, "all of these passes are of fixed shape"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_of_other_ranks_add_the_same(tiny_base: Path, tiny_bank: Bank, dtype: torch.dtype) -> None:
    run_ranks(3, _spread, tiny_base, tiny_bank.path, dtype)


def test_a_pass_of_the_base_model_adds_nothing(routed: RoutedModel) -> None:
    group = routed.groups[1]
    y_TY = torch.ones(3, group.shape.out_features[0])
    DeltasInPlace(group, [slice(None)], y_TY.shape[1]).begin(torch.randn(3, group.shape.in_features))(y_TY)
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
    deltas = DeltasInPlace(group, [slice(*pair) for pair in pairwise(ends)], ends[-1])
    step = plan_step([choice], [4096], wide.num_experts, 2)

    def run() -> None:
        with torch.no_grad(), group.context.routed(step):
            deltas.begin(x_TH)(y_TY)

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
