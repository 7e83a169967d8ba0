"""Statistics of few runs: mean, standard deviation, and differences of runs that share a seed.

Runs of one seed share the order of their data, so differences within seeds say more than a difference of two means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Of some scores.

    Attributes:
        count: number of scores.
        mean: their mean; NaN without any.
        std: their standard deviation with n - 1 in the denominator; NaN below two.
    """

    count: int
    mean: float
    std: float


@dataclass(frozen=True)
class Difference:
    """Mean difference within pairs.

    Attributes:
        count: number of pairs.
        mean: of the differences; NaN without any.
        low: lower end of the confidence interval; NaN below two pairs.
        high: its upper end, likewise.
    """

    count: int
    mean: float
    low: float
    high: float

    @property
    def is_significant(self) -> bool:
        """Whether there is an interval and 0 lies outside it."""
        return self.low > 0 or self.high < 0


def summary(scores: Sequence[float]) -> Summary:
    """Mean and standard deviation of finite scores."""
    count = len(scores)
    mean = math.fsum(scores) / count if count else math.nan
    return Summary(count, mean, _std(scores, mean))


def paired_difference(
    first: Mapping[int, float], other: Mapping[int, float], confidence: float = CONFIDENCE
) -> Difference:
    """How far `other` lies above `first`, with the interval of Student's t distribution.

    Args:
        first: finite scores by seed.
        other: likewise; only seeds of both count.
        confidence: probability that the interval holds the mean difference, if differences are normal.
    """
    from scipy.special import stdtrit  # type: ignore[import-untyped]

    differences = [other[seed] - first[seed] for seed in sorted(first.keys() & other.keys())]
    count = len(differences)
    mean = math.fsum(differences) / count if count else math.nan
    if count < 2:
        return Difference(count, mean, math.nan, math.nan)
    half = float(stdtrit(count - 1, (1 + confidence) / 2)) * _std(differences, mean) / math.sqrt(count)
    return Difference(count, mean, mean - half, mean + half)


def _std(values: Sequence[float], mean: float) -> float:
    if len(values) < 2:
        return math.nan
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
