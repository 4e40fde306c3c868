"""All trajectories of a small finite MDP, and what an estimator of the gradient gives on average over all batches.

Nothing here samples. The gradient of J = sum over tau of p(tau) R(tau) can be read off directly; an estimator's
expectation is the sum over all batches of K trajectories of their probability times the estimate. The work grows as
the number of trajectories to the power K, so this is for MDPs of a few states and steps.

Source: Lin, p(tau) and r(tau); Log-derivative page, J = sum over tau of P(tau) R(tau); Bereyhi, chapter 5, p_pi(tau);
Sun, expectation over trajectories.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int

from pgengine.environments.tabular import TabularMDP
from pgengine.errors import ShapeMismatch, SpecError
from pgengine.exact.tables import (
    entropies_of,
    entropy_of_rows,
    flat_gradient,
    log_policy,
    parameters_in_double,
    policy_table,
)
from pgengine.policies import Policy

__all__ = [
    "EnumeratedRows",
    "Moments",
    "Trajectories",
    "Weights",
    "count_trajectories",
    "enumerate_trajectories",
    "estimate_moments",
    "expected_estimate",
    "trajectory_log_probabilities",
    "trajectory_probabilities",
]

MAX_TRAJECTORIES = 1_000_000
MAX_BATCHES = 50_000_000
CELLS = 1 << 20  # numbers of a batch's rows that are held at a time


@dataclass(frozen=True)
class Trajectories:
    """All trajectories that a finite MDP can produce; T is the length of the longest.

    Attributes:
        states: [n, T] state before each action; zero after the end.
        observations: [n, T] what the policy saw of it; zero after the end.
        actions: [n, T]; zero after the end.
        rewards: [n, T]; zero after the end.
        lengths: [n] number of actions.
        log_dynamics: [n] logarithm of the probability of everything but the actions: of mu(s_0), and of p(s', r|s, a)
            at each step.
        truncated: [n] whether the horizon cut it.
    """

    states: Int[np.ndarray, "n T"]
    observations: Int[np.ndarray, "n T"]
    actions: Int[np.ndarray, "n T"]
    rewards: Float[np.ndarray, "n T"]
    lengths: Int[np.ndarray, "n"]
    log_dynamics: Float[np.ndarray, "n"]
    truncated: Bool[np.ndarray, "n"]

    @property
    def dynamics(self) -> Float[np.ndarray, "n"]:
        """Probability of everything but the actions; zero where it is too small for a float."""
        probabilities: np.ndarray = np.exp(self.log_dynamics)
        return probabilities

    @property
    def taken(self) -> Bool[np.ndarray, "n T"]:
        """Where an action was taken."""
        mask: np.ndarray = np.arange(self.states.shape[1]) < self.lengths[:, None]
        return mask


# --- enumeration ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Branches:
    """Everything that can follow a state: action, next state, reward, and the probability of the last two."""

    first: np.ndarray  # [S] where the branches of a state begin
    count: np.ndarray  # [S]
    actions: np.ndarray
    after: np.ndarray
    rewards: np.ndarray
    probabilities: np.ndarray


def _branches(mdp: TabularMDP) -> _Branches:
    if mdp.reward_deviation is not None and np.any(mdp.reward_deviation[~mdp.terminal] > 0.0):
        raise SpecError(
            "/environment/reward_deviation",
            "rewards_not_countable",
            "rewards with Gaussian noise cannot be enumerated; leave the noise out, or check in mode sample",
        )
    if mdp.reward_probabilities is None or mdp.reward_values is None:
        rewards, chances = mdp.rewards[..., None], np.ones((*mdp.rewards.shape[:2], 1))
    else:
        S, A, R = mdp.reward_probabilities.shape
        rewards = np.broadcast_to(mdp.reward_values[:, :, None, :], (S, A, S, R))
        chances = mdp.reward_probabilities
    probabilities = mdp.transitions[..., None] * chances[:, :, None, :]
    probabilities[mdp.terminal] = 0.0
    s, a, after, r = np.nonzero(probabilities)
    count = np.bincount(s, minlength=len(mdp.initial))
    return _Branches(np.cumsum(count) - count, count, a, after, rewards[s, a, after, r], probabilities[s, a, after, r])


def count_trajectories(mdp: TabularMDP, *, survival: float = 1.0) -> float:
    """How many trajectories the MDP can produce, without making them; infinite if they may be of any length.

    Args:
        mdp: Where.
        survival: Probability with which an episode goes on after each step, beside what the MDP says.
    """
    branches = _branches(mdp)
    S = len(mdp.initial)
    step = np.zeros((S, S))
    np.add.at(step, (np.repeat(np.arange(S), branches.count), branches.after), 1.0)
    alive = (mdp.initial > 0.0).astype(np.float64)
    total = 0.0
    for time in range(1, (S if mdp.horizon is None else mdp.horizon) + 1):
        reached = alive @ step
        total += float(reached[mdp.terminal].sum())
        alive = np.where(mdp.terminal, 0.0, reached)
        if not alive.any():
            return total
        if time == mdp.horizon:
            return total + float(alive.sum())
        if survival < 1.0:
            total += float(alive.sum())
        if not math.isfinite(total):
            break
    return math.inf


def enumerate_trajectories(mdp: TabularMDP, *, survival: float = 1.0, limit: int = MAX_TRAJECTORIES) -> Trajectories:
    """Every trajectory of positive probability under some policy, with random rewards told apart by their value.

    Args:
        mdp: Where.
        survival: Probability with which an episode goes on after each step, beside what the MDP says; 1 - survival is
            the chance that `discount: termination` ends it.
        limit: Most trajectories to make.

    Raises:
        SpecError: if there are more, or the rewards have Gaussian noise.
    """
    expected = count_trajectories(mdp, survival=survival)
    if expected > limit:
        raise SpecError(
            "/environment/horizon",
            "too_many_trajectories",
            f"expected at most {limit} trajectories, there are {expected:.3g}; take a shorter horizon or check in mode "
            "sample",
        )
    branches = _branches(mdp)
    states = np.flatnonzero(mdp.initial)
    log_p = np.log(mdp.initial[states])
    history: list[np.ndarray] = [np.zeros((len(states), 0, 2), dtype=np.int64), np.zeros((len(states), 0))]
    ended: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    for time in range(1, (len(mdp.initial) if mdp.horizon is None else mdp.horizon) + 1):
        parent = np.repeat(np.arange(len(states)), branches.count[states])
        within = np.arange(len(parent)) - np.repeat(np.cumsum(branches.count[states]), branches.count[states])
        which = branches.first[states[parent]] + within + branches.count[states[parent]]
        pairs = np.stack([states[parent], branches.actions[which]], axis=-1)
        history = [
            np.concatenate([history[0][parent], pairs[:, None]], axis=1),
            np.concatenate([history[1][parent], branches.rewards[which][:, None]], axis=1),
        ]
        states, log_p = branches.after[which], log_p[parent] + np.log(branches.probabilities[which])
        over, cut = mdp.terminal[states], np.zeros(len(states), dtype=bool)
        if time == mdp.horizon:
            over, cut = np.ones(len(states), dtype=bool), ~over
        elif survival < 1.0:
            stopped = ~over
            ended.append(
                (history[0][stopped], history[1][stopped], log_p[stopped] + math.log1p(-survival), cut[stopped])
            )
        ended.append((history[0][over], history[1][over], log_p[over], cut[over]))
        live = ~over
        history, states, log_p = [part[live] for part in history], states[live], log_p[live]
        if survival < 1.0 and len(states):
            log_p = log_p + (math.log(survival) if survival > 0.0 else -math.inf)
        if not len(states):
            break
    return _laid_out(mdp, ended)


def _laid_out(mdp: TabularMDP, ended: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]) -> Trajectories:
    lengths = np.concatenate([np.full(len(log_p), pairs.shape[1]) for pairs, _, log_p, _ in ended])
    log_p = np.concatenate([log_p for _, _, log_p, _ in ended])
    truncated = np.concatenate([cut for *_, cut in ended])
    n, T = len(lengths), int(lengths.max())
    steps, rewards = np.zeros((n, T, 2), dtype=np.int64), np.zeros((n, T))
    start = 0
    for pairs, values, *_ in ended:
        stop = start + len(pairs)
        steps[start:stop, : pairs.shape[1]], rewards[start:stop, : pairs.shape[1]] = pairs, values
        start = stop
    taken = np.arange(T) < lengths[:, None]
    observations = np.where(taken, mdp.observations[steps[..., 0]], 0)
    possible = log_p > -math.inf  # survival 0 lets nothing go on
    return Trajectories(
        *(part[possible] for part in (steps[..., 0], observations, steps[..., 1], rewards, lengths, log_p, truncated))
    )


# --- probabilities ----------------------------------------------------------------------------------------------------


def trajectory_log_probabilities(
    trajectories: Trajectories, log_pi: Float64[torch.Tensor, "O A"]
) -> Float64[torch.Tensor, "n"]:
    """Log p(tau) = log dynamics + sum of log pi(a_t|s_t), differentiable; finite where p itself is too small.

    Source: Lin, p(tau), "each long trajectory has extremely low probability"; Bereyhi, p_pi(tau).
    """
    scores = log_pi[trajectories.observations, trajectories.actions]
    taken = torch.as_tensor(trajectories.taken)
    return torch.as_tensor(trajectories.log_dynamics) + torch.where(taken, scores, 0.0).sum(dim=1)


def trajectory_probabilities(
    trajectories: Trajectories, log_pi: Float64[torch.Tensor, "O A"]
) -> Float64[torch.Tensor, "n"]:
    """p(tau) = dynamics * product of pi(a_t|s_t), differentiable. Source: Lin, p(tau); Bereyhi, p_pi(tau)."""
    return trajectory_log_probabilities(trajectories, log_pi).exp()


# --- what an estimator expects ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EnumeratedRows:
    """m batches of K trajectories whose lengths agree, laid out as flat rows.

    Attributes:
        rewards: [m, B] r_t.
        offsets: [K + 1] row at which each trajectory begins, and B at the end.
        states: [m, B] state before each action.
        actions: [m, B].
        log_pi: [m, B] log-probability of the action under the policy whose gradient is estimated.
        log_rho: [m, B] under the policy that acted.
        entropies: [m, B] entropy of the policy at each state, in nats.
        members: [m, K] which of the trajectories they are.
    """

    rewards: Float[np.ndarray, "m B"]
    offsets: Int[np.ndarray, "K1"]
    states: Int[np.ndarray, "m B"]
    actions: Int[np.ndarray, "m B"]
    log_pi: Float[np.ndarray, "m B"]
    log_rho: Float[np.ndarray, "m B"]
    entropies: Float[np.ndarray, "m B"]
    members: Int[np.ndarray, "m K"]


Weights = Callable[[EnumeratedRows], np.ndarray | tuple[np.ndarray, np.ndarray | None]]
"""An estimator: rows to the weight [m, B] of each step's score, or to it and the weight [m, B] of the gradient of each
step's entropy."""


@dataclass(frozen=True)
class Moments:
    """First two moments of an estimate of the gradient from one batch.

    Attributes:
        mean: [P] expected estimate.
        variance: [P] variance of each of its numbers.
    """

    mean: Float64[np.ndarray, "P"]
    variance: Float64[np.ndarray, "P"]

    @property
    def variance_trace(self) -> float:
        """Trace of the covariance matrix: expected squared distance of an estimate from its mean."""
        return float(self.variance.sum())


@dataclass(frozen=True)
class _Weighed:
    probabilities: np.ndarray  # [m]
    pairs: np.ndarray  # [m, B] index of (observation, action)
    observations: np.ndarray  # [m, B]
    scores: np.ndarray  # [m, B] weight of each score
    entropies: np.ndarray | None  # [m, B] weight of the gradient of each entropy


def expected_estimate(
    policy: Policy,
    trajectories: Trajectories,
    weights: Weights,
    *,
    K: int,
    behaviour: Policy | np.ndarray | torch.Tensor | None = None,
    limit: int = MAX_BATCHES,
) -> Float64[torch.Tensor, "P"]:
    """What an estimator of the gradient gives on average over all batches of K independent trajectories.

    Args:
        policy: At which parameters.
        trajectories: All of them.
        weights: The estimator.
        K: Trajectories in a batch; the work grows as the number of trajectories to this power.
        behaviour: Who acts: a policy, or a table [O, A] of log-probabilities; None is the policy itself.
        limit: Most batches to go through.

    Raises:
        SpecError: if there are more batches, or the policy has no table.
    """
    parameters = parameters_in_double(policy)
    log_pi = log_policy(policy, parameters)
    O, A = log_pi.shape  # noqa: E741
    scores, entropies = np.zeros(O * A), np.zeros(O)
    for batch in _weighed(log_pi.detach().numpy(), trajectories, weights, K, behaviour, limit, CELLS):
        p = batch.probabilities[:, None]
        scores += np.bincount(batch.pairs.ravel(), (p * batch.scores).ravel(), O * A)
        if batch.entropies is not None:
            entropies += np.bincount(batch.observations.ravel(), (p * batch.entropies).ravel(), O)
    # what does not occur has no weight, and its score may be infinite
    value = torch.where(torch.as_tensor(scores != 0.0), torch.as_tensor(scores) * log_pi.reshape(-1), 0.0).sum()
    if entropies.any():
        value = value + (torch.as_tensor(entropies) * entropies_of(log_pi)).sum()
    return flat_gradient(value, parameters)


def estimate_moments(
    policy: Policy,
    trajectories: Trajectories,
    weights: Weights,
    *,
    K: int,
    behaviour: Policy | np.ndarray | torch.Tensor | None = None,
    limit: int = MAX_BATCHES,
) -> Moments:
    """Mean and variance of an estimate of the gradient from one batch of K trajectories, over all batches.

    Args:
        policy: At which parameters.
        trajectories: All of them.
        weights: The estimator.
        K: Trajectories in a batch.
        behaviour: Who acts: a policy, or a table [O, A] of log-probabilities; None is the policy itself.
        limit: Most batches to go through.

    Raises:
        SpecError: if there are more batches, or the policy has no table.
    """
    parameters = parameters_in_double(policy)
    log_pi = log_policy(policy, parameters)
    O, A = log_pi.shape  # noqa: E741
    gradients = torch.cat([log_pi.reshape(-1), entropies_of(log_pi)])
    jacobian = np.stack([_gradient_of(value, parameters) for value in gradients])
    table = log_pi.detach().numpy()
    mean, second = np.zeros((2, jacobian.shape[1]))
    # two passes, since a difference of large squares would lose the variance
    for batch in _weighed(table, trajectories, weights, K, behaviour, limit, CELLS):
        mean += batch.probabilities @ _estimates(batch, O, A, jacobian)
    for batch in _weighed(table, trajectories, weights, K, behaviour, limit, CELLS):
        second += batch.probabilities @ (_estimates(batch, O, A, jacobian) - mean) ** 2
    return Moments(mean, second)


def _estimates(batch: _Weighed, O: int, A: int, jacobian: np.ndarray) -> np.ndarray:  # noqa: E741
    """The estimate [m, P] of each batch."""
    m, width = len(batch.pairs), O * A + O
    first = width * np.arange(m)[:, None]
    coefficients = np.bincount((first + batch.pairs).ravel(), batch.scores.ravel(), m * width)
    if batch.entropies is not None:
        where = (first + O * A + batch.observations).ravel()
        coefficients = coefficients + np.bincount(where, batch.entropies.ravel(), m * width)
    estimates: np.ndarray = coefficients.reshape(m, width) @ jacobian
    return estimates


def _gradient_of(value: torch.Tensor, parameters: dict[str, torch.Tensor]) -> np.ndarray:
    gradients = torch.autograd.grad(value, list(parameters.values()), retain_graph=True, materialize_grads=True)
    flat: np.ndarray = torch.cat([gradient.reshape(-1) for gradient in gradients]).numpy()
    return flat


def _weighed(
    log_pi: np.ndarray,
    trajectories: Trajectories,
    weights: Weights,
    K: int,
    behaviour: Policy | np.ndarray | torch.Tensor | None,
    limit: int,
    cells: int,
) -> Iterator[_Weighed]:
    """All batches, some at a time, with their probabilities under the behaviour and the estimator's weights."""
    n = len(trajectories.lengths)
    if n**K > limit:
        raise SpecError(
            "/algorithm/trajectories",
            "too_many_batches",
            f"expected at most {limit} batches, there are {n} trajectories and so {n}^{K} batches of {K}; take fewer "
            "trajectories in a batch, a shorter horizon, or check in mode sample",
        )
    log_rho = log_pi if behaviour is None else policy_table(behaviour)
    if log_rho.shape != log_pi.shape:
        raise ShapeMismatch(f"the behaviour has a table {log_rho.shape}, the policy {log_pi.shape}")
    p = trajectory_probabilities(trajectories, torch.as_tensor(log_rho)).numpy()
    entropies = entropy_of_rows(log_pi)
    groups = {int(length): np.flatnonzero(trajectories.lengths == length) for length in np.unique(trajectories.lengths)}
    for lengths in product(groups, repeat=K):
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        sizes = [len(groups[length]) for length in lengths]
        chunk = max(1, cells // int(offsets[-1] + log_pi.size))
        for start in range(0, math.prod(sizes), chunk):
            indices = np.unravel_index(np.arange(start, min(start + chunk, math.prod(sizes))), sizes)
            members = np.stack([groups[length][index] for length, index in zip(lengths, indices, strict=True)], axis=1)
            states, observations, actions, rewards = (
                np.concatenate([values[who, :length] for who, length in zip(members.T, lengths, strict=True)], axis=1)
                for values in (
                    trajectories.states,
                    trajectories.observations,
                    trajectories.actions,
                    trajectories.rewards,
                )
            )
            given = weights(
                EnumeratedRows(
                    rewards=rewards,
                    offsets=offsets,
                    states=states,
                    actions=actions,
                    log_pi=log_pi[observations, actions],
                    log_rho=log_rho[observations, actions],
                    entropies=entropies[observations],
                    members=members,
                )
            )
            scores, of_entropies = given if isinstance(given, tuple) else (given, None)
            if scores.shape != rewards.shape or (of_entropies is not None and of_entropies.shape != rewards.shape):
                raise ShapeMismatch(f"expected weights {rewards.shape}, the estimator gave {scores.shape}")
            yield _Weighed(
                p[members].prod(axis=1), observations * log_pi.shape[1] + actions, observations, scores, of_entropies
            )
