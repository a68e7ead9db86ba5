"""Which part of a pair a rank of a tp group holds: by hand, then that the parts are the whole."""

from __future__ import annotations

import pytest
import torch

from meteora_dist.bank import Bank
from meteora_dist.moe.experts import read_expert, read_gates, stack_experts, unread_expert
from meteora_dist.moe.sharding import GroupShape, Split, chunk, share

CPU = torch.device("cpu")


def test_features_are_cut_as_torch_chunks_them() -> None:
    assert [chunk(8, 2, i) for i in range(2)] == [slice(0, 4), slice(4, 8)]
    # Seven over three in steps of three; five over four leaves nothing for the last.
    assert [chunk(7, 3, i) for i in range(3)] == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert [chunk(5, 4, i) for i in range(4)] == [slice(0, 2), slice(2, 4), slice(4, 5), slice(5, 5)]
    for size, parts in ((7, 3), (5, 4), (12, 4)):
        lengths = [len(part) for part in torch.arange(size).chunk(parts)]
        found = [part.stop - part.start for part in (chunk(size, parts, i) for i in range(parts))]
        assert [length for length in found if length] == lengths


def test_ranks_are_shared_evenly_and_in_turns() -> None:
    assert [share(8, 3, i, turn=0) for i in range(3)] == [slice(0, 3), slice(3, 6), slice(6, 8)]
    assert [share(8, 3, i, turn=1) for i in range(3)] == [slice(6, 8), slice(0, 3), slice(3, 6)]
    # Two ranks for three: somebody has none, and not always the same.
    assert [share(2, 3, i, turn=2) for i in range(3)] == [slice(1, 2), slice(2, 2), slice(0, 1)]


def test_a_cut_by_hand() -> None:
    by_outputs = GroupShape(("q", "k"), 8, (6, 4), "outputs", tp=2, tp_rank=1)
    assert by_outputs.local_inputs == 8
    assert by_outputs.local_outputs == (3, 2)
    cut = by_outputs.cut(1, rank=4, digest="abc")
    assert (cut.inputs, cut.outputs, cut.ranks_b) == (slice(0, 8), slice(2, 4), slice(0, 4))
    assert cut.ranks_a in (slice(0, 2), slice(2, 4))
    by_inputs = GroupShape(("o",), 8, (6,), "inputs", tp=2, tp_rank=1)
    assert by_inputs.local_inputs == 4
    assert by_inputs.local_outputs == (6,)
    cut = by_inputs.cut(0, rank=4, digest="abc")
    assert (cut.inputs, cut.outputs, cut.ranks_a) == (slice(4, 8), slice(0, 6), slice(0, 4))
    assert cut.ranks_b in (slice(0, 2), slice(2, 4))


@pytest.mark.parametrize("tp", [1, 2, 3])
@pytest.mark.parametrize(("linear", "split"), [("self_attn.v_proj", "outputs"), ("mlp.down_proj", "inputs")])
def test_what_the_ranks_read_is_the_pair(tiny_bank: Bank, tp: int, linear: str, split: Split) -> None:
    name = f"model.layers.1.{linear}"
    sizes = tiny_bank.adapters[0].shapes[name]
    shapes = [
        GroupShape((name,), sizes.in_features, (sizes.out_features,), split, tp, tp_rank) for tp_rank in range(tp)
    ]
    for expert, adapter in enumerate(tiny_bank.adapters):
        whole = tiny_bank.pair(name, expert)
        assert whole is not None
        a_RH, b_OR = torch.full_like(whole.a_RH, torch.nan), torch.full_like(whole.b_OR, torch.nan)
        held = 0
        for shape in shapes:
            unread = unread_expert(adapter, shape, torch.float32, CPU)
            (expert,) = stack_experts([unread], shape, torch.float32, CPU).experts
            read_expert(adapter, [(shape, expert)])
            (part,) = expert
            assert part is not None
            assert (part.scale, part.rank) == (whole.scale, adapter.shapes[name].rank)
            rows_a = slice(part.first_a, part.first_a + part.a_RH.shape[0])
            rows_b = slice(part.first_b, part.first_b + part.b_RO.shape[0])
            a_RH[rows_a, shape.inputs] = part.a_RH
            b_OR[shape.outputs(0), rows_b] = part.b_RO.T
            held += part.a_RH.numel() + part.b_RO.numel()
        # Everything is there, and nothing twice.
        assert torch.equal(a_RH, whole.a_RH)
        assert torch.equal(b_OR, whole.b_OR)
        assert held == a_RH.numel() + b_OR.numel()


def test_gates_of_a_sliced_input(tiny_bank: Bank) -> None:
    name = "model.layers.0.mlp.down_proj"
    gate_EH = tiny_bank.gate(name)
    parts = [
        read_gates(tiny_bank, GroupShape((name,), gate_EH.shape[1], (32,), "inputs", 2, tp_rank), CPU)
        for tp_rank in range(2)
    ]
    assert torch.equal(torch.cat(parts, dim=1), gate_EH)
