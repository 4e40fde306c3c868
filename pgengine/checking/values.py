"""Exact values and optima, as a report tells them."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from pgengine.checking.reports import ValueReport
from pgengine.distributions import DiagonalGaussian
from pgengine.environments import EpisodeEnvironment, Lqr, TabularMDP
from pgengine.errors import SpecError
from pgengine.exact import (
    best_linear,
    best_stationary,
    exact_values,
    optimal_control,
    optimal_plan,
    optimal_values,
)
from pgengine.policies import Policy
from pgengine.spec import AlgorithmSpec

__all__ = ["value_report"]

MOST_NUMBERS = 100_000
"""Numbers of v, q and d together up to which they are told."""


def value_report(policy: Policy, environment: EpisodeEnvironment, algorithm: AlgorithmSpec) -> ValueReport:
    """What the policy is worth, and the three optima, for the objective of an algorithm.

    Args:
        policy: At its parameters.
        environment: A finite MDP or an LQR.
        algorithm: Its gamma, and its entropy if that is part of the objective. Optima are those of the plain return.
    """
    if isinstance(environment, Lqr):
        return _of_lqr(policy, environment, algorithm.gamma)
    assert isinstance(environment, TabularMDP), "nothing else has an exact gradient"
    gamma = algorithm.gamma
    values = exact_values(policy, environment, gamma=gamma, entropy=algorithm.entropy_coefficient)
    told = values.v.size + values.q.size + values.d.size <= MOST_NUMBERS
    return ValueReport(
        v=_listed(values.v) if told else None,
        q=_listed(values.q) if told else None,
        d=_listed(values.d) if told else None,
        mass=values.mass,
        optimum_without_limit=_if_any(lambda: optimal_values(environment, gamma=gamma).J),
        optimum_with_clock=_if_any(lambda: optimal_plan(environment, gamma=gamma).J),
        best_stationary=_if_any(lambda: best_stationary(environment, gamma=gamma).J),
    )


def _of_lqr(policy: Policy, lqr: Lqr, gamma: float) -> ValueReport:
    """The optima with the noise that the policy's actions have."""
    d = policy.distribution
    assert isinstance(d, DiagonalGaussian), "nothing else acts in a box"
    sigma = np.exp(np.asarray(d.log_sigma(policy.parameters, np.zeros((1, d.width))), dtype=np.float64)).reshape(-1)
    return ValueReport(
        v=None,
        q=None,
        d=None,
        mass=None,
        optimum_without_limit=None,
        optimum_with_clock=_if_any(lambda: optimal_control(lqr, gamma=gamma, deviation=sigma).J),
        best_stationary=_if_any(lambda: best_linear(lqr, gamma=gamma, deviation=sigma).J),
    )


def _if_any(optimum: Callable[[], float]) -> float | None:
    """The optimum; None where there is none, or none that is finite."""
    try:
        found = float(optimum())
    except SpecError:
        return None
    return found if math.isfinite(found) else None


def _listed(table: np.ndarray) -> list[Any]:
    """Nested lists; None where a value is not a number."""
    cells = table.astype(object)
    cells[~np.isfinite(table)] = None
    listed: list[Any] = cells.tolist()
    return listed
