"""Domain rows: how they are read, padded, and taken by steps."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from meteora_dist.errors import CheckpointError
from meteora_dist.training.gate_loss import IGNORE
from meteora_dist.training.moa_data import DomainData, DomainRow, collate, read_domains


def write(path: Path, rows: list[tuple[str, str]]) -> None:
    text = "".join(json.dumps({"input": i, "target": t, "choices": None}) + "\n" for i, t in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def test_padding() -> None:
    batch = collate([DomainRow((1, 2), (3,), 5), DomainRow((4,), (6, 7, 8), 0)], 99)
    assert batch.ids_BL.tolist() == [[1, 2, 3, 99], [4, 6, 7, 8]]
    assert batch.mask_BL.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.labels_BL.tolist() == [[IGNORE, IGNORE, 3, IGNORE], [IGNORE, 6, 7, 8]]
    assert (batch.prompts, batch.experts) == ((2, 1), (5, 0))
    second = batch.rows([1])
    assert (second.ids_BL.tolist(), second.prompts, second.experts) == ([[4, 6, 7, 8]], (1,), (0,))


def test_files_become_chats(tiny_base: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [(f"q{i}", "x") for i in range(10)])
    write(tmp_path / "b.jsonl.gz", [("short", "yes"), ("long" * 30, "no"), *[("other", "yes")] * 3])
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    data = read_domains(tmp_path, {"b": 1, "a": 0}, tokenizer, 40)
    assert (len(data.training[0]), len(data.held_out[0])) == (8, 2)
    # The long row of b is left out, and its last fifth is held out.
    assert (len(data.training[1]), len(data.held_out[1]), data.skipped) == (3, 1, 1)
    first = data.training[0][0]
    assert tokenizer.decode(first.prompt_ids) == "<user>q0\n<assistant>"
    assert tokenizer.decode(first.answer_ids) == "x</s>"
    assert data.pad_id == tokenizer.pad_token_id


def test_a_domain_without_rows_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    with pytest.raises(CheckpointError, match=r"has neither a\.jsonl nor a\.jsonl\.gz, the rows of expert a"):
        read_domains(tmp_path, {"a": 0}, tokenizer, 40)
    write(tmp_path / "a.jsonl", [("long" * 30, "no")] * 5)
    with pytest.raises(CheckpointError, match=r"a\.jsonl: has no row of at most 40 tokens to train on"):
        read_domains(tmp_path, {"a": 0}, tokenizer, 40)


def test_steps_take_domains_evenly_and_each_row_once_before_any_twice() -> None:
    pools = {
        expert: tuple(DomainRow((expert, i), (1,), expert) for i in range(size)) for expert, size in ((0, 6), (3, 4))
    }
    data = DomainData(pools, {}, 0, 0)
    taken = [row for number in range(6) for row in data.step(number, 2, seed=7)]
    assert Counter(row.expert for row in taken) == {0: 12, 3: 12}
    assert set(Counter(taken).values()) == {2, 3}
    first_round = [row for number in range(3) for row in data.step(number, 2, seed=7) if row.expert == 0]
    assert len(set(first_round)) == 6
    assert data.step(4, 2, seed=7) == taken[16:20]
    assert data.step(0, 2, seed=8) != data.step(0, 2, seed=7)


def test_batches_hold_alike_lengths() -> None:
    rows = [DomainRow(tuple(range(length)), (1,), 0) for length in (5, 1, 9, 2, 7)]
    batches = DomainData({}, {}, 0, 0).batches(rows, 2)
    assert [batch.prompts for batch in batches] == [(1, 2), (5, 7), (9,)]
