"""Enumeration: all trajectories once each, and what estimators give on average, against plain loops."""

import math
from itertools import product

import numpy as np
import pytest
import torch

import pgengine
from pgengine.exact import (
    EnumeratedRows,
    Trajectories,
    Weights,
    count_trajectories,
    enumerate_trajectories,
    estimate_moments,
    exact_gradient,
    exact_return,
    expected_estimate,
    log_policy,
    parameters_in_double,
    trajectory_probabilities,
)
from pgengine.exact.tables import policy_table
from pgengine.spec import TabularSpec
from tests.engine.exact_worlds import MLP, opened, policy_on, world


def probabilities(trajectories: Trajectories, policy: pgengine.Policy) -> np.ndarray:
    return trajectory_probabilities(trajectories, torch.as_tensor(policy_table(policy))).numpy()


# --- all trajectories ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("survival", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("settings", [
    dict(horizon=3),
    dict(horizon=3, aliased=True, drawn_rewards=True, S=3, A=2),
    dict(horizon=4, S=2, A=2, terminal=False),
], ids=["plain", "drawn", "no_terminal"])  # fmt: skip
def test_every_trajectory_is_there_once_and_their_probabilities_are_those_of_play(
    settings: dict[str, object], survival: float
) -> None:
    spec = world(0, **settings)  # type: ignore[arg-type]
    mdp, policy = opened(spec), policy_on(spec)
    trajectories = enumerate_trajectories(mdp, survival=survival)
    distinct = {
        (tuple(s[:n]), tuple(a[:n]), tuple(r[:n]), cut)
        for s, a, r, n, cut in zip(
            trajectories.states,
            trajectories.actions,
            trajectories.rewards.round(12),
            trajectories.lengths,
            trajectories.truncated,
            strict=True,
        )
    }
    p = probabilities(trajectories, policy)
    assert p.sum() == pytest.approx(1.0, abs=1e-12)
    assert (p > 0.0).all()
    if spec.reward_values is None:  # each transition has a reward of its own, which tells the last states apart
        assert len(distinct) == len(p)
    J = p @ trajectories.rewards.sum(axis=1)
    assert exact_return(policy, mdp, gamma=survival) == pytest.approx(J, abs=1e-12)


def test_counting_agrees_with_enumerating() -> None:
    for seed, survival in product(range(3), (1.0, 0.9)):
        for settings in (dict(), dict(drawn_rewards=True, S=3, A=2), dict(terminal=False, S=2)):
            mdp = opened(world(seed, **{"horizon": 3, **settings}))  # type: ignore[arg-type]
            assert len(enumerate_trajectories(mdp, survival=survival).lengths) == count_trajectories(
                mdp, survival=survival
            )


CHAIN = TabularSpec(  # three steps that end by themselves
    transitions=[[[float(s + 1 == after) for after in range(4)]] * 2 for s in range(3)] + [[[0.0, 0.0, 0.0, 1.0]] * 2],
    rewards=[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [0.0, 0.0]],
    initial=[1.0, 0.0, 0.0, 0.0],
    terminal=[3],
)


def test_a_task_that_ends_by_itself_needs_no_horizon() -> None:
    trajectories = enumerate_trajectories(opened(CHAIN))
    assert sorted(trajectories.rewards.tolist()) == [list(row) for row in product((1.0, 2.0), (3.0, 4.0), (5.0, 6.0))]
    assert not trajectories.truncated.any()


@pytest.mark.parametrize(("spec", "survival", "code", "pointer"), [
    (world(0, horizon=None), 1.0, "too_many_trajectories", "/environment/horizon"),
    (world(0, horizon=200), 0.9, "too_many_trajectories", "/environment/horizon"),
    (world(0, noisy_rewards=True), 1.0, "rewards_not_countable", "/environment/reward_deviation"),
], ids=["no_horizon", "long", "noise"])  # fmt: skip
def test_what_cannot_be_enumerated_is_refused_before_it_is_tried(
    spec: TabularSpec, survival: float, code: str, pointer: str
) -> None:
    with pytest.raises(pgengine.SpecError) as refused:
        enumerate_trajectories(opened(spec), survival=survival)
    assert (refused.value.code, refused.value.pointer) == (code, pointer)
    assert "mode sample" in refused.value.message


