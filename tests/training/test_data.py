"""Which sequences a step takes, and how they are laid out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from meteora_dist.evaluation.tasks import TaskRow
from meteora_dist.training.data import Halves, Order, Sample, collate, encode, is_forced
from meteora_dist.training.gate_data import GateData
from meteora_dist.training.gate_loss import IGNORE, shifted_labels
from meteora_dist.training.settings import GateRun, GateSettings, LoopSettings, Source
from tests.support.tasks import write_tasks, write_texts

NAMES = ("a", "b", "c")


def test_a_batch_by_hand() -> None:
    # Prompt 1 2, answer 3; prompt 4, answer 5. With prompts left out, the answers' tokens are the only labels.
    samples = [
        Sample(Halves([1, 2], [3]), Halves([0, 1], [0]), True),
        Sample(Halves([4], [5]), Halves([2], [2]), False),
    ]
    batch = collate(samples, pad_id=9, count_prompt=False)
    assert batch.ids_BL.tolist() == [[1, 2, 3], [4, 5, 9]]
    assert batch.mask_BL.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert shifted_labels(batch.expert_labels).tolist() == [[IGNORE, 0, IGNORE], [2, IGNORE, IGNORE]]
    assert shifted_labels(batch.token_labels).tolist() == [[IGNORE, 3, IGNORE], [5, IGNORE, IGNORE]]
    assert batch.counted == 2
    whole = collate(samples, pad_id=9, count_prompt=True)
    assert shifted_labels(whole.token_labels).tolist() == [[2, 3, IGNORE], [5, IGNORE, IGNORE]]
    assert shifted_labels(whole.expert_labels).tolist() == [[1, 0, IGNORE], [2, IGNORE, IGNORE]]
    assert whole.counted == 3


def test_fillers_do_not_count() -> None:
    assert collate([Sample(Halves([1, 2], [3]), Halves([0, 0], [0]), False, real=False)], 9, True).counted == 0


def test_balanced_takes_experts_in_turn_and_rows_without_repetition() -> None:
    order = Order([2, 5, 3], balanced=True, seed=1)
    places = [order(place) for place in range(30)]
    assert [expert for expert, _ in places] == [0, 1, 2] * 10
    for expert, size in enumerate((2, 5, 3)):
        rows = [row for owner, row in places if owner == expert]
        for epoch in range(10 // size):
            assert sorted(rows[epoch * size : (epoch + 1) * size]) == list(range(size))
    assert places == [Order([2, 5, 3], balanced=True, seed=1)(place) for place in range(30)]
    assert places != [Order([2, 5, 3], balanced=True, seed=2)(place) for place in range(30)]


def test_proportional_takes_every_row_as_often() -> None:
    order = Order([2, 5, 3], balanced=False, seed=1)
    assert Counter(order(place) for place in range(20)) == {
        (expert, row): 2 for expert, size in enumerate((2, 5, 3)) for row in range(size)
    }


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_forced_sequences_are_spread_over_experts(share: float) -> None:
    forced = Counter(place % 4 for place in range(160) if is_forced(place, 4, share))
    assert forced == Counter({expert: round(40 * share) for expert in range(4)} if share else {})


@pytest.fixture
def run(tmp_path: Path) -> GateRun:
    data = write_tasks(tmp_path / "data", NAMES, rows=10)
    sources = tuple(Source.of(name, data / f"{name}.jsonl") for name in NAMES)
    texts = write_texts(tmp_path / "texts.jsonl", rows=10)
    return GateRun(
        base=tmp_path,
        draft=tmp_path,
        folder=tmp_path,
        sources=(*sources, Source.of("null", texts, unlabelled=True)),
        trained=(*NAMES, "null"),
        loop=LoopSettings(micro_batch=2, accumulation=2),
        gates=GateSettings(hold_out_rows=1),
    )


def test_any_number_of_workers_sees_the_same_sequences(run: GateRun, tiny_base: Path) -> None:
    def seen(world: int, accumulation: int) -> list[list[int]]:
        loop = run.loop.model_copy(update={"accumulation": accumulation})
        data = GateData(run.model_copy(update={"loop": loop}), run.trained, AutoTokenizer.from_pretrained(tiny_base))
        batches = [batch for rank in range(world) for batch in data.training(3, rank, world)]
        rows = [zip(batch.ids_BL.tolist(), batch.mask_BL.tolist(), strict=True) for batch in batches]
        return sorted(
            [token for token, is_there in zip(ids, mask, strict=True) if is_there] for row in rows for ids, mask in row
        )

    assert len(seen(1, 4)) == 8
    assert seen(1, 4) == seen(2, 2) == seen(4, 1)


def test_held_out_rows_are_never_trained_on(run: GateRun, tiny_base: Path) -> None:
    data = GateData(run, run.trained, AutoTokenizer.from_pretrained(tiny_base))
    batches = [batch for rank in range(3) for batch in data.held_out(rank, 3)]
    # Four data sets, one row each, over three workers with two sequences a batch: two rows of the six are fillers.
    assert sorted(
        expert
        for batch in batches
        for expert, counted in zip(batch.experts_BL[:, 0].tolist(), batch.counted_BL.any(1), strict=True)
        if counted
    ) == [0, 1, 2, 3]
    assert [len(batch.experts_BL) for batch in batches] == [2, 2, 2]
    assert all(len(parts.training) == 8 and len(parts.held_out) == 2 for parts in data._parts)


def test_long_rows_lose_the_beginning_of_their_prompt(run: GateRun, tiny_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    whole = encode(tokenizer, TaskRow("abcdefgh", "yz"))
    short = GateData(run.model_copy(update={"gates": GateSettings(max_tokens=6)}), run.trained, tokenizer)
    sample = short._single(TaskRow("abcdefgh", "yz"), 1, forced=False)
    prompt_ids, answer_ids = sample.ids
    assert answer_ids == whole.answer
    assert len(answer_ids) + len(prompt_ids) == 6
    assert prompt_ids == whole.prompt[-len(prompt_ids) :]
    assert [len(half) for half in sample.experts] == [len(half) for half in sample.ids]
    assert short._single("abcdefgh", 1, forced=False).ids == Halves([], tokenizer("abcdefgh").input_ids[:6])
