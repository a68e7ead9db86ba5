"""Composite sequences: which are drawn, and that every token has the label of its part."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from meteora_dist.bank import Bank
from meteora_dist.errors import TrainingError
from meteora_dist.evaluation.composite import numbered, question
from meteora_dist.evaluation.prompts import answer_ids, prompt_ids
from meteora_dist.evaluation.tasks import TaskRow
from meteora_dist.training.composites import CompositeDraw, encode_composite
from meteora_dist.training.data import is_forced
from meteora_dist.training.gate_data import GateData
from meteora_dist.training.gate_run import GateTraining
from tests.support.tasks import request, write_tasks, write_texts

ROWS = (TaskRow("one two", "un"), TaskRow("three", "trois 2. deux"), TaskRow("one two", "uno"))


def runs(tokenizer: PreTrainedTokenizerBase, ids: list[int], experts: list[int]) -> list[tuple[int, str]]:
    """The text of every stretch of one expert."""
    pairs = groupby(zip(ids, experts, strict=True), key=lambda pair: pair[1])
    return [(expert, tokenizer.decode([token for token, _ in stretch])) for expert, stretch in pairs]


@pytest.mark.parametrize("template", [True, False])
def test_every_token_belongs_to_the_part_it_is_in_or_opens(tiny_base: Path, template: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    if not template:
        tokenizer.chat_template = None
    ids, experts = encode_composite(tokenizer, ROWS, [3, 1, 2])
    assert tuple(ids.prompt) == prompt_ids(tokenizer, [question(ROWS)])
    assert tuple(ids.answer) == answer_ids(tokenizer, numbered([row.target for row in ROWS]))
    head = "Answer these 3 questions. Give each answer its question's number, on a line of its own."
    begin, end = ("<user>", "\n<assistant>") if template else ("[INST] ", " [/INST]\n")
    assert runs(tokenizer, ids.prompt, experts.prompt) == [
        (3, f"{begin}{head}\n\n1. one two"),
        (1, "\n\n2. three"),
        (2, "\n\n3. one two"),
        (3, end),
    ]
    assert runs(tokenizer, ids.answer, experts.answer) == [
        (3, "1. un"),
        (1, "\n2. trois 2. deux"),
        (2, "\n3. uno</s>"),
    ]


def test_a_token_across_a_boundary_belongs_to_its_first_character() -> None:
    # Tokens are words with the space or the line break before them, so "n<break>2" is one.
    vocabulary = {"<unk>": 0, "</s>": 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    _, experts = encode_composite(fast, [TaskRow("a b", "un"), TaskRow("c", "deux")], [5, 4])
    # 1. | un<break>2. | deux, with the spaces between them, and the end.
    assert experts.answer == [5, 5, 5, 4, 4, 4]


def test_draws_have_the_share_and_the_sizes_that_are_asked_for() -> None:
    sizes = [7, 0, 5, 9, 4]
    draw = CompositeDraw(sizes, share=0.5, most=3, seed=1)
    drawn = {place: draw(place, (place % 5, 0)) for place in range(4000)}
    assert drawn == {place: draw(place, (place % 5, 0)) for place in range(4000)}
    # A data set without questions is in no composite.
    assert all(parts == [(1, 0)] for place, parts in drawn.items() if place % 5 == 1)
    assert not any(source == 1 for parts in drawn.values() if len(parts) > 1 for source, _ in parts)
    counts = Counter(len(parts) for place, parts in drawn.items() if place % 5 != 1)
    assert [counts[n] / 3200 for n in (1, 2, 3)] == pytest.approx([0.5, 0.25, 0.25], abs=0.04)
    for place, parts in drawn.items():
        sources = [source for source, _ in parts]
        assert place % 5 in sources
        assert len(set(sources)) == len(sources)
        assert all(row < max(1, sizes[source]) for source, row in parts)
    # The sequence's own expert stands in any place, and half of the composites are forced as of all others.
    composites = [place for place, parts in drawn.items() if len(parts) == 3]
    firsts = Counter([source for source, _ in drawn[place]].index(place % 5) for place in composites)
    assert all(count / len(composites) == pytest.approx(1 / 3, abs=0.06) for count in firsts.values())
    forced = sum(is_forced(place, 5, 0.5) for place in composites) / len(composites)
    assert forced == pytest.approx(0.5, abs=0.06)
    other = CompositeDraw(sizes, share=0.5, most=3, seed=2)
    assert [other(place, (place % 5, 0)) for place in range(9)] != [drawn[place] for place in range(9)]
    assert CompositeDraw(sizes, share=0.0, most=3, seed=1)(0, (0, 3)) == [(0, 3)]


def test_a_run_with_composites_labels_parts_and_keeps_texts_single(
    tiny_base: Path, tiny_bank: Bank, tmp_path: Path
) -> None:
    options = {"composites": 1.0, "composite_parts": 2, "micro_batch": 10, "max_tokens": 150}
    unlabelled = write_texts(tmp_path / "texts.jsonl")
    asked = request(tiny_base, tiny_bank.path / "experts", tmp_path, options, unlabelled=unlabelled)
    run = GateTraining(asked).run
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    (batch,) = GateData(run, run.trained, tokenizer).training(0, 0, 1)
    letters = {name: {chr(65 + 6 * index + at) for at in range(6)} for index, name in enumerate(tiny_bank.names)}
    for place, (ids, experts, mask) in enumerate(zip(batch.ids_BL, batch.experts_BL, batch.mask_BL, strict=True)):
        length = int(mask.sum())
        stretches = runs(tokenizer, ids[:length].tolist(), experts[:length].tolist())
        if place % 5 == 4:
            assert stretches[0][0] == 4
            assert len(stretches) == 1
            continue
        # Question two, answers one and two, and what is left of question one: long prompts lose their beginning.
        assert length == 150
        assert len(stretches) == 4
        for expert, text in stretches[1:]:
            used = letters[run.trained[expert]]
            assert used & set(text)
            others = set().union(*letters.values()) - used
            assert not others & set(text.replace("INST", "").replace("\n<assistant>", ""))


def test_one_data_set_makes_no_composite(tiny_base: Path, tiny_bank: Bank, tmp_path: Path) -> None:
    write_tasks(tmp_path / "data", ("plain",))
    adapters = tiny_bank.path / "experts"
    asked = request(tiny_base, adapters, tmp_path, {"composites": 0.5}, experts=("plain",))
    with pytest.raises(TrainingError, match=r"composites .* need two data sets at least"):
        GateTraining(asked)
