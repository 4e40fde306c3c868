"""How far the mean of a sample may be from the mean that it was drawn from: bounds that hold for what is known.

    two values    Clopper and Pearson: exact for every number of episodes
    a range       a bet against each value of the mean: holds for every distribution there, at any number of looks
    nothing       Student's t: approximate, and too narrow where what is rare or skewed was not seen

The bet: whoever believes that the mean is at most m gives even terms on every return, x - m. A gambler who starts with
1 and never bets what he does not have owns 1 / error with probability at most `error`, at any time, if m is the truth
(Ville). So the means at which he got as rich as that are refused; what is left is the interval.

    wealth_n(m) = product over i of (1 + bet_i (x_i - m)),    0 <= bet_i <= 0.9 / m, decided before x_i is seen

Knows numbers only: no policy and no environment.

Source: Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting, 2023, (26) for the bets, with
the range of returns mapped to [0, 1]; Clopper and Pearson 1934.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from jaxtyping import Float

from pgengine.spec import Spec

__all__ = ["CONFIDENCE", "Interval", "Method", "ReturnRange", "lower_bound", "mean_interval", "student_quantile"]

CONFIDENCE = 0.95

Method = Literal["exact", "clopper_pearson", "betting", "t"]
"""How a bound was made: the mean is known, a proof for two values, a proof for a range, or an approximation."""

MOST_OF_THE_WEALTH = 0.9  # share that may be lost in one bet: all of it would end the game at the first zero
HALVINGS = 40  # of the range, until a bound is found
ROUNDING = 1e-9  # of the range: how far a sum of rewards may lie outside of it


class ReturnRange(Spec):
    """Between which numbers every return of an environment lies, whoever acts."""

    low: float
    """No return is lower."""
    high: float
    """No return is higher."""
    two_values: bool = False
    """Whether every return is one of the two, and nothing between them."""


@dataclass(frozen=True)
class Interval:
    """Where the mean is.

    Attributes:
        low: Lower end; minus infinity where nothing can be said.
        high: Upper end; infinity where nothing can be said.
        method: How it was made.
    """

    low: float
    high: float
    method: Method


def mean_interval(
    sample: Float[np.ndarray, "n"], known: ReturnRange | None, *, confidence: float = CONFIDENCE
) -> Interval:
    """Two-sided interval of the mean. It is a single point only if every return is known to be the same.

    Args:
        sample: Independent returns.
        known: Their range, or None. A sample that lies outside shows that it was wrong, and it is not used.
        confidence: Probability with which the interval holds the mean: at least, unless the method is `t`, which has
            it only as the sample grows.
    """
    n, tail = len(sample), (1.0 - confidence) / 2.0
    if known is not None and _holds(known, sample):
        if known.low == known.high:
            return Interval(known.low, known.high, "exact")
        scaled = _scaled(sample, known)
        width = known.high - known.low
        if known.two_values and bool(np.isin(scaled, (0.0, 1.0)).all()):
            low, high = _proportion(n, int(scaled.sum()), tail), 1.0 - _proportion(n, n - int(scaled.sum()), tail)
            return Interval(known.low + width * low, known.low + width * high, "clopper_pearson")
        low, high = _bet_from_below(scaled, tail), 1.0 - _bet_from_below(1.0 - scaled, tail)
        return Interval(known.low + width * low, known.low + width * high, "betting")
    deviation = float(sample.std(ddof=1)) if n > 1 else 0.0
    mean = float(sample.mean())
    if deviation <= ROUNDING * max(1.0, abs(mean)):
        # returns that are all alike say nothing of those that were not seen
        return Interval(-math.inf, math.inf, "t")
    half = student_quantile(1.0 - tail, n - 1) * deviation / math.sqrt(n)
    return Interval(mean - half, mean + half, "t")


def lower_bound(
    sample: Float[np.ndarray, "n"], known: ReturnRange | None, error: float, *, planned: int | None = None
) -> tuple[float, Method]:
    """Lower bound of the mean, and how it was made.

    Args:
        sample: Independent returns, in the order in which they were played.
        known: As in `mean_interval`.
        error: Probability with which the bound may be too high. By betting it holds at any number of looks at a sample
            that grows; by `t` it is approximate, and is the mean itself if all returns are alike.
        planned: Length of the sample for which the bets are made, the same at every look at a sample that grows. It
            decides the size of the bets and not whether the bound holds. Default: its length.
    """
    if known is not None and _holds(known, sample):
        if known.low == known.high:
            return known.low, "exact"
        scaled = _scaled(sample, known)
        return known.low + (known.high - known.low) * _bet_from_below(scaled, error, planned), "betting"
    n, mean = len(sample), float(sample.mean())
    deviation = float(sample.std(ddof=1)) if n > 1 else math.inf
    return mean - student_quantile(1.0 - error, n - 1) * deviation / math.sqrt(n), "t"


def _holds(known: ReturnRange, sample: np.ndarray) -> bool:
    slack = ROUNDING * max(1.0, abs(known.low), abs(known.high))
    return bool((sample >= known.low - slack).all() and (sample <= known.high + slack).all())


def _scaled(sample: np.ndarray, known: ReturnRange) -> np.ndarray:
    scaled = np.clip((sample - known.low) / (known.high - known.low), 0.0, 1.0)
    ends = np.round(scaled)
    at_an_end: np.ndarray = np.where(np.abs(scaled - ends) <= ROUNDING, ends, scaled)
    return at_an_end


# --- betting ----------------------------------------------------------------------------------------------------------


def _bet_from_below(x: np.ndarray, error: float, planned: int | None = None) -> float:
    """The largest m for which a gambler against "the mean is at most m" has once owned 1 / error; x in [0, 1]."""
    bets = _bets(x, error, planned or len(x))
    enough = -math.log(error)
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        m = (low + high) / 2.0
        # the wealth falls as m grows, so that the means that are refused lie below the others
        wealth = np.cumsum(np.log1p(np.minimum(bets, MOST_OF_THE_WEALTH / m) * (x - m)))
        low, high = (m, high) if wealth.max() >= enough else (low, m)
    return low


def _bets(x: np.ndarray, error: float, planned: int) -> np.ndarray:
    """What is bet on each return, by the mean and the variance of those before it."""
    i = np.arange(1, len(x) + 1)
    mean = (0.5 + np.cumsum(x)) / (i + 1)
    variance = (0.25 + np.cumsum((x - mean) ** 2)) / (i + 1)
    before = np.concatenate([[0.25], variance[:-1]])
    bets: np.ndarray = np.sqrt(-2.0 * math.log(error) / (planned * before))
    return bets


# --- two values -------------------------------------------------------------------------------------------------------


def _proportion(n: int, hits: int, error: float) -> float:
    """The p at which n draws have that many hits or more with probability `error`; 0 if there are none."""
    if hits == 0:
        return 0.0
    k = np.arange(hits, n + 1)
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    choices = factorials[n] - factorials[k] - factorials[n - k]
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        p = (low + high) / 2.0
        tail = float(np.exp(choices + k * math.log(p) + (n - k) * math.log1p(-p)).sum())
        low, high = (p, high) if tail <= error else (low, p)
    return low


# --- Student's t ------------------------------------------------------------------------------------------------------


def student_quantile(p: float, degrees: int) -> float:
    """Quantile of Student's t, to 1e-3 from 4 degrees of freedom on.

    Exact for one and two degrees; otherwise the Cornish-Fisher expansion in 1/degrees (Abramowitz and Stegun 26.7.5).
    """
    if degrees == 1:
        return math.tan(math.pi * (p - 0.5))
    if degrees == 2:
        return (2 * p - 1) / math.sqrt(2 * p * (1 - p))
    z = NormalDist().inv_cdf(p)
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    g4 = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + g1 / degrees + g2 / degrees**2 + g3 / degrees**3 + g4 / degrees**4
