"""Metrics and intervals on examples worked by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meteora_dist.evaluation.intervals import Estimate, bootstrap, bootstrap_mean, wilson
from meteora_dist.evaluation.metrics import bleu, containment, exact_match, perplexity, rouge
from meteora_dist.evaluation.results import means, score_task
from meteora_dist.evaluation.suite import Task
from meteora_dist.evaluation.tasks import TaskRow


@pytest.mark.parametrize(
    ("target", "answer", "exact", "contained"),
    [
        ("Paris", "paris.", 1, 1),
        ("Paris", "It is Paris, of course.", 0, 1),
        ("Valid", "Invalid", 0, 1),
        ("two", "", 0, 0),
        ("Yes. Frogs do.", "Yes, I think", 1, 1),
        ("No. They do not.", "Well: No. They do not.", 0, 0),
    ],
)
def test_exact_match_and_containment(target: str, answer: str, exact: float, contained: float) -> None:
    row = TaskRow("?", target)
    assert (exact_match(row, answer), containment(row, answer)) == (exact, contained)


def test_any_right_answer_counts() -> None:
    row = TaskRow("?", "Ada", also=("Ada Lovelace",))
    assert exact_match(row, "ada lovelace") == containment(row, "By Ada Lovelace") == 1


def test_bleu() -> None:
    # 6 of 7 words, 5 of 6 pairs, 4 of 5 triples, 3 of 4 quadruples of the answer are in the gold answer.
    answer, gold = "the cat is on the mat today", "the cat is on the mat"
    precision = (6 / 7 * 5 / 6 * 4 / 5 * 3 / 4) ** 0.25
    assert bleu([answer], [gold]) == pytest.approx(100 * precision)
    # With an empty answer beside it, the corpus has 7 of 10 words, and is punished for that.
    assert bleu([answer, ""], [gold, "a b c d"]) == pytest.approx(100 * precision * math.exp(1 - 10 / 7))


def test_rouge() -> None:
    # Words in common: 2 of 3 and of 4; pairs: 1 of 2 and of 3; longest common sequence: 2.
    found = rouge(["the cat sat", ""], ["the cat ran far", "the cat"])
    assert found["rouge1"] == [pytest.approx(2 * 2 / 7), 0]
    assert found["rouge2"] == [pytest.approx(2 * 1 / 5), 0]
    assert found["rougeL"] == [pytest.approx(2 * 2 / 7), 0]


def test_perplexity_weighs_tokens_not_rows() -> None:
    assert perplexity([(3 * math.log(2), 3)]) == pytest.approx(2)
    assert perplexity([(0, 1), (3 * math.log(16), 3)]) == pytest.approx(8)


@pytest.mark.parametrize(
    ("right", "total", "low", "high"), [(8, 10, 0.4902, 0.9433), (0, 10, 0, 0.2775), (10, 10, 0.7225, 1)]
)
def test_wilson(right: int, total: int, low: float, high: float) -> None:
    found = wilson(right, total)
    assert found.value == right / total
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@given(total=st.integers(1, 400), part=st.floats(0, 1))
def test_wilson_holds_the_share_and_narrows_with_rows(total: int, part: float) -> None:
    right = round(part * total)
    few, many = wilson(right, total), wilson(4 * right, 4 * total)
    assert 0 <= few.low <= few.value <= few.high <= 1
    assert many.high - many.low < few.high - few.low


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="3 of 2 is no share"):
        wilson(3, 2)


def test_bootstrap_keeps_to_the_rows_of_a_task() -> None:
    assert bootstrap_mean([[1, 1, 1], [0, 0]], seed=3) == Estimate(0.5, 0.5, 0.5)
    wide = bootstrap_mean([[1, 0] * 50], seed=3)
    # The standard error of a share of 1/2 over 100 rows is 0.05.
    assert wide.low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.02)
    assert wide.high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.02)
    assert wide == bootstrap_mean([[1, 0] * 50], seed=3)
    assert wide != bootstrap_mean([[1, 0] * 50], seed=4)


def test_bootstrap_of_a_statistic() -> None:
    values = [1.0, 2.0, 3.0, 10.0]
    found = bootstrap(lambda chosen: max(values[i] for i in chosen), rows=4, seed=0, resamples=100)
    assert (found.value, found.high) == (10, 10)
    assert found.low < 10


def test_texts_get_bleu_and_rouge_and_empty_answers_are_zeros() -> None:
    rows = (TaskRow("?", "the cat is on the mat"), TaskRow("?", "a b c d"))
    plain = score_task(Task("t", rows), ["the cat is on the mat", ""], seed=0)
    assert set(plain) == {"exact_match", "containment"}
    assert plain["exact_match"].value == 0.5
    text = score_task(Task("t", rows, text=True), ["the cat is on the mat", ""], seed=0)
    assert text["bleu"].value == pytest.approx(100 * math.exp(1 - 10 / 6))
    assert text["rougeL"].value == 0.5


def test_no_score_has_no_mean() -> None:
    assert means([], [], seed=0) == ()
