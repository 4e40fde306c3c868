"""Mode `enumerate`: all batches of a small finite MDP, weighed by the very code that training uses.

Source: Lin, p(tau); Sun, expectation over trajectories; Bereyhi, chapter 5, estimate via Monte Carlo.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from pgengine.checking.sampling import WARM_UP, Scores, estimates, play, warmed_up
from pgengine.checking.subject import Candidate, Subject
from pgengine.environments.tabular import TabularMDP
from pgengine.estimation import Estimator
from pgengine.estimators import BatchRows, step_weights
from pgengine.exact import (
    EnumeratedRows,
    Moments,
    Trajectories,
    enumerate_trajectories,
    estimate_moments,
    log_policy,
    parameters_in_double,
    trajectory_probabilities,
)
from pgengine.policies import Policy
from pgengine.rollout import Batch
from pgengine.spec import AlgorithmSpec

__all__ = ["TOLERANCE", "enumerated"]

TOLERANCE = 1e-9
"""Of the larger of the target's norm and the deviation of an estimate: what rounding may leave of a bias."""


def enumerated(subject: Subject, candidate: Candidate, seed: int) -> Moments:
    """Mean and variance of the estimate of one batch, over all batches."""
    mdp, algorithm = subject.environment, candidate.algorithm
    assert isinstance(mdp, TabularMDP), "refused before"
    trajectories = enumerate_trajectories(mdp, survival=algorithm.survival)
    actor = subject.actor(algorithm)
    warm_up = play(mdp, actor, seed, 0, WARM_UP * algorithm.trajectories, algorithm.survival)
    estimator = warmed_up(algorithm, subject, seed, warm_up=warm_up)
    if algorithm.within_episode == "moving":
        return _moving(subject, estimator, trajectories)
    predicted = _predictions(estimator, subject.policy, trajectories) if estimator.arrays() else None
    return estimate_moments(
        subject.policy,
        trajectories,
        _weights(algorithm, trajectories, predicted),
        K=algorithm.trajectories,
        behaviour=None if actor is subject.policy else actor,
    )


def _weights(
    algorithm: AlgorithmSpec, trajectories: Trajectories, predicted: np.ndarray | None
) -> Callable[[EnumeratedRows], tuple[np.ndarray, np.ndarray | None]]:
    """The estimator as a function of enumerated rows; `predicted` is [O, T]."""

    def weigh(rows: EnumeratedRows) -> tuple[np.ndarray, np.ndarray | None]:
        time = np.arange(rows.offsets[-1]) - np.repeat(rows.offsets[:-1], np.diff(rows.offsets))
        observations = np.concatenate(
            [
                trajectories.observations[who, :length]
                for who, length in zip(rows.members.T, np.diff(rows.offsets), strict=True)
            ],
            axis=1,
        )
        weights = step_weights(
            BatchRows(
                rewards=rows.rewards,
                offsets=rows.offsets,
                predicted=None if predicted is None else predicted[observations, time],
                entropies=None if algorithm.entropy is None else rows.entropies,
                log_ratios=None if algorithm.importance.kind == "none" else rows.log_pi - rows.log_rho,
            ),
            algorithm,
        )
        return weights.score, weights.entropy

    return weigh


def _predictions(estimator: Estimator, policy: Policy, trajectories: Trajectories) -> Float[np.ndarray, "O T"]:
    """What a baseline with a memory says of each observation at each time.

    It is asked through batches that stay at one observation for as long as the longest trajectory; rewards are zero,
    since it does not look at them.
    """
    # at least three, so that no setting has too few trajectories to be weighed
    seen_at_most = int(trajectories.observations.max())
    O, T = max(3, seen_at_most + 1), trajectories.states.shape[1]  # noqa: E741
    seen = np.repeat(np.minimum(np.arange(O), seen_at_most), T)
    made = Batch(
        observations=seen,
        samples=np.zeros(O * T, dtype=np.int64),
        actions=np.zeros(O * T, dtype=np.int64),
        log_probs=np.zeros(O * T, dtype=np.float32),
        rewards=np.zeros(O * T),
        offsets=np.arange(O + 1) * T,
        terminated=np.ones(O, dtype=bool),
        truncated=np.zeros(O, dtype=bool),
        final_observations=seen[T - 1 :: T],
    )
    predicted = estimator.weigh(policy, made).rows.predicted
    assert predicted is not None, "asked only of baselines with a memory"
    return predicted.reshape(O, T)


def _moving(subject: Subject, estimator: Estimator, trajectories: Trajectories) -> Moments:
    """Each trajectory's step over the learning rate, weighted by its probability."""
    actor = subject.actor(estimator.algorithm)
    log_rho = log_policy(actor, parameters_in_double(actor)).detach()
    p = trajectory_probabilities(trajectories, log_rho).numpy()
    steps = estimates(estimator, subject.policy, _batch(trajectories, log_rho.numpy()), Scores(subject))
    mean = p @ steps
    return Moments(mean, p @ (steps - mean) ** 2)


def _batch(trajectories: Trajectories, log_rho: np.ndarray) -> Batch:
    """All trajectories as if they had been played once each."""
    taken, n = trajectories.taken, len(trajectories.lengths)
    observations, actions = trajectories.observations[taken], trajectories.actions[taken]
    offsets = np.zeros(n + 1, dtype=np.int64)
    np.cumsum(trajectories.lengths, out=offsets[1:])
    return Batch(
        observations=observations,
        samples=actions,
        actions=actions,
        log_probs=log_rho[observations, actions],
        rewards=trajectories.rewards[taken],
        offsets=offsets,
        terminated=~trajectories.truncated,
        truncated=trajectories.truncated,
        final_observations=observations[offsets[1:] - 1],  # a bootstrap, which would look at it, is refused
    )
