"""How good a policy is, on fresh episodes.

The figure is the mean return of the stochastic policy, with a confidence interval; the mode is a second number.
Episodes that selected a policy are never those that report it.
"""

import math
from statistics import NormalDist
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from pgengine.environments import EpisodeEnvironment, open_environment
from pgengine.errors import DivergedError, SpecError
from pgengine.noise import Noise
from pgengine.policies import Policy
from pgengine.rollout import rollout
from pgengine.spec import LARGEST_INTEGER, EnvironmentSpec, Spec

__all__ = ["CONFIDENCE", "Evaluation", "evaluate", "evaluate_in", "lower_bound", "student_quantile"]

CONFIDENCE = 0.95
WAVE = 1024  # episodes played side by side


class Evaluation(Spec):
    """Mean return of a policy over fresh episodes."""

    mean_return: float
    """Mean undiscounted return of the stochastic policy."""
    confidence_interval: Annotated[list[float], Field(min_length=2, max_length=2)]
    """Two-sided 95% interval of the mean (Student's t)."""
    episodes: int
    """Fresh episodes played."""
    mean_length: float
    """Mean number of environment steps."""
    deterministic_mean_return: float | None
    """Mean return of the mode, the most probable actions, over other fresh episodes; null if there were none."""
    deterministic_episodes: int
    """Fresh episodes of the mode."""


def evaluate(
    policy: Policy,
    environment: EnvironmentSpec | EpisodeEnvironment,
    *,
    episodes: int = 100,
    seed: int = 0,
    deterministic_episodes: int = 20,
    survival: float = 1.0,
) -> Evaluation:
    """Plays fresh episodes and takes their mean return.

    Args:
        policy: What acts.
        environment: Where: a spec, or an environment of your own, which is left open.
        episodes: How many, at least 2.
        seed: Of the run whose policy this is, or any other; training and evaluation never share a random number.
        deterministic_episodes: How many other episodes for the mode; 0 for none.
        survival: Probability that an episode goes on after a step: `algorithm.survival` of the run, which is gamma
            where the discount is a termination, so that the mean return is the discounted one.

    Raises:
        SpecError: if the environment cannot be made, the policy does not fit it, or an episode might never end
            (`no_certain_end`).
        EnvironmentFailure: if it raised in the middle.
        DivergedError: if returns are so large that their variance is beyond every float.
    """
    if episodes < 2 or deterministic_episodes < 0:
        raise SpecError("/episodes", "too_few_episodes", "an interval needs at least 2 episodes")
    if not 0 <= seed <= LARGEST_INTEGER:
        raise SpecError("/seed", "seed_out_of_range", f"expected 0 to {LARGEST_INTEGER}")
    opened = open_environment(environment) if isinstance(environment, Spec) else environment
    try:
        policy.fits(opened.facts)
        if not opened.facts.ends_for_certain and survival >= 1.0:
            raise SpecError(
                "/horizon",
                "no_certain_end",
                "some policies would never end an episode; give a horizon, or a survival below 1, which is gamma where "
                "the discount is a termination",
            )
        return evaluate_in(
            opened,
            policy,
            episodes=episodes,
            seed=seed,
            domain="evaluation",
            deterministic_episodes=deterministic_episodes,
            survival=survival,
        )
    finally:
        if isinstance(environment, Spec):
            opened.close()


def evaluate_in(
    environment: EpisodeEnvironment,
    policy: Policy,
    *,
    episodes: int,
    seed: int,
    domain: Literal["selection", "evaluation"],
    deterministic_episodes: int,
    survival: float = 1.0,
) -> Evaluation:
    """The same in an environment that is open already, at an address of one's own."""
    returns, lengths = _play(environment, policy, Noise(seed, domain, policy.updates), episodes, survival)
    with np.errstate(over="ignore", invalid="ignore"):
        summed = float(np.abs(returns).sum() ** 2)
    if not math.isfinite(summed):
        raise DivergedError(policy.updates, seed, "the variance of the returns")
    mode: float | None = None
    if deterministic_episodes:
        noise = Noise(seed, "mode", policy.updates)
        played, _ = _play(environment, policy, noise, deterministic_episodes, survival, deterministic=True)
        mode = float(played.mean())
    return Evaluation(
        mean_return=float(returns.mean()),
        confidence_interval=list(_interval(returns)),
        episodes=episodes,
        mean_length=float(lengths.mean()),
        deterministic_mean_return=mode,
        deterministic_episodes=deterministic_episodes,
    )


def _play(
    environment: EpisodeEnvironment,
    policy: Policy,
    noise: Noise,
    episodes: int,
    survival: float,
    *,
    deterministic: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    returns, lengths = [], []
    for first in range(0, episodes, WAVE):
        count = min(WAVE, episodes - first)
        batch = rollout(policy, environment, noise, count, first=first, survival=survival, deterministic=deterministic)
        returns.append(batch.returns)
        lengths.append(batch.lengths)
    return np.concatenate(returns), np.concatenate(lengths)


def _interval(returns: np.ndarray) -> tuple[float, float]:
    n = len(returns)
    mean = float(returns.mean())
    half = student_quantile(0.5 + CONFIDENCE / 2, n - 1) * float(returns.std(ddof=1)) / math.sqrt(n)
    return mean - half, mean + half


def lower_bound(evaluation: Evaluation, error: float) -> float:
    """Lower one-sided bound of the mean return that is too high with the odds of `error`."""
    low, high = evaluation.confidence_interval
    degrees = evaluation.episodes - 1
    deviation = (high - low) / 2 / student_quantile(0.5 + CONFIDENCE / 2, degrees)
    return evaluation.mean_return - student_quantile(1 - error, degrees) * deviation


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
