"""How good a policy is, on fresh episodes.

The figure is the mean return of the stochastic policy, with a confidence interval; the mode is a second number. Where
the mean is known without sampling it stands beside the sample. Episodes that selected a policy are never those that
report it: a number that decided something was chosen for being high, and is too high on average.
"""

import math
from typing import Annotated

import numpy as np
from pydantic import Field

from pgengine.environments import EpisodeEnvironment, open_environment
from pgengine.errors import DivergedError, SpecError
from pgengine.exactness import ExactAbsence, exact_absence
from pgengine.intervals import Method, lower_bound, mean_interval
from pgengine.noise import Noise
from pgengine.policies import Policy
from pgengine.resolution import as_ended
from pgengine.rollout import rollout
from pgengine.spec import LARGEST_INTEGER, EnvironmentSpec, Spec

__all__ = ["Evaluation", "Selection", "evaluate", "reaches", "select"]

WAVE = 1024  # episodes played side by side
SELECTION_ERROR = 0.05  # probability, over all looks of a run, of taking a policy below the target for one above
SELECTION_EPISODES = 30  # the least by which a policy is selected
ROUNDING = 1e-9  # by which an exact mean may lie below a target that it reaches


class Evaluation(Spec):
    """Mean return of a policy over fresh episodes."""

    mean_return: float
    """Mean undiscounted return of the stochastic policy."""
    confidence_interval: Annotated[list[float | None], Field(min_length=2, max_length=2)]
    """Two-sided 95% interval of the mean; null where nothing can be said: all returns were alike, and nothing is known
    of those that were not seen."""
    method: Method = "t"
    """How the interval was made. `clopper_pearson` (two possible returns) and `betting` (returns in a known range) hold
    the mean in at least 95% of all samples, whatever is rare; `t` does so only approximately, and less often where what
    is rare or skewed was not seen; `exact`: all returns are known to be the same."""
    exact_mean_return: float | None = None
    """The mean itself, computed without sampling; null where it is not known."""
    exact_absent: ExactAbsence | None = None
    """Why it is not known; null if it is."""
    episodes: int
    """Fresh episodes played."""
    mean_length: float
    """Mean number of environment steps."""
    deterministic_mean_return: float | None
    """Mean return of the mode, the most probable actions, over other fresh episodes; null if there were none."""
    deterministic_episodes: int
    """Fresh episodes of the mode."""


class Selection(Spec):
    """What decided whether a target is reached, and which checkpoint is the best.

    A mean that was selected for being high is too high on average: `pgengine.evaluate` gives a number that was not.
    """

    mean_return: float
    """What policies are compared by: the exact mean return where it is known, else the mean over the episodes below."""
    method: Method
    """How the lower bound was made: `exact` (the mean is known), `betting` (proven, for returns in a known range), or
    `t` (approximate: nothing is known of the range of returns)."""
    lower_bound: float
    """The mean return is at least this, but for the error below."""
    error: float
    """Probability with which the bound may be too high; 0 where the mean is known, approximate for `t`."""
    episodes: int
    """Fresh episodes played; 0 where the mean is known."""

    @property
    def is_proven(self) -> bool:
        """Whether the bound holds with the stated probability, whatever the returns are like."""
        return self.method != "t"


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
        return _evaluation(
            opened,
            policy,
            episodes=episodes,
            seed=seed,
            deterministic_episodes=deterministic_episodes,
            survival=survival,
        )
    finally:
        if isinstance(environment, Spec):
            opened.close()


def _evaluation(
    environment: EpisodeEnvironment,
    policy: Policy,
    *,
    episodes: int,
    seed: int,
    deterministic_episodes: int,
    survival: float,
) -> Evaluation:
    returns, lengths = _play(environment, policy, Noise(seed, "evaluation", policy.updates), episodes, survival)
    _check_spread(returns, policy, seed)
    mode: float | None = None
    if deterministic_episodes:
        noise = Noise(seed, "mode", policy.updates)
        played, _ = _play(environment, policy, noise, deterministic_episodes, survival, deterministic=True)
        mode = float(played.mean())
    exact = _exact_mean(environment, policy, survival)
    interval = mean_interval(returns, as_ended(environment.facts, survival).return_range)
    return Evaluation(
        mean_return=float(returns.mean()),
        confidence_interval=[end if math.isfinite(end) else None for end in (interval.low, interval.high)],
        method=interval.method,
        exact_mean_return=exact if isinstance(exact, float) else None,
        exact_absent=None if isinstance(exact, float) else exact,
        episodes=episodes,
        mean_length=float(lengths.mean()),
        deterministic_mean_return=mode,
        deterministic_episodes=deterministic_episodes,
    )


