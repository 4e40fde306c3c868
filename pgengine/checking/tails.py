"""What the model says of an estimate's tails: numbers that a sample can miss, however often it is looked at.

A reward of 1e6 that comes once in 100,000 episodes decides the expectation, and no 2,000 batches tell of it. The model
does. With V the exact values and delta_t = r_t + gamma V(s_t+1) - V(s_t) the surprise of a step, the expectation of an
estimate is that of

    sum over t of grad log pi(a_t|s_t) * (delta_t + gamma delta_t+1 + gamma^2 delta_t+2 + ...)

since V(s_t) and what a baseline subtracts have no part in it. So the third moment over the second one to the power of
3/2 of |grad log pi| (|delta_t| + gamma |delta_t+1| + ...), over the steps of a trajectory, says how skew each number of
the estimate is through what happens rarely: rewards, transitions, first states, actions. Both come from one backward
pass. This is a figure for a decision and not a bound: the steps of a trajectory count as if they did not hang together,
and importance ratios are left out.

Source: Sun, Policy Gradient, the advantage form of the gradient; Lin, credit of rewards to actions.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from pgengine.checking.subject import Candidate, Subject
from pgengine.environments.tabular import TabularMDP
from pgengine.exact import log_policy, parameters_in_double
from pgengine.spec import (
    AlgorithmSpec,
    BatchMeanBaselineSpec,
    ConstantBaselineSpec,
    LeaveOneOutBaselineSpec,
    MovingAverageBaselineSpec,
    NoBaselineSpec,
)

__all__ = ["Tails", "tails_of"]

LONGEST = 10_000  # steps that are followed where nothing limits an episode
GONE = 1e-9  # probability that an episode still goes on, below which it is followed no further


@dataclass(frozen=True)
class Tails:
    """How far an estimate can lie from what a sample shows.

    Attributes:
        skewness: [P] of the contribution of one trajectory, through rare events; infinity where it is not a number.
        bounds: [P] which the estimate of a batch cannot exceed in size; infinity where none is known.
    """

    skewness: Float[np.ndarray, "P"]
    bounds: Float[np.ndarray, "P"]


class _Events(NamedTuple):
    """All that can follow each pair of state and action, as a list."""

    pair: np.ndarray  # s * A + a
    chance: np.ndarray
    reward: np.ndarray
    to: np.ndarray  # next state
    on: np.ndarray  # 1.0 where the episode goes on, otherwise 0.0


def tails_of(
    subject: Subject,
    candidate: Candidate,
    scores: Float[np.ndarray, "O A P"] | None,
    entropies: Float[np.ndarray, "O P"] | None,
) -> Tails | None:
    """The tails of an estimator on a finite MDP; None elsewhere.

    Args:
        subject: What is checked.
        candidate: The estimator.
        scores: Grad log pi of each observation and action, or None: all parameters are then judged by the surprises
            alone, and have no bounds.
        entropies: Gradient of the entropy at each observation, or None with `scores`.
    """
    mdp, algorithm = subject.environment, candidate.algorithm
    if not isinstance(mdp, TabularMDP):
        return None
    P = len(candidate.gradient)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        log_pi = log_policy(subject.policy, parameters_in_double(subject.policy)).detach().numpy()
        actor = subject.actor(algorithm)
        log_rho = log_policy(actor, parameters_in_double(actor)).detach().numpy()
        entropy = -(np.exp(log_pi) * np.where(np.exp(log_pi) > 0.0, log_pi, 0.0)).sum(axis=1)
        second, third = _weighed(mdp, algorithm, np.exp(log_pi), np.exp(log_rho), entropy)
        if scores is None:
            skewness = np.full(P, third.sum() / second.sum() ** 1.5 if second.sum() > 0.0 else 0.0)
        else:
            size = np.abs(scores)
            m2, m3 = _over_pairs(second, size * size), _over_pairs(third, size * size * size)
            skewness = np.where(m2 > 0.0, m3 / m2**1.5, 0.0)
        bounds = np.full(P, math.inf)
        weight = _largest_weight(mdp, algorithm, log_pi - log_rho, entropy)
        steps = 1.0 if algorithm.mean_over != "trajectories" else mdp.horizon
        if scores is not None and entropies is not None and steps is not None and weight is not None:
            of_score, of_entropy = weight
            bounds = steps * (of_score * np.abs(scores).max(axis=(0, 1)) + of_entropy * np.abs(entropies).max(axis=0))
    return Tails(
        np.where(np.isfinite(skewness), skewness, math.inf),
        np.where(np.isfinite(bounds), bounds, math.inf),
    )


def _over_pairs(moments: Float[np.ndarray, "O A"], sizes: Float[np.ndarray, "O A P"]) -> Float[np.ndarray, "P"]:
    summed: np.ndarray = moments.reshape(-1) @ sizes.reshape(moments.size, -1)
    return summed


def _largest_weight(
    mdp: TabularMDP, algorithm: AlgorithmSpec, log_ratio: np.ndarray, entropy: np.ndarray
) -> tuple[float, float] | None:
    """What the weights of a step's score and entropy cannot exceed before the mean; None where that is not known.

    A baseline that is a mean of returns is no larger than the largest of them. What a value baseline says is not
    bounded by the model, nor is a ratio over a sum of ratios or over a deviation; while parameters move, scores do too.
    """
    means = NoBaselineSpec | ConstantBaselineSpec | LeaveOneOutBaselineSpec | BatchMeanBaselineSpec
    if not isinstance(algorithm.baseline, means | MovingAverageBaselineSpec):
        return None
    unbounded = algorithm.standardise != "none" or algorithm.importance.self_normalise
    if unbounded or algorithm.within_episode == "moving" or mdp.horizon is None or mdp.reward_deviation is not None:
        return None
    gamma, H, coefficient = algorithm.credit_gamma, mdp.horizon, algorithm.entropy_coefficient
    events, unit = _events(mdp, algorithm, entropy[mdp.observations])
    A = mdp.transitions.shape[1]
    returns = np.zeros(len(mdp.terminal))
    for _ in range(H):
        follows = np.abs(events.reward) + gamma * events.on * returns[events.to]
        returns = np.zeros(len(mdp.terminal))
        np.maximum.at(returns, events.pair // A, follows)
    ratio = 1.0
    if algorithm.importance.kind != "none":
        ratio = float(np.exp(H * max(float(log_ratio.max()), 0.0)))
    largest = ratio * unit * float(returns.max())
    baseline = algorithm.baseline
    subtracted = 0.0 if isinstance(baseline, NoBaselineSpec) else largest
    if isinstance(baseline, ConstantBaselineSpec):
        subtracted = abs(baseline.value)
    return largest + ratio * subtracted, ratio * abs(coefficient)


def _weighed(
    mdp: TabularMDP, algorithm: AlgorithmSpec, pi: np.ndarray, rho: np.ndarray, entropy: np.ndarray
) -> tuple[Float[np.ndarray, "O A"], Float[np.ndarray, "O A"]]:
    """Second and third moments of the surprises from each observation and action on, times how often they are met."""
    S, A = mdp.transitions.shape[:2]
    seen, gamma = mdp.observations, algorithm.credit_gamma
    events, _ = _events(mdp, algorithm, entropy[seen])
    pi, rho = pi[seen], rho[seen]
    chain = events.chance * rho.reshape(-1)[events.pair] * events.on
    visits: list[np.ndarray] = [mdp.initial.astype(np.float64)]
    while len(visits) < (mdp.horizon or LONGEST) and visits[-1].sum() > GONE:
        visits.append(np.bincount(events.to, chain * visits[-1][events.pair // A], S))
    weigh = algorithm.credit == "total_return" or algorithm.discount_weight == "gamma_power"
    V, later = np.zeros(S), np.zeros((3, S))
    if mdp.horizon is None:  # values do not know the time: those at the end are those of the beginning
        for _ in range(len(visits)):
            V = _values(events, V, pi, gamma)
    sums = np.zeros((2, S, A))
    for t in range(len(visits) - 1, -1, -1):
        before = _values(events, V, pi, gamma)
        surprise = np.abs(events.reward + gamma * events.on * V[events.to] - before[events.pair // A])
        m1, m2, m3 = gamma * later[0], gamma**2 * later[1], gamma**3 * later[2]
        m1, m2, m3 = (events.on * each[events.to] for each in (m1, m2, m3))
        each = (
            surprise + m1,
            surprise**2 + 2 * surprise * m1 + m2,
            surprise**3 + 3 * surprise**2 * m1 + 3 * surprise * m2 + m3,
        )
        of_pair = np.stack([np.bincount(events.pair, events.chance * m, S * A) for m in each]).reshape(3, S, A)
        power = gamma**t if weigh else 1.0
        sums += (visits[t][:, None] * rho) * of_pair[1:] * np.array([power**2, power**3])[:, None, None]
        V, later = before, (of_pair * rho).sum(axis=2)
    O = int(seen.max()) + 1  # noqa: E741
    second, third = np.zeros((2, O, A))
    np.add.at(second, seen, sums[0])
    np.add.at(third, seen, sums[1])
    return second, third


def _values(events: _Events, V: np.ndarray, pi: np.ndarray, gamma: float) -> np.ndarray:
    follows = events.chance * (events.reward + gamma * events.on * V[events.to])
    values: np.ndarray = (np.bincount(events.pair, follows, pi.size).reshape(pi.shape) * pi).sum(axis=1)
    return values


def _events(mdp: TabularMDP, algorithm: AlgorithmSpec, entropy: Float[np.ndarray, "S"]) -> tuple[_Events, float]:
    """Rewards in units of the largest one, so that third moments fit in a float; and that unit."""
    A = mdp.transitions.shape[1]
    s, a, to = np.nonzero((mdp.transitions > 0.0) & ~mdp.terminal[:, None, None])
    parts = [(s * A + a, mdp.transitions[s, a, to], mdp.rewards[s, a, to], to)]
    if mdp.reward_values is not None and mdp.reward_probabilities is not None:
        pair, chance, _, to = parts.pop()
        for value, odds in zip(
            np.moveaxis(mdp.reward_values, 2, 0), np.moveaxis(mdp.reward_probabilities, 2, 0), strict=True
        ):
            parts.append((pair, chance * odds.reshape(-1)[pair], value.reshape(-1)[pair], to))
    if mdp.reward_deviation is not None:
        # three points that have the moments of a Gaussian up to the fifth
        deviation = math.sqrt(3.0) * mdp.reward_deviation.reshape(-1)
        parts = [
            (pair, odds * chance, reward + sign * deviation[pair], to)
            for pair, chance, reward, to in parts
            for sign, odds in ((-1.0, 1 / 6), (0.0, 2 / 3), (1.0, 1 / 6))
        ]
    pair, chance, reward, to = (np.concatenate(each) for each in zip(*parts, strict=True))
    lives = ~mdp.terminal[to]
    coefficient = algorithm.entropy_coefficient
    survival = algorithm.survival
    ends = np.where(lives, 1.0 - survival, 1.0)  # the discount ends what the environment would not
    on = _Events(
        pair, chance * (1.0 - ends), reward + algorithm.credit_gamma * coefficient * entropy[to], to, np.ones(len(to))
    )
    over = _Events(pair, chance * ends, reward, to, np.zeros(len(to)))
    both = [np.concatenate(each) for each in zip(on, over, strict=True)]
    happens = both[1] > 0.0
    pair, chance, reward, to, goes_on = (each[happens] for each in both)
    unit = float(np.abs(reward).max(initial=0.0)) or 1.0
    return _Events(pair, chance, reward / unit, to, goes_on), unit
