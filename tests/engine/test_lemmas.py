"""The lemmas on which the derivations stand, each by itself."""

import numpy as np
import pytest
import torch

import pgengine
from pgengine.environments import EnvironmentFacts, Step
from pgengine.estimation import Estimator, gradient
from pgengine.exact import (
    EnumeratedRows,
    Trajectories,
    enumerate_trajectories,
    estimate_moments,
    exact_gradient,
    exact_return,
    exact_values,
    expected_estimate,
    log_policy,
    parameters_in_double,
    trajectory_log_probabilities,
    trajectory_probabilities,
)
from pgengine.exact.tables import policy_table
from pgengine.noise import Noise
from pgengine.rollout import rollout
from pgengine.spec import AlgorithmSpec, TabularSpec, TrainingSpec
from tests.engine.exact_worlds import MLP, opened, policy_on, world

SPEC = world(0, horizon=3, drawn_rewards=True, S=3, A=2)


def enumerated(spec: TabularSpec = SPEC) -> tuple[pgengine.Policy, Trajectories, np.ndarray]:
    policy, trajectories = policy_on(spec), enumerate_trajectories(opened(spec))
    return policy, trajectories, probabilities(trajectories, policy)


def probabilities(trajectories: Trajectories, policy: pgengine.Policy) -> np.ndarray:
    return trajectory_probabilities(trajectories, torch.as_tensor(policy_table(policy))).numpy()


def scores(policy: pgengine.Policy) -> np.ndarray:
    """Gradient of log pi(a|o), [O, A, P]."""
    parameters = parameters_in_double(policy)
    table = log_policy(policy, parameters)
    rows = [
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, list(parameters.values()), retain_graph=True)])
        for value in table.reshape(-1)
    ]
    return torch.stack(rows).reshape(*table.shape, -1).numpy()


# --- the score -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [None, MLP], ids=["table", "mlp"])
def test_the_score_is_zero_on_average_in_each_state(network: object) -> None:
    """Sum over a of pi(a|s) grad log pi(a|s) = grad 1 = 0."""
    policy = policy_on(SPEC, network)  # type: ignore[arg-type]
    pi, score = np.exp(policy_table(policy)), scores(policy)
    assert np.abs(score).max() > 0.1
    assert np.abs(np.einsum("oa,oap->op", pi, score)).max() < 1e-12


def test_the_log_derivative_identity() -> None:
    """Grad pi = pi grad log pi."""
    policy = policy_on(SPEC, MLP)
    parameters = parameters_in_double(policy)
    pi = log_policy(policy, parameters).exp()
    score = scores(policy)
    for o, a in np.ndindex(*pi.shape):
        grad = torch.autograd.grad(pi[o, a], list(parameters.values()), retain_graph=True)
        flat = torch.cat([part.reshape(-1) for part in grad]).numpy()
        assert flat == pytest.approx(float(pi[o, a].detach()) * score[o, a], abs=1e-14)


def test_past_rewards_and_the_score_do_not_correlate_at_any_time() -> None:
    """E[r_k grad log pi(a_t|s_t)] = 0 for k < t, and not for k >= t."""
    policy, trajectories, p = enumerated()
    score = scores(policy)[trajectories.observations, trajectories.actions] * trajectories.taken[:, :, None]
    for t in range(3):
        for k in range(3):
            product = np.einsum("n,n,np->p", p, trajectories.rewards[:, k], score[:, t])
            if k < t:
                assert np.abs(product).max() < 1e-12
            else:
                assert np.abs(product).max() > 1e-6


def test_any_baseline_of_the_state_and_the_time_leaves_the_expectation() -> None:
    policy, trajectories, _ = enumerated()
    table = np.random.default_rng(0).normal(size=(3, 3))

    def baseline(rows: EnumeratedRows) -> np.ndarray:
        times = np.concatenate([np.arange(n) for n in np.diff(rows.offsets)])
        return table[rows.states, times]

    assert expected_estimate(policy, trajectories, baseline, K=1).abs().max() < 1e-12


