"""A model that was switched to other holdings equals one that was loaded with them; memory follows."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from meteora_dist.bank import Bank, BankEdit, NewExpert, edit_bank, write_bank
from meteora_dist.errors import AdapterError, BankError
from meteora_dist.moe.experts import held_bytes
from meteora_dist.moe.holdings import Holdings, first_states
from meteora_dist.moe.inject import inject, inject_holdings
from meteora_dist.moe.placement import contiguous
from meteora_dist.moe.residency import Residency
from meteora_dist.moe.routed_model import RoutedModel
from meteora_dist.moe.routing import RoutingChoice, named, plan_pass
from meteora_dist.moe.sharding import GroupShape
from meteora_kernels.launch import tiles_of
from tests.support.tiny import (
    HIDDEN,
    MLP,
    VOCABULARY,
    Spec,
    linears,
    load_tiny_llama,
    write_adapter,
    write_tiny_llama,
)

IDS_1L = torch.randint(VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(6))
EXTRA = Spec(6, 12)


@pytest.fixture(scope="module")
def banks(tiny_base: Path, tiny_bank: Bank, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bank, ...]:
    """Generations 1 to 4: the tiny bank; with one more; with another in the place of "wide"; without "plain"."""
    folder = tmp_path_factory.mktemp("generations")
    extra = NewExpert(write_adapter(tiny_base, folder / "extra", EXTRA, seed=31))
    other = NewExpert(write_adapter(tiny_base, folder / "other", Spec(3, 6), seed=32))
    second = edit_bank(tiny_bank, BankEdit(add={"extra": extra}), folder / "2")
    third = edit_bank(second, BankEdit(replace={"wide": other}), folder / "3")
    return tiny_bank, second, third, edit_bank(third, BankEdit(remove=("plain",)), folder / "4")


@pytest.fixture
def routed(tiny_base: Path, tiny_bank: Bank) -> RoutedModel:
    return inject(load_tiny_llama(tiny_base), tiny_bank, torch.float32)


def answers(routed: RoutedModel, bank: Bank) -> Tensor:
    """Logits of every expert by name, and of the gates' choice, in this generation."""
    number = bank.manifest.generation
    rows = []
    for choice in [*map(named, range(len(bank.names))), RoutingChoice()]:
        step = plan_pass([choice], [IDS_1L.shape[1]], [number], routed.live, 2)
        with torch.no_grad(), routed.context.routed(step):
            rows.append(routed.model(IDS_1L, use_cache=False).logits)
    return torch.cat(rows)


def fresh(base: Path, bank: Bank) -> Tensor:
    return answers(inject(load_tiny_llama(base), bank, torch.float32), bank)


def alike(found: Tensor, wanted: Tensor) -> None:
    """Equal but for the order of sums, which the experts beside an expert change; no near-tie of a gate turned."""
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def go(routed: RoutedModel, residency: Residency) -> None:
    routed.switch(routed.prepare(residency))


def test_every_live_generation_answers_as_if_it_were_alone(
    tiny_base: Path, routed: RoutedModel, banks: tuple[Bank, ...]
) -> None:
    for bank in banks[1:]:
        go(routed, routed.holdings.residency.with_bank(bank))
    assert sorted(routed.live) == [1, 2, 3, 4]
    for bank in banks:
        alike(answers(routed, bank), fresh(tiny_base, bank))
    for bank in banks[:3]:
        go(routed, routed.holdings.residency.without(bank.manifest.generation))
        alike(answers(routed, banks[3]), fresh(tiny_base, banks[3]))
    assert sorted(routed.live) == [4]
    assert routed.num_experts == 4


def test_a_model_can_be_loaded_with_several_generations(tiny_base: Path, banks: tuple[Bank, ...]) -> None:
    residency = Residency.of(banks[0], 1).with_bank(banks[1]).with_bank(banks[3])
    routed = inject_holdings(load_tiny_llama(tiny_base), Holdings.open(residency, {}), torch.float32)
    for bank in (banks[0], banks[1], banks[3]):
        alike(answers(routed, bank), fresh(tiny_base, bank))


def matrix_bytes(bank: Bank, names: tuple[str, ...]) -> int:
    pairs = [bank.pair(linear, bank.names.index(name)) for linear in bank.linears for name in names]
    return sum(pair.a_RH.nbytes + pair.b_OR.nbytes for pair in pairs if pair is not None)


