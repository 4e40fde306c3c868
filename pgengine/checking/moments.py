"""One pass over samples of a vector: mean, variance and skewness of each coordinate, and whether a mean is as claimed.

This file knows samples and a target; it does not know what they are samples of.

**The test.** Null hypothesis: every coordinate's expectation is the target's. Each coordinate has a Student statistic,
corrected for skewness by Hall's transformation (Hall 1992, On the removal of skewness by transformation), and the
largest of them is compared with the quantile of Student's t at false_alarm / (2 P), so that the probability of any
false alarm over P coordinates is at most false_alarm. Without the correction a coordinate that is seldom touched raises
false alarms up to six times as often as stated (binomial, 400 expected events, 1e-6).

A coordinate whose skewness is too large for the number of samples (above 0.1 sqrt(n): one that fewer than about 100
samples touch), or any with fewer than 200 samples, is held against the empirical Bernstein bound instead (Maurer and
Pontil 2009), which needs no normal approximation but a bound on what a sample can be. The largest number that was seen
in any coordinate is taken for it: the stated probability holds only if nothing much larger can come.

Samples alone do not show what is too rare to be among them. Whoever knows the skewness from elsewhere says so, and a
coordinate for which it is too large is held against the Bernstein bound with what a sample can be at most; where that
is infinite nothing is told of the coordinate. Where nothing moved at all, nothing is told: a reward that is never met
looks the same.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from pgengine.intervals import student_quantile

__all__ = ["ENOUGH", "POWER", "SKEWEST", "BiasTest", "Moments", "bias_test"]

ENOUGH = 200
"""Samples from which a Student statistic is trusted; fewer are held against the Bernstein bound."""
SKEWEST = 0.1
"""Largest skewness over sqrt(samples) that Hall's transformation is trusted with."""
POWER = 0.95
"""Odds of seeing the smallest detectable bias."""

_ROUNDING = 1e-12  # of the largest number seen: below it a coordinate counts as zero


class Moments:
    """Mean and central moments of each coordinate of a vector of P numbers, merged chunk by chunk.

    Source: Welford 1962; Pébay 2008, pairwise updates of higher moments.
    """

    def __init__(self, P: int) -> None:
        self.count = 0
        self.mean = np.zeros(P)
        self.largest = 0.0
        self._second = np.zeros(P)
        self._third = np.zeros(P)

    @np.errstate(over="ignore", invalid="ignore")  # whoever reports finds what is not finite
    def add(self, samples: Float[np.ndarray, "b P"]) -> None:
        """Takes b >= 1 samples in."""
        b, n = len(samples), self.count
        total = n + b
        mean = samples.mean(axis=0)
        centred = samples - mean
        square = centred * centred
        second, third = square.sum(axis=0), (square * centred).sum(axis=0)
        delta = mean - self.mean
        self._third += (
            third + delta**3 * (n * b * (n - b) / total**2) + 3 * delta * (n * second - b * self._second) / total
        )
        self._second += second + delta**2 * (n * b / total)
        self.mean += delta * (b / total)
        self.count = total
        self.largest = max(self.largest, float(np.abs(samples).max(initial=0.0)))

    @property
    def variance(self) -> Float[np.ndarray, "P"]:
        """Unbiased variance of each coordinate; zero for a single sample."""
        return self._second / max(self.count - 1, 1)

    @property
    def skewness(self) -> Float[np.ndarray, "P"]:
        """Third central moment over the cube of the deviation, zero where nothing varies."""
        deviation = np.sqrt(self._second / max(self.count, 1))
        varies = deviation > _ROUNDING * self.largest
        cube = np.where(varies, deviation, 1.0) ** 3
        return np.where(varies, self._third / max(self.count, 1) / cube, 0.0)


@dataclass(frozen=True)
class BiasTest:
    """What a simultaneous test of all coordinates found.

    Attributes:
        statistic: Largest departure, in standard errors; 0 if there is nothing to test.
        threshold: What it exceeds with the probability of a false alarm under the null hypothesis, or less.
        worst: The coordinate of the largest departure, or None if there is nothing to test.
        smallest_detectable: A bias of this size in any one coordinate would have been seen with 95% power; None if
            there is nothing to test, or nothing can be told of some coordinate.
        tested: [P] coordinates that are not identically zero.
        by_quantile: [P] those of them that were held against a quantile; the others against the Bernstein bound.
    """

    statistic: float
    threshold: float
    worst: int | None
    smallest_detectable: float | None
    tested: Bool[np.ndarray, "P"]
    by_quantile: Bool[np.ndarray, "P"]

    @property
    def seen(self) -> bool:
        """Whether the null hypothesis is rejected."""
        return self.statistic > self.threshold


def bias_test(
    moments: Moments,
    target: Float[np.ndarray, "P"],
    *,
    false_alarm: float,
    bounds: Float[np.ndarray, "P"] | None = None,
    skewness: Float[np.ndarray, "P"] | None = None,
) -> BiasTest:
    """Tests whether all expectations are those of the target.

    Args:
        moments: Of at least two independent samples.
        target: The expectations of the null hypothesis.
        false_alarm: Odds of a rejection under it, over all coordinates together.
        bounds: What a sample cannot exceed in size, infinity where that is not known; taken where `skewness` is too
            large. None: the largest number seen.
        skewness: Size of the skewness as it is known apart from the samples. None: they say it alone.
    """
    n = moments.count
    unit = max(moments.largest, float(np.abs(target).max(initial=0.0)))
    error = np.sqrt(moments.variance / n)
    if moments.largest == 0.0:
        nothing = np.zeros(len(target), dtype=bool)
        return BiasTest(0.0, -student_quantile(false_alarm / 2, n - 1), None, None, nothing, nothing)
    tested = (np.abs(target) > _ROUNDING * unit) | (np.abs(moments.mean) > _ROUNDING * unit) | (error > 0.0)
    P = max(int(tested.sum()), 1)
    threshold = -student_quantile(false_alarm / (2 * P), n - 1)
    varies = tested & (error > _ROUNDING * unit)
    tame = np.ones(len(target), dtype=bool) if skewness is None else skewness <= SKEWEST * math.sqrt(n)
    by_quantile = varies & tame & (np.abs(moments.skewness) <= SKEWEST * math.sqrt(n)) & (n >= ENOUGH)
    gap = moments.mean - target
    # the coordinates that the quantile cannot judge: in units in which the Bernstein bound is the threshold
    log_odds = math.log(4 * P / false_alarm)
    largest = np.full(len(target), moments.largest)
    if bounds is not None:
        largest = np.where(tame, largest, bounds)
    bound = error * math.sqrt(2 * log_odds) + 14 * largest * log_odds / (3 * (n - 1))
    statistics = np.abs(gap) / np.where(bound > 0.0, bound, math.inf) * threshold
    u = moments.skewness[by_quantile] / (3 * math.sqrt(n))
    t = gap[by_quantile] / error[by_quantile]
    statistics[by_quantile] = np.abs(t + u * t**2 + u**2 * t**3 / 3 + u / 2)
    statistics[~tested] = 0.0
    margin = np.where(by_quantile, threshold * error, bound) - student_quantile(1 - POWER, n - 1) * error
    worst, detectable = int(np.argmax(statistics)), float(margin[tested].max())
    return BiasTest(
        statistic=float(statistics[worst]),
        threshold=threshold,
        worst=worst,
        smallest_detectable=detectable if math.isfinite(detectable) else None,
        tested=tested,
        by_quantile=by_quantile,
    )
