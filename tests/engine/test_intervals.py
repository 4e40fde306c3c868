"""Intervals hold the mean as often as they say, whatever is rare, for what they are told."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgengine.intervals import ReturnRange, lower_bound, mean_interval, student_quantile

# Two-sided 95% points of Student's t from a printed table.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 30: 2.042, 99: 1.984}


@pytest.mark.parametrize(("degrees", "value"), TABLE.items())
def test_student_quantiles(degrees: int, value: float) -> None:
    assert student_quantile(0.975, degrees) == pytest.approx(value, abs=0.01 if degrees == 3 else 0.002)


# --- two values -------------------------------------------------------------------------------------------------------

COIN = ReturnRange(low=-1.0, high=3.0, two_values=True)


@pytest.mark.parametrize("p", [0.5, 0.98, 0.01, 0.999, 0.001, 0.3, 0.95])
def test_intervals_of_two_valued_returns_hold_the_mean_in_95_percent_of_samples(p: float) -> None:
    """Exactly: the probabilities of all samples of 100 are summed."""
    n, held = 100, 0.0
    for hits in range(n + 1):
        sample = np.where(np.arange(n) < hits, 3.0, -1.0)
        found = mean_interval(sample, COIN)
        assert found.method == "clopper_pearson"
        if found.low <= 4.0 * p - 1.0 <= found.high:
            held += math.comb(n, hits) * p**hits * (1.0 - p) ** (n - hits)
    assert held >= 0.95


def test_the_interval_of_two_values_is_that_of_the_tables() -> None:
    """8 of 10: Clopper and Pearson's 0.4439 to 0.9748; 0 of 10: 0 to 0.3085."""
    zero_or_one = ReturnRange(low=0.0, high=1.0, two_values=True)
    for hits, low, high in ((8, 0.4439, 0.9748), (0, 0.0, 0.3085), (10, 0.6915, 1.0)):
        found = mean_interval((np.arange(10) < hits) * 1.0, zero_or_one)
        assert (found.low, found.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


# --- a range ----------------------------------------------------------------------------------------------------------

UNIT = ReturnRange(low=0.0, high=1.0)
SKEWED = {
    "a coin of 0.98": ([0.0, 1.0], [0.02, 0.98]),
    "a coin of 0.01": ([0.0, 1.0], [0.99, 0.01]),
    "mostly 1, rarely 0.6": ([0.6, 1.0], [0.05, 0.95]),
    "rarely large": ([0.0, 0.1, 1.0], [0.5, 0.49, 0.01]),
    "rarely bad": ([0.0, 0.9, 0.95, 1.0], [0.005, 0.3, 0.3, 0.395]),
    "even": ([0.0, 0.25, 0.5, 0.75, 1.0], [0.2] * 5),
}


@pytest.mark.slow
@pytest.mark.parametrize("world", SKEWED)
def test_of_a_known_range_at_least_95_percent_of_samples_hold_the_mean(world: str) -> None:
    """Null: each sample of 100 holds it with probability 0.95; of 500, fewer than 448 have a probability below 1e-6."""
    values, chances = (np.array(part) for part in SKEWED[world])
    generator = np.random.default_rng(0)
    held = 0
    for sample in generator.choice(values, p=chances, size=(500, 100)):
        found = mean_interval(sample, UNIT)
        held += found.low <= values @ chances <= found.high
    assert held >= 448


@pytest.mark.slow
@pytest.mark.parametrize("world", SKEWED)
def test_the_bound_of_a_known_range_holds_at_any_number_of_looks(world: str) -> None:
    """Null: at some of 300 lengths of a sample that grows the bound is too high with probability 0.05.

    Of 400 samples, more than 46 have a probability below 1e-6. A bound counts all looks before it.
    """
    values, chances = (np.array(part) for part in SKEWED[world])
    generator = np.random.default_rng(1)
    samples = generator.choice(values, p=chances, size=(400, 300))
    too_high = sum(lower_bound(sample, UNIT, 0.05, planned=100)[0] > values @ chances for sample in samples)
    assert too_high <= 46


def test_a_bound_never_falls_as_the_sample_grows() -> None:
    sample = np.random.default_rng(2).uniform(size=200)
    bounds = [lower_bound(sample[:n], UNIT, 0.05, planned=50)[0] for n in range(10, 200, 10)]
    assert all(later >= earlier - 1e-9 for earlier, later in zip(bounds[:-1], bounds[1:], strict=True))


def test_where_returns_hardly_differ_the_interval_is_narrow() -> None:
    """475 of 500 is proven by 100 returns of 500; a bound that took the worst variance would need 2,000 of them."""
    bound, method = lower_bound(np.full(100, 500.0), ReturnRange(low=0.0, high=500.0), 0.025)
    assert method == "betting"
    assert 475.0 < bound < 485.0


@given(st.lists(st.floats(0.0, 1.0), min_size=2, max_size=40), st.booleans())
def test_no_interval_is_a_point_unless_all_returns_are_known_to_be_the_same(returns: list[float], two: bool) -> None:
    sample = np.array(returns)
    found = mean_interval(sample, ReturnRange(low=0.0, high=1.0, two_values=two))
    assert 0.0 <= found.low <= sample.mean() + 1e-9
    assert sample.mean() - 1e-9 <= found.high <= 1.0
    assert found.high - found.low > 0.01


def test_all_returns_known_to_be_the_same_are_exact() -> None:
    only = ReturnRange(low=2.5, high=2.5, two_values=True)
    found = mean_interval(np.full(3, 2.5), only)
    assert (found.low, found.high, found.method) == (2.5, 2.5, "exact")
    assert lower_bound(np.full(3, 2.5), only, 0.05) == (2.5, "exact")


# --- nothing ----------------------------------------------------------------------------------------------------------


def test_where_nothing_is_known_returns_that_are_all_alike_have_no_interval() -> None:
    found = mean_interval(np.full(50, 0.1), None)
    assert (found.low, found.high, found.method) == (-math.inf, math.inf, "t")
    assert lower_bound(np.full(50, 0.1), None, 0.05) == (pytest.approx(0.1), "t")


def test_a_range_that_the_sample_leaves_is_not_used() -> None:
    for sample in (np.array([0.2, 0.5, 1.2]), np.array([-0.1, 0.5, 0.7])):
        assert mean_interval(sample, UNIT).method == "t"
        assert lower_bound(sample, UNIT, 0.05)[1] == "t"
    rounded = np.array([0.1 + 0.2 + 0.7 + 1e-12, 0.5])
    assert mean_interval(rounded, UNIT).method == "betting"