# --- probabilities of trajectories -----------------------------------------------------------------------------------


def test_probabilities_of_all_trajectories_sum_to_one_and_their_gradients_to_zero() -> None:
    policy, trajectories, p = enumerated()
    parameters = parameters_in_double(policy)
    total = trajectory_probabilities(trajectories, log_policy(policy, parameters)).sum()
    assert p.min() > 0.0
    assert float(total.detach()) == pytest.approx(1.0, abs=1e-12)
    assert torch.autograd.grad(total, parameters["theta"])[0].abs().max() < 1e-12


def test_the_dynamics_do_not_enter_the_score_of_a_trajectory() -> None:
    """Grad log p(tau) = sum of grad log pi(a_t|s_t): the same for any transition probabilities."""
    policy, trajectories, _ = enumerated()
    parameters = parameters_in_double(policy)
    log_p = trajectory_log_probabilities(trajectories, log_policy(policy, parameters))
    score = scores(policy)
    for i in range(0, len(log_p), 7):
        grad = torch.autograd.grad(log_p[i], parameters["theta"], retain_graph=True)[0].reshape(-1).numpy()
        steps = [(trajectories.observations[i, t], trajectories.actions[i, t]) for t in range(trajectories.lengths[i])]
        assert grad == pytest.approx(sum(score[o, a] for o, a in steps), abs=1e-12)


@pytest.mark.slow
def test_log_probabilities_are_finite_where_probabilities_are_too_small_for_a_float() -> None:
    """1,500 decisions in a row: p(tau) is zero in 64 bits, log p(tau) and its gradient are what they should be."""
    steps = 1_500
    chain = TabularSpec(  # action 0 stays, action 1 ends: steps + 1 trajectories
        transitions=[[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0]] * 2],
        rewards=[[1.0, 0.0], [0.0, 0.0]],
        initial=[1.0, 0.0],
        terminal=[1],
        horizon=steps,
    )
    policy, trajectories = policy_on(chain), enumerate_trajectories(opened(chain))
    assert len(trajectories.lengths) == steps + 1
    parameters = parameters_in_double(policy)
    log_pi = log_policy(policy, parameters)
    log_p = trajectory_log_probabilities(trajectories, log_pi)
    longest = int(np.flatnonzero(trajectories.truncated)[0])
    assert float(trajectory_probabilities(trajectories, log_pi)[longest].detach()) == 0.0
    stay = float(log_pi[0, 0].detach())
    assert float(log_p[longest].detach()) == pytest.approx(steps * stay, rel=1e-12)
    grad = torch.autograd.grad(log_p[longest], parameters["theta"])[0][0]
    assert grad.tolist() == pytest.approx([steps * (1 - np.exp(stay)), -steps * (1 - np.exp(stay))], rel=1e-12)


# --- importance ------------------------------------------------------------------------------------------------------


def test_ratios_are_one_on_average_for_whole_trajectories_and_for_every_prefix() -> None:
    """E_rho[product of pi / rho over the steps 0 … t] = 1 for every t, an ended trajectory keeping its last product."""
    policy, trajectories, _ = enumerated()
    behaviour = policy_on(SPEC, seed=3)
    rho = probabilities(trajectories, behaviour)
    difference = policy_table(policy) - policy_table(behaviour)
    steps = difference[trajectories.observations, trajectories.actions] * trajectories.taken
    prefixes = np.exp(np.cumsum(steps, axis=1))
    assert np.abs(prefixes - 1.0).max() > 0.5
    assert rho @ prefixes == pytest.approx(np.ones(3), abs=1e-12)
    assert rho * prefixes[:, -1] == pytest.approx(probabilities(trajectories, policy), abs=1e-14)