def test_without_a_horizon_a_cycle_has_trajectories_without_number() -> None:
    assert count_trajectories(opened(world(0, horizon=None))) == math.inf
    assert count_trajectories(opened(CHAIN)) == 8


# --- what an estimator expects ---------------------------------------------------------------------------------------


def odd(rows: EnumeratedRows) -> tuple[np.ndarray, np.ndarray]:
    """An estimator that uses everything it is given, in no sensible way."""
    K = len(rows.offsets) - 1
    ratio = np.exp(rows.log_pi - rows.log_rho)
    total = rows.rewards.sum(axis=1, keepdims=True)
    return ratio * (total - rows.entropies) / K, rows.states * 0.1 + ratio**2 + rows.actions


def by_loops(
    policy: pgengine.Policy, trajectories: Trajectories, weights: Weights, K: int, log_rho: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the estimate: every batch alone, step by step."""
    parameters = parameters_in_double(policy)
    table = log_policy(policy, parameters)
    log_pi = table.detach().numpy()

    def derived(value: torch.Tensor) -> np.ndarray:
        parts = torch.autograd.grad(value, list(parameters.values()), retain_graph=True)
        flat: np.ndarray = torch.cat([part.reshape(-1) for part in parts]).numpy()
        return flat

    score = [[derived(value) for value in row] for row in table]
    entropy_gradient = [derived(-(row.exp() * row).sum()) for row in table]
    p = trajectory_probabilities(trajectories, torch.as_tensor(log_rho)).numpy()
    chances, estimates = [], []
    for members in product(range(len(p)), repeat=K):
        steps = [(i, t) for i in members for t in range(trajectories.lengths[i])]
        states, actions, rewards, observations = (
            np.array([[values[i, t] for i, t in steps]])
            for values in (trajectories.states, trajectories.actions, trajectories.rewards, trajectories.observations)
        )
        pi = np.exp(log_pi)
        rows = EnumeratedRows(
            rewards=rewards,
            offsets=np.cumsum([0, *(trajectories.lengths[i] for i in members)]),
            states=states,
            actions=actions,
            log_pi=log_pi[observations, actions],
            log_rho=log_rho[observations, actions],
            entropies=-(pi * log_pi).sum(axis=1)[observations],
            members=np.array([members]),
        )
        given = weights(rows)
        of_scores, of_entropies = given if isinstance(given, tuple) else (given, None)
        estimate = np.zeros(policy.size)
        for row in range(len(steps)):
            o, a = observations[0, row], actions[0, row]
            estimate += of_scores[0, row] * score[o][a]
            if of_entropies is not None:
                estimate += of_entropies[0, row] * entropy_gradient[o]
        chances.append(p[list(members)].prod())
        estimates.append(estimate)
    chance, g = np.array(chances), np.array(estimates)
    mean = chance @ g
    return mean, (g - mean).T @ (chance[:, None] * (g - mean))


@pytest.mark.parametrize("K", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("behaved", [False, True], ids=["own", "behaviour"])
def test_expectation_and_variance_are_those_of_a_plain_loop_over_all_batches(K: int, behaved: bool) -> None:
    spec = world(1, S=3, A=2, horizon=2, aliased=True)
    policy, trajectories = policy_on(spec, MLP), enumerate_trajectories(opened(spec))
    behaviour = policy_on(spec, seed=5) if behaved else None
    log_rho = policy_table(behaviour or policy)
    mean, covariance = by_loops(policy, trajectories, odd, K, log_rho)
    for acting in (behaviour, log_rho, torch.as_tensor(log_rho)):
        found = expected_estimate(policy, trajectories, odd, K=K, behaviour=acting).numpy()
        assert found == pytest.approx(mean, abs=1e-12)
    moments = estimate_moments(policy, trajectories, odd, K=K, behaviour=behaviour)
    assert moments.mean == pytest.approx(mean, abs=1e-12)
    assert moments.variance == pytest.approx(np.diag(covariance), abs=1e-12)
    assert moments.variance_trace == pytest.approx(np.trace(covariance), abs=1e-12)


def test_a_policy_mixed_with_the_uniform_one_is_a_behaviour() -> None:
    """Its table is 0.7 pi + 0.3 / A, and the weighted total return under it has the gradient as its mean."""
    spec = world(4, S=3, A=2, horizon=3)
    policy, mdp = policy_on(spec), opened(spec)
    mixed = policy.mixed_with_uniform(0.3)
    assert np.exp(policy_table(mixed)) == pytest.approx(0.7 * np.exp(policy_table(policy)) + 0.15, abs=1e-12)

    def weighted(rows: EnumeratedRows) -> np.ndarray:
        ratios = np.exp((rows.log_pi - rows.log_rho).sum(axis=1, keepdims=True))
        return ratios * rows.rewards.sum(axis=1, keepdims=True) * np.ones_like(rows.rewards)

    found = expected_estimate(policy, enumerate_trajectories(mdp), weighted, K=1, behaviour=mixed)
    assert found.numpy() == pytest.approx(exact_gradient(policy, mdp, gamma=1.0).numpy(), abs=1e-12)


def to_go(rows: EnumeratedRows) -> np.ndarray:
    parts = [rows.rewards[:, a:b] for a, b in zip(rows.offsets[:-1], rows.offsets[1:], strict=True)]
    return np.concatenate([np.cumsum(r[:, ::-1], axis=1)[:, ::-1] for r in parts], axis=1) / len(parts)


def test_many_batches_are_gone_through_in_pieces_and_averaging_divides_the_variance() -> None:
    spec = world(2, S=3, A=3, horizon=3)
    policy, mdp = policy_on(spec), opened(spec)
    trajectories = enumerate_trajectories(mdp)
    assert len(trajectories.lengths) ** 2 > 400_000  # more than fit into one piece
    alone = estimate_moments(policy, trajectories, to_go, K=1)
    pairs = expected_estimate(policy, trajectories, to_go, K=2)
    assert alone.mean == pytest.approx(exact_gradient(policy, mdp, gamma=1.0).numpy(), abs=1e-12)
    assert pairs.numpy() == pytest.approx(alone.mean, abs=1e-12)
    small = world(2, S=3, A=2, horizon=2)
    moments = [estimate_moments(policy_on(small), enumerate_trajectories(opened(small)), to_go, K=K) for K in (1, 2, 3)]
    assert moments[0].variance / 2 == pytest.approx(moments[1].variance, abs=1e-12)
    assert moments[0].variance / 3 == pytest.approx(moments[2].variance, abs=1e-12)


def test_too_many_batches_and_weights_of_another_shape_are_refused() -> None:
    spec = world(3, S=3, A=3, horizon=3)
    policy, trajectories = policy_on(spec), enumerate_trajectories(opened(spec))
    with pytest.raises(pgengine.SpecError) as refused:
        expected_estimate(policy, trajectories, to_go, K=4)
    assert (refused.value.code, refused.value.pointer) == ("too_many_batches", "/algorithm/trajectories")
    with pytest.raises(pgengine.ShapeMismatch, match="expected weights"):
        expected_estimate(policy, trajectories, lambda rows: rows.rewards[:, :1], K=2)
    with pytest.raises(pgengine.ShapeMismatch, match="behaviour"):
        expected_estimate(policy, trajectories, to_go, K=1, behaviour=np.log(np.full((2, 3), 1 / 3)))