def test_memory_follows_what_is_held(routed: RoutedModel, banks: tuple[Bank, ...]) -> None:
    first = routed.resident
    widths = sum(MLP if name.endswith("down_proj") else HIDDEN for name in linears())
    assert first.expert_bytes == matrix_bytes(banks[0], banks[0].names)
    assert first.gate_bytes == 4 * 4 * widths
    prepared = routed.prepare(routed.holdings.residency.with_bank(banks[1]))
    assert routed.resident == first
    routed.switch(prepared)
    assert routed.resident.expert_bytes == first.expert_bytes + matrix_bytes(banks[1], ("extra",))
    assert routed.resident.gate_bytes == first.gate_bytes + 4 * 5 * widths
    go(routed, routed.holdings.residency.without(2))
    assert routed.resident == first


def test_bfloat16_adapters_stay_so_beside_others(
    tiny_base: Path, routed: RoutedModel, tiny_bank: Bank, tmp_path: Path
) -> None:
    file = write_adapter(tiny_base, tmp_path / "written", EXTRA, seed=33) / "adapter_model.safetensors"
    halves = {name: matrix.bfloat16() for name, matrix in load_file(file).items()}
    banks = []
    for folder, matrices in (("half", halves), ("wide", {name: matrix.float() for name, matrix in halves.items()})):
        shutil.copytree(file.parent, tmp_path / folder)
        save_file(matrices, tmp_path / folder / file.name)
        edit = BankEdit(add={"extra": NewExpert(tmp_path / folder)})
        banks.append(edit_bank(tiny_bank, edit, tmp_path / f"bank-{folder}"))
    first = routed.resident.expert_bytes
    go(routed, routed.holdings.residency.with_bank(banks[0]))
    assert routed.resident.expert_bytes == first + sum(matrix.nbytes for matrix in halves.values())
    assert held_bytes(banks[0].adapters[-1], torch.float32, "cpu") == sum(matrix.nbytes for matrix in halves.values())
    alike(answers(routed, banks[0]), fresh(tiny_base, banks[1]))


def test_memory_follows_into_another_regime_and_back(routed: RoutedModel, banks: tuple[Bank, ...]) -> None:
    first = routed.resident
    # From now on experts are no longer packed; those that were must not keep the memory of their old pack alive.
    none_dense = replace(tiles_of("cpu"), dense_columns=0)
    with patch("meteora_kernels.routed_lora.plan.tiles_of", lambda device: none_dense):
        go(routed, routed.holdings.residency.with_bank(banks[3]))
        go(routed, routed.holdings.residency.without(1))
    assert all(group.state.stack.packed is None for group in routed.groups)
    assert routed.resident.expert_bytes == matrix_bytes(banks[3], banks[3].names)
    assert routed.resident.expert_bytes < first.expert_bytes
    go(routed, routed.holdings.residency.with_bank(replaced_number(banks[3], 5)))
    assert all(group.state.stack.packed is not None for group in routed.groups)
    assert routed.resident.expert_bytes == matrix_bytes(banks[3], banks[3].names)


def replaced_number(bank: Bank, number: int) -> Bank:
    """The same bank, edited into a later generation in which nothing that counts here differs."""
    path = bank.path.parent / f"{bank.path.name}-{number}"
    return edit_bank(bank, BankEdit(replace={"extra": NewExpert(bank.path / "experts" / "extra")}), path)


def test_kept_matrices_are_not_read_again(routed: RoutedModel, banks: tuple[Bank, ...]) -> None:
    go(routed, routed.holdings.residency.with_bank(banks[1]))
    with patch("meteora_dist.moe.holdings.read_expert", side_effect=AssertionError("read again")):
        go(routed, routed.holdings.residency.without(1))
        go(routed, routed.holdings.residency.placed(contiguous(5, 1)))


def test_loads_follow_the_adapters(routed: RoutedModel, banks: tuple[Bank, ...]) -> None:
    # Twelve tokens at fourteen linears; without "plain" it is in the slot before.
    step = plan_pass([named(3)], [IDS_1L.shape[1]], [1], routed.live, 1)
    with torch.no_grad(), routed.context.routed(step):
        routed.model(IDS_1L, use_cache=False)
    assert list(routed.loads.values()) == [0, 0, 0, 14 * 12]
    go(routed, routed.holdings.residency.with_bank(banks[3]))
    go(routed, routed.holdings.residency.without(1))
    assert routed.holdings.residency.roster.slots == banks[3].digests
    assert routed.loads == {digest: 14 * 12 * (digest == banks[0].digests[3]) for digest in banks[3].digests}