def test_the_weighted_total_return_of_another_policy_has_the_gradient_as_its_mean() -> None:
    policy, trajectories, _ = enumerated()

    def weighted(rows: EnumeratedRows) -> np.ndarray:
        difference = (rows.log_pi - rows.log_rho).sum(axis=1, keepdims=True)
        return np.exp(difference) * rows.rewards.sum(axis=1, keepdims=True) * np.ones_like(rows.rewards)

    found = expected_estimate(policy, trajectories, weighted, K=1, behaviour=policy_on(SPEC, seed=3))
    assert (found - exact_gradient(policy, opened(SPEC), gamma=1.0)).abs().max() < 1e-12


def test_ratios_of_a_policy_to_itself_are_one_and_change_no_bit() -> None:
    policy, trajectories, _ = enumerated()

    def plain(rows: EnumeratedRows) -> np.ndarray:
        return rows.rewards

    def weighted(rows: EnumeratedRows) -> np.ndarray:
        ratios = np.exp(rows.log_pi - rows.log_rho)
        assert (ratios == 1.0).all()
        return ratios * rows.rewards

    without = expected_estimate(policy, trajectories, plain, K=1)
    for behaviour in (None, policy, policy_table(policy)):
        assert torch.equal(expected_estimate(policy, trajectories, weighted, K=1, behaviour=behaviour), without)


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("horizon", [4, None])
@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_bellman_and_the_identities_of_values(horizon: int | None, gamma: float) -> None:
    """v = sum pi q, q = r + gamma P v, J = sum p(s) v(s) = sum d r_pi, and d follows the policy's own transitions."""
    spec = world(3, horizon=horizon, aliased=True)
    mdp, policy = opened(spec), policy_on(spec)
    values = exact_values(policy, mdp, gamma=gamma)
    pi = np.exp(policy_table(policy))[mdp.observations]
    live = ~mdp.terminal
    reward = (mdp.transitions * mdp.rewards).sum(axis=2)
    v, q, d = (values.v, values.q, values.d) if horizon else (values.v[None], values.q[None], values.d[None])
    assert v[:, live] == pytest.approx((pi * q).sum(axis=2)[:, live], abs=1e-12)
    following = np.concatenate([v[1:], np.zeros((1, 4))]) if horizon else v
    bellman = reward + gamma * np.einsum("sap,tp->tsa", mdp.transitions, following)
    assert q[:, live] == pytest.approx(bellman[:, live], abs=1e-12)
    assert np.array(spec.initial) @ v[0] == pytest.approx(values.J, abs=1e-12)
    assert (d * (pi * reward).sum(axis=1)).sum() == pytest.approx(values.J, abs=1e-12)
    moved = gamma * np.einsum("ts,sa,sap->tp", d, pi, mdp.transitions) * live
    onward = np.concatenate([np.array(spec.initial)[None], moved[:-1]]) if horizon else np.array(spec.initial) + moved
    assert d == pytest.approx(onward, abs=1e-12)
    assert v[:, ~live].tolist() == np.zeros((len(v), 1)).tolist()


def test_the_distribution_of_the_second_state() -> None:
    """p(s_1) = sum over s_0, a_0 of p(s_0) pi(a_0|s_0) P(s_1|s_0, a_0)."""
    policy, trajectories, p = enumerated()
    second = exact_values(policy, opened(SPEC), gamma=1.0).d[1]
    for s in range(3):
        there = (trajectories.lengths > 1) & (trajectories.states[:, 1] == s)
        assert p[there].sum() == pytest.approx(second[s], abs=1e-12)


