"""How answers are scored. An empty answer counts as zero everywhere; it is never left out.

BLEU is sacrebleu's, ROUGE torchmetrics', both of the optional extra ``eval``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from meteora_dist.evaluation.tasks import TaskRow, normal

ROUGE_KEYS = ("rouge1", "rouge2", "rougeL")


def exact_match(row: TaskRow, answer: str) -> float:
    """1.0 where the answer is the gold answer, see ``TaskRow.score``."""
    return row.score(answer)


def containment(row: TaskRow, answer: str) -> float:
    """1.0 where a gold answer is somewhere in the answer, up to case, spaces and a final full stop.

    Generous on purpose, as in MeteoRA's evaluation: ``valid`` is in ``invalid``. A gold answer that opens with yes or
    no is judged by that word at the answer's start, as in ``TaskRow.score``.
    """
    if (said := row.first_word_right(answer)) is not None:
        return float(said)
    return float(any(normal(gold) in normal(answer) for gold in (row.target, *row.also)))


def perplexity(nlls: Sequence[tuple[float, int]]) -> float:
    """Returns exp of the mean negative log-likelihood a token, over (nats, tokens) of every row."""
    return math.exp(sum(nats for nats, _ in nlls) / sum(tokens for _, tokens in nlls))


def bleu(answers: Sequence[str], golds: Sequence[str]) -> float:
    """Corpus BLEU, 0 to 100: sacrebleu's default (up to 4-grams, 13a tokens, case matters)."""
    from sacrebleu import corpus_bleu

    return float(corpus_bleu(list(answers), [list(golds)]).score)


def rouge(answers: Sequence[str], golds: Sequence[str]) -> dict[str, list[float]]:
    """F1 of ROUGE-1, -2 and -L for every answer, 0 to 1, without stemming."""
    from torchmetrics.functional.text.rouge import rouge_score

    scores: dict[str, list[float]] = {key: [] for key in ROUGE_KEYS}
    for answer, gold in zip(answers, golds, strict=True):
        found = rouge_score(answer, gold, rouge_keys=ROUGE_KEYS) if answer.strip() else {}
        for key in ROUGE_KEYS:
            scores[key].append(float(found.get(f"{key}_fmeasure", 0.0)))
    return scores