def test_linears_that_only_one_generation_adapts(tiny_base: Path, tmp_path: Path) -> None:
    # Generation 1 adapts q and v, generation 2 adapts v alone: its experts must not be seen at q.
    adapters = {
        "both": write_adapter(tiny_base, tmp_path / "both", Spec(4, 8, targets=("q_proj", "v_proj")), seed=1),
        "v": write_adapter(tiny_base, tmp_path / "v", Spec(4, 8, targets=("v_proj",)), seed=2),
        "v2": write_adapter(tiny_base, tmp_path / "v2", Spec(2, 8, targets=("v_proj",)), seed=3),
    }
    gates = {
        name: torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(4))
        for name in linears(("q_proj", "v_proj"))
    }
    first = write_bank(tmp_path / "1", tiny_base, "tiny", adapters, gates)
    second = edit_bank(first, BankEdit(remove=("both",)), tmp_path / "2")
    expected = [fresh(tiny_base, first), fresh(tiny_base, second)]
    routed = inject(load_tiny_llama(tiny_base), first, torch.float32)
    go(routed, routed.holdings.residency.with_bank(second))
    for bank, wanted in zip((first, second), expected, strict=True):
        alike(answers(routed, bank), wanted)
    assert (routed.live[1].num_linears, routed.live[2].num_linears) == (4, 2)
    step = plan_pass([RoutingChoice()], [IDS_1L.shape[1]], [2], routed.live, 2, trace=True)
    with torch.no_grad(), routed.context.routed(step):
        routed.model(IDS_1L, use_cache=False)
    shares_E = step.shares_of(3)
    assert shares_E is not None
    torch.testing.assert_close(shares_E.sum(), torch.tensor(2.0))
    # The other way round there is no place for the new linear.
    routed = inject(load_tiny_llama(tiny_base), second, torch.float32)
    back = edit_bank(second, BankEdit(add={"both": NewExpert(adapters["both"])}), tmp_path / "3")
    with pytest.raises(BankError, match=r"adapts model.layers.0.self_attn.q_proj, which no expert did"):
        routed.prepare(routed.holdings.residency.with_bank(back))


def test_a_bank_that_is_not_the_announced_one_is_refused(
    tiny_base: Path, routed: RoutedModel, banks: tuple[Bank, ...], tmp_path: Path
) -> None:
    now = routed.holdings
    residency = now.residency.with_bank(banks[1])
    with pytest.raises(BankError, match=r"should be generation 2 of the bank, with the adapters it was announced with"):
        routed.prepare(replace(residency, folders={**residency.folders, 2: banks[2].path}))
    base = write_tiny_llama(tmp_path / "base")
    other = load_tiny_llama(base)
    other.lm_head.weight.data[0, 0] += 1
    other.save_pretrained(base)
    adapters = {name: banks[0].path / "experts" / name for name in banks[0].names}
    gates = {linear: banks[0].gate(linear) for linear in banks[0].linears}
    foreign = write_bank(tmp_path / "bank", base, "another-llama", adapters, gates, None, 2)
    with pytest.raises(BankError, match=r"was made for another base model, another-llama"):
        routed.prepare(now.residency.with_bank(foreign))
    assert routed.holdings is now


def test_a_file_cut_short_after_the_checks_is_noticed(
    tiny_base: Path, tiny_bank: Bank, routed: RoutedModel, tmp_path: Path
) -> None:
    extra = NewExpert(write_adapter(tiny_base, tmp_path / "extra", EXTRA, seed=31))
    bank = edit_bank(tiny_bank, BankEdit(add={"extra": extra}), tmp_path / "2")
    before, state = answers(routed, tiny_bank), routed.groups[0].state
    weights = bank.path / "experts" / "extra" / "adapter_model.safetensors"
    opened = Holdings.open(routed.holdings.residency.with_bank(bank), routed.holdings.banks)
    weights.write_bytes(weights.read_bytes()[:-1000])
    with patch.object(Holdings, "open", return_value=opened), pytest.raises(AdapterError, match="its digest is"):
        routed.prepare(opened.residency)
    assert routed.groups[0].state is state
    assert torch.equal(answers(routed, tiny_bank), before)


def test_an_adapter_is_hashed_by_the_ranks_that_read_it(tiny_base: Path, tiny_bank: Bank, tmp_path: Path) -> None:
    extra = NewExpert(write_adapter(tiny_base, tmp_path / "extra", EXTRA, seed=31))
    bank = edit_bank(tiny_bank, BankEdit(add={"extra": extra}), tmp_path / "2")
    weights = bank.path / "experts" / "extra" / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    # Of the five experts in two groups it is the last; its header is as it was.
    holdings = Holdings.open(Residency.of(bank, 2), {})
    shape = GroupShape(("model.layers.0.self_attn.v_proj",), HIDDEN, (16,))
    first_states([shape], holdings, 0, torch.float32, torch.device("cpu"))
    with pytest.raises(AdapterError, match=r"extra: its digest is \w+; the bank it belongs to was made with"):
        first_states([shape], holdings, 1, torch.float32, torch.device("cpu"))
    with pytest.raises(BankError, match="the adapter's digest is"):
        Bank.open(bank.path)