@pytest.mark.parametrize("advantage", [False, True])
def test_credit_with_exact_values_has_the_same_mean_and_less_variance(advantage: bool) -> None:
    """What comes after an action may be replaced by its mean: q, or q - v, instead of the rewards-to-go."""
    policy, trajectories, _ = enumerated()
    values = exact_values(policy, opened(SPEC), gamma=0.8)
    credit = values.q - values.v[:, :, None] if advantage else values.q

    def critic(rows: EnumeratedRows) -> np.ndarray:
        times = np.concatenate([np.arange(n) for n in np.diff(rows.offsets)])
        return 0.8**times * credit[times, rows.states, rows.actions]

    def sampled(rows: EnumeratedRows) -> np.ndarray:
        discounted = rows.rewards * 0.8 ** np.arange(rows.rewards.shape[1])
        return np.cumsum(discounted[:, ::-1], axis=1)[:, ::-1]

    exact = exact_gradient(policy, opened(SPEC), gamma=0.8).numpy()
    by_critic, by_rewards = (estimate_moments(policy, trajectories, weights, K=1) for weights in (critic, sampled))
    assert by_critic.mean == pytest.approx(exact, abs=1e-12)
    assert by_rewards.mean == pytest.approx(exact, abs=1e-12)
    assert by_critic.variance_trace < 0.8 * by_rewards.variance_trace


def test_which_policy_is_best_depends_on_where_episodes_begin() -> None:
    """No policy of the class need be best from every state: J weighs them by p(s)."""
    spec = TabularSpec(  # both states look alike and want different actions
        transitions=[[[0.0, 0.0, 1.0]] * 2] * 3,
        rewards=[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]],
        initial=[0.5, 0.5, 0.0],
        terminal=[2],
        horizon=1,
        observations=[0, 0, 1],
    )
    policy = policy_on(spec)
    policy.parameters["theta"][:] = [[1.0, 0.0], [0.0, 0.0]]  # the first action more often
    for initial, sign in (([0.9, 0.1, 0.0], 1.0), ([0.1, 0.9, 0.0], -1.0)):
        mdp = opened(spec.model_copy(update={"initial": initial}))
        slope = exact_gradient(policy, mdp, gamma=1.0)[0]
        assert float(slope) * sign > 0.1
    even = opened(spec)
    assert exact_return(policy, even, gamma=1.0) == pytest.approx(0.5, abs=1e-12)
    assert exact_gradient(policy, even, gamma=1.0).abs().max() < 1e-12


# --- model-free ------------------------------------------------------------------------------------------------------


class OnlyPlays:
    """An MDP behind the interface of all environments: its tables cannot be reached, only played."""

    def __init__(self, spec: TabularSpec) -> None:
        hidden = opened(spec)
        self.facts: EnvironmentFacts = hidden.facts
        self.uniforms: int = hidden.uniforms
        self.begin, self._step, self.keep = hidden.begin, hidden.step, hidden.keep
        self.closed = False

    def step(self, actions: np.ndarray, noise: np.ndarray | None) -> Step:
        assert not self.closed
        return self._step(actions, noise)

    def close(self) -> None:
        self.closed = True


def test_estimates_need_nothing_but_what_was_played() -> None:
    """The gradient of a recorded batch is the same without any environment, and without the environment's tables."""
    spec = world(5, horizon=6, aliased=True)
    facts = pgengine.describe(spec)
    algorithm = pgengine.resolve(
        TrainingSpec(environment=spec, algorithm=AlgorithmSpec(gamma=0.9, trajectories=8)), facts
    ).algorithm
    policy, estimator = policy_on(spec), Estimator(algorithm, facts, seed=0)
    known, played = opened(spec), OnlyPlays(spec)
    batches = [rollout(policy, environment, Noise(3, "training", 0), 8) for environment in (known, played)]
    played.close()
    before = gradient(policy, batches[0], estimator.weigh(policy, batches[0]).weights)
    known.transitions[:], known.rewards[:], known.initial[:] = np.nan, np.nan, np.nan
    after = [gradient(policy, batch, estimator.weigh(policy, batch).weights) for batch in batches]
    assert np.abs(before).max() > 1e-3
    for estimate in after:
        assert np.array_equal(estimate, before)
