"""Estimates with 95 % confidence intervals.

Shares of right answers have Wilson's interval (E. B. Wilson, 1927), which holds for few rows and near 0 and 1. What is
no share has the percentiles of a seeded bootstrap over rows (B. Efron, 1979). Both speak of the rows: another draw of
questions. Neither knows of another training run; for that, evaluate banks of several seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959963984540054
"""Two-sided 95 % of the normal distribution."""
RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(right: float, total: int) -> Estimate:
    """Share of ``right`` among ``total``, with Wilson's interval."""
    if total < 1 or not 0 <= right <= total:
        raise ValueError(f"{right} of {total} is no share")
    share, square = right / total, Z95**2
    centre = (share + square / (2 * total)) / (1 + square / total)
    half = Z95 / (1 + square / total) * math.sqrt(share * (1 - share) / total + square / (4 * total**2))
    # Rounding must not put the share itself outside.
    return Estimate(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)))


def bootstrap_mean(groups: Sequence[Sequence[float]], seed: int, resamples: int = RESAMPLES) -> Estimate:
    """Mean of the groups' means; every resample draws each group's rows anew, and no group from another's.

    Args:
        groups: Values of each group's rows; one group for a plain mean.
        seed: Of the draws.
        resamples: How many.
    """
    generator = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for group in groups:
        values = np.asarray(group, dtype=np.float64)
        means += values[generator.integers(len(values), size=(resamples, len(values)))].mean(axis=1)
    return _percentiles(float(np.mean([np.mean(group) for group in groups])), means / len(groups))


def bootstrap(statistic: Callable[[Sequence[int]], float], rows: int, seed: int, resamples: int) -> Estimate:
    """A statistic of rows, such as corpus BLEU, that is no mean over them.

    Args:
        statistic: Of the rows at these indices, which may repeat.
        rows: How many there are.
        seed: Of the draws.
        resamples: How many.
    """
    generator = np.random.default_rng(seed)
    drawn = [statistic(generator.integers(rows, size=rows).tolist()) for _ in range(resamples)]
    return _percentiles(statistic(range(rows)), np.array(drawn))


def _percentiles(value: float, drawn: NDArray[np.float64]) -> Estimate:
    low, high = np.percentile(drawn, [2.5, 97.5]).tolist()
    return Estimate(value, min(value, low), max(value, high))