def select(
    environment: EpisodeEnvironment,
    policy: Policy,
    *,
    target: float | None,
    error: float,
    episodes: int,
    seed: int,
    survival: float = 1.0,
) -> Selection:
    """Looks at a policy in order to decide something, on episodes that nothing else uses.

    Where the mean is known, none is played. Else `episodes` are, at least 30; where the range of returns is known and
    the target is neither proven nor missed by the mean, once as many again: the bound holds at any number of looks.

    Args:
        environment: Where, open.
        policy: What acts.
        target: Mean return that is to be proven, or None: the policy is only compared with others.
        error: Probability with which the lower bound may be too high.
        episodes: How many, at first.
        seed: Of the run.
        survival: Probability that an episode goes on after a step.

    Raises:
        EnvironmentFailure: if the environment raised in the middle.
        DivergedError: if returns are so large that their variance is beyond every float.
    """
    exact = _exact_mean(environment, policy, survival)
    if isinstance(exact, float):
        return Selection(mean_return=exact, method="exact", lower_bound=exact, error=0.0, episodes=0)
    count = max(SELECTION_EPISODES, episodes)
    noise = Noise(seed, "selection", policy.updates)
    known = as_ended(environment.facts, survival).return_range
    returns, _ = _play(environment, policy, noise, count, survival)
    _check_spread(returns, policy, seed)
    low, method = lower_bound(returns, known, error, planned=count)
    if target is not None and method == "betting" and low < target <= returns.mean():
        more, _ = _play(environment, policy, noise, count, survival, first=count)
        returns = np.concatenate([returns, more])
        low, method = lower_bound(returns, known, error, planned=count)
    return Selection(
        mean_return=float(returns.mean()), method=method, lower_bound=low, error=error, episodes=len(returns)
    )


def reaches(selection: Selection, target: float) -> bool:
    """Whether a selection has shown that the mean return is at least the target."""
    slack = ROUNDING * max(1.0, abs(target)) if selection.method == "exact" else 0.0
    return selection.lower_bound >= target - slack


def _exact_mean(environment: EpisodeEnvironment, policy: Policy, survival: float) -> float | ExactAbsence:
    """The mean return without sampling, which is J with the probability to go on in the place of gamma."""
    absent = exact_absence(environment.facts, policy.spec)
    if absent is not None:
        return absent
    from pgengine.exact import exact_return  # loads torch, which whoever has no model to ask can do without

    try:
        J = exact_return(policy, environment, gamma=survival)
    except SpecError as error:  # an environment of one's own that has the facts of a model, and is none
        return ExactAbsence(code="exact_needs_a_model", message=error.message)
    if math.isfinite(J):
        return J
    return ExactAbsence(code="exact_not_finite", message="the exact mean return is beyond every float")


def _check_spread(returns: np.ndarray, policy: Policy, seed: int) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        summed = float(np.abs(returns).sum() ** 2)
    if not math.isfinite(summed):
        raise DivergedError(policy.updates, seed, "the variance of the returns")


def _play(
    environment: EpisodeEnvironment,
    policy: Policy,
    noise: Noise,
    episodes: int,
    survival: float,
    *,
    first: int = 0,
    deterministic: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns and lengths of so many episodes, the first of which has the number `first`."""
    returns, lengths = [], []
    for at in range(first, first + episodes, WAVE):
        count = min(WAVE, first + episodes - at)
        batch = rollout(policy, environment, noise, count, first=at, survival=survival, deterministic=deterministic)
        returns.append(batch.returns)
        lengths.append(batch.lengths)
    return np.concatenate(returns), np.concatenate(lengths)
