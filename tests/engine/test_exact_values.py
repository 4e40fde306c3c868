"""J, v, q, d and the gradient on finite MDPs: against enumeration, against each other, and against play."""

import math

import numpy as np
import pytest
import torch

import pgengine
from pgengine.exact import (
    enumerate_trajectories,
    exact_gradient,
    exact_return,
    exact_values,
    log_policy,
    parameters_in_double,
    table_return,
    trajectory_probabilities,
)
from pgengine.exact.tables import entropy_of_rows, policy_table
from pgengine.exactness import exact_cost
from pgengine.noise import Noise
from pgengine.rollout import rollout
from pgengine.spec import GymnasiumSpec, TabularSpec, TransformerPolicySpec
from tests.engine.exact_worlds import MLP, opened, policy_on, world


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


WORLDS = {
    "plain": dict(),
    "one_step": dict(horizon=1),
    "long": dict(horizon=40),
    "aliased": dict(aliased=True),
    "drawn_rewards": dict(drawn_rewards=True, aliased=True),
    "no_terminal": dict(terminal=False),
    "no_horizon": dict(horizon=None),
    "no_horizon_aliased": dict(horizon=None, aliased=True),
}


# --- the gradient, two ways ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entropy", [0.0, 0.3])
@pytest.mark.parametrize("gamma", [1.0, 0.8])
@pytest.mark.parametrize("kind", WORLDS)
def test_the_theorem_and_differentiation_give_the_same_gradient(kind: str, gamma: float, entropy: float) -> None:
    for seed in range(3):
        spec = world(seed, **WORLDS[kind])  # type: ignore[arg-type]
        policy, mdp = policy_on(spec, seed=seed), opened(spec)
        by_theorem, by_differentiation = (
            exact_gradient(policy, mdp, gamma=gamma, entropy=entropy, method=method)  # type: ignore[arg-type]
            for method in ("theorem", "differentiate")
        )
        assert distance(by_theorem, by_differentiation) < 1e-10
        assert float(by_theorem.abs().max()) > 1e-3


def test_a_discounted_task_without_any_end_has_a_gradient() -> None:
    spec = world(0, terminal=False, horizon=None)
    policy, mdp = policy_on(spec), opened(spec)
    theorem = exact_gradient(policy, mdp, gamma=0.9)
    assert distance(theorem, exact_gradient(policy, mdp, gamma=0.9, method="differentiate")) < 1e-10


def test_the_gradient_of_a_network_agrees_both_ways_and_with_central_differences() -> None:
    spec = world(1, aliased=True)
    policy, mdp = policy_on(spec, MLP), opened(spec)
    theorem = exact_gradient(policy, mdp, gamma=0.9, entropy=0.2)
    assert distance(theorem, exact_gradient(policy, mdp, gamma=0.9, entropy=0.2, method="differentiate")) < 1e-10
    parameters = parameters_in_double(policy)

    def worth(name: str, index: tuple[int, ...], step: float) -> float:
        moved = {other: tensor.detach().clone() for other, tensor in parameters.items()}
        moved[name][index] += step
        return float(table_return(mdp, log_policy(policy, moved), gamma=0.9, entropy=0.2))

    differences = [
        (worth(name, index, 1e-6) - worth(name, index, -1e-6)) / 2e-6
        for name in sorted(parameters)
        for index in np.ndindex(*parameters[name].shape)
    ]
    assert distance(theorem, torch.tensor(differences, dtype=torch.float64)) < 1e-8


def test_the_return_of_a_policy_is_that_of_its_table() -> None:
    spec = world(3)
    policy, mdp = policy_on(spec), opened(spec)
    table = policy_table(policy)
    J = exact_return(policy, mdp, gamma=0.9, entropy=0.1)
    assert pytest.approx(float(table_return(mdp, torch.as_tensor(table), gamma=0.9, entropy=0.1)), abs=1e-15) == J
    for given in (policy, table, torch.as_tensor(table)):
        assert pytest.approx(J, abs=1e-12) == exact_values(given, mdp, gamma=0.9, entropy=0.1).J


# --- values against enumeration --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "aliased", "drawn_rewards", "no_terminal"])
@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_values_are_conditional_expectations_over_all_trajectories(kind: str, gamma: float) -> None:
    """v_t(s) = E[G_t | s_t = s], q_t(s, a) = E[G_t | s_t = s, a_t = a], d_t(s) = gamma^t P(s_t = s, not ended)."""
    spec = world(2, **{**WORLDS[kind], "horizon": 3})  # type: ignore[arg-type]
    policy, mdp = policy_on(spec), opened(spec)
    trajectories = enumerate_trajectories(mdp)
    log_pi = policy_table(policy)
    p = trajectory_probabilities(trajectories, torch.as_tensor(log_pi)).numpy()
    values = exact_values(policy, mdp, gamma=gamma, entropy=0.5)
    G = np.zeros(len(p))
    bonus = 0.5 * entropy_of_rows(log_pi)[trajectories.observations] * trajectories.taken
    for t in reversed(range(3)):
        after = trajectories.rewards[:, t] + gamma * G
        G = after + bonus[:, t]
        for s in range(len(spec.initial)):
            here = (trajectories.states[:, t] == s) & (trajectories.lengths > t)
            assert p[here].sum() * gamma**t == pytest.approx(values.d[t, s], abs=1e-12)
            if not here.any():
                assert values.d[t, s] == 0.0
                continue
            assert p[here] @ G[here] / p[here].sum() == pytest.approx(values.v[t, s], abs=1e-12)
            for a in range(len(spec.transitions[0])):
                taken = here & (trajectories.actions[:, t] == a)
                assert p[taken] @ after[taken] / p[taken].sum() == pytest.approx(values.q[t, s, a], abs=1e-12)
    assert p @ G == pytest.approx(values.J, abs=1e-12)
    discounts = gamma ** np.arange(3)
    assert values.mass == pytest.approx(p @ (trajectories.taken * discounts).sum(axis=1), abs=1e-12)


def test_the_mass_of_the_visits_is_the_expected_number_of_steps_and_belongs_into_the_theorem() -> None:
    """A theorem with a normalised d, as it is often printed, is short of the gradient by that factor."""
    spec = world(4, horizon=6)
    policy, mdp = policy_on(spec), opened(spec)
    values = exact_values(policy, mdp, gamma=1.0)
    lengths = enumerate_trajectories(opened(world(4, S=2, A=1, horizon=6)))
    alone = exact_values(np.zeros((2, 1)), opened(world(4, S=2, A=1, horizon=6)), gamma=1.0)
    assert alone.mass == pytest.approx(float(lengths.dynamics @ lengths.lengths), abs=1e-12)
    assert values.mass > 1.2
    parameters = parameters_in_double(policy)
    pi = log_policy(policy, parameters).exp()
    normalised = torch.as_tensor(values.d / values.mass)
    printed = torch.autograd.grad(
        (normalised[:, :, None] * torch.as_tensor(values.q) * pi).sum(), [parameters["theta"]]
    )
    assert distance(printed[0].reshape(-1) * values.mass, exact_gradient(policy, mdp, gamma=1.0)) < 1e-12


# --- without a horizon, and discounted by ending ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["no_horizon", "no_horizon_aliased"])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_stationary_values_are_the_limit_of_long_horizons(kind: str, gamma: float) -> None:
    spec = world(5, **WORLDS[kind])  # type: ignore[arg-type]
    policy = policy_on(spec)
    stationary = exact_values(policy, opened(spec), gamma=gamma, entropy=0.2)
    long = exact_values(policy, opened(spec.model_copy(update={"horizon": 400})), gamma=gamma, entropy=0.2)
    assert stationary.v == pytest.approx(long.v[0], abs=1e-10)
    assert stationary.q == pytest.approx(long.q[0], abs=1e-10)
    assert stationary.d == pytest.approx(long.d.sum(axis=0), abs=1e-10)
    assert (stationary.J, stationary.mass) == pytest.approx((long.J, long.mass), abs=1e-10)


@pytest.mark.parametrize("horizon", [None, 5])
def test_ending_at_random_discounts_as_weights_do(horizon: int | None) -> None:
    """An MDP that ends each step with probability 1 - gamma has, undiscounted, the same J, v, q, d and gradient."""
    gamma, spec = 0.8, world(6, terminal=False, horizon=horizon)
    S, A = 4, 3
    transitions = np.zeros((S + 1, A, S + 1))
    transitions[:S, :, :S] = gamma * np.array(spec.transitions)
    transitions[:S, :, S] = 1.0 - gamma
    transitions[S, :, S] = 1.0
    rewards = (np.array(spec.transitions) * np.array(spec.transition_rewards)).sum(axis=2)
    ending = TabularSpec(
        transitions=transitions.tolist(),
        rewards=[*rewards.tolist(), [0.0] * A],
        initial=[*spec.initial, 0.0],
        terminal=[S],
        horizon=horizon,
    )
    policy, beside = policy_on(spec), policy_on(ending)
    beside.parameters["theta"][:S] = policy.parameters["theta"]
    weighted = exact_values(policy, opened(spec), gamma=gamma, entropy=0.1)
    ended = exact_values(beside, opened(ending), gamma=1.0, entropy=0.1)
    assert ended.v[..., :S] == pytest.approx(weighted.v, abs=1e-12)
    assert ended.q[..., :S, :] == pytest.approx(weighted.q, abs=1e-12)
    assert ended.d[..., :S] == pytest.approx(weighted.d, abs=1e-12)
    gradients = exact_gradient(beside, opened(ending), gamma=1.0), exact_gradient(policy, opened(spec), gamma=gamma)
    assert distance(gradients[0][: S * A], gradients[1]) < 1e-12


LOOP = TabularSpec(  # state 0 ends or goes to 1, which stays for ever; state 2, never reached, may end or go there, too
    transitions=[
        [[0.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]],
        [[0.0, 1.0, 0.0, 0.0]] * 2,
        [[0.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]],
        [[0.0, 0.0, 0.0, 1.0]] * 2,
    ],
    rewards=[[1.0, 2.0], [3.0, 3.0], [4.0, 4.0], [0.0, 0.0]],
    initial=[1.0, 0.0, 0.0, 0.0],
    terminal=[3],
)


def test_a_return_that_may_go_on_for_ever_is_refused_undiscounted() -> None:
    mdp, policy = opened(LOOP), policy_on(LOOP)
    for ask in (exact_values, exact_return, exact_gradient):
        with pytest.raises(pgengine.SpecError) as refused:
            ask(policy, mdp, gamma=1.0)
        assert (refused.value.code, refused.value.pointer) == ("no_certain_end", "/environment/horizon")
    assert math.isfinite(exact_return(policy, mdp, gamma=0.99))


def test_traps_that_are_never_reached_do_no_harm() -> None:
    rows = [[[0.0, 0.0, 0.0, 1.0]] * 2, *LOOP.transitions[1:]]
    mdp = opened(LOOP.model_copy(update={"transitions": rows}))
    values = exact_values(policy_on(LOOP), mdp, gamma=1.0)
    pi = np.exp(policy_table(policy_on(LOOP)))[0]
    assert pytest.approx(pi @ [1.0, 2.0], abs=1e-12) == values.J
    assert np.isnan(values.v).tolist() == [False, True, True, False]
    assert np.isnan(values.q[1]).all()
    assert values.q[2, 0] == 4.0
    assert np.isnan(values.q[2, 1])
    assert values.d.tolist() == [1.0, 0.0, 0.0, 0.0]
    assert exact_return(policy_on(LOOP), mdp, gamma=1.0) == pytest.approx(values.J, abs=1e-12)
    theorem, other = (
        exact_gradient(policy_on(LOOP), mdp, gamma=1.0, method=method)  # type: ignore[arg-type]
        for method in ("theorem", "differentiate")
    )
    assert distance(theorem, other) < 1e-12


# --- what the policy sees, and what rewards are ----------------------------------------------------------------------


def test_only_the_mean_of_a_random_reward_matters() -> None:
    spec = world(7, drawn_rewards=True)
    means = (np.array(spec.reward_probabilities) * np.array(spec.reward_values)).sum(axis=2)
    plain = spec.model_copy(update={"rewards": means.tolist(), "reward_values": None, "reward_probabilities": None})
    noisy = plain.model_copy(update={"reward_deviation": np.full(means.shape, 2.0).tolist()})
    policy = policy_on(spec)
    expected = exact_gradient(policy, opened(plain), gamma=0.9)
    assert distance(exact_gradient(policy, opened(spec), gamma=0.9), expected) < 1e-12
    assert distance(exact_gradient(policy, opened(noisy), gamma=0.9), expected) == 0.0


def test_a_policy_that_cannot_tell_states_apart_has_one_gradient_for_all_of_them() -> None:
    """The theorem holds without the Markov property of what is seen; d and q stay those of states."""
    spec = world(8, aliased=True)
    seen, told_apart = policy_on(spec), policy_on(spec.model_copy(update={"observations": None}))
    told_apart.parameters["theta"] = seen.parameters["theta"][[0, 0, 1, 1]]
    whole = exact_gradient(told_apart, opened(spec.model_copy(update={"observations": None})), gamma=0.9)
    by_state = whole.reshape(4, 3)
    shared = torch.stack([by_state[:2].sum(dim=0), by_state[2:].sum(dim=0)])
    assert distance(exact_gradient(seen, opened(spec), gamma=0.9), shared.reshape(-1)) < 1e-12


@pytest.mark.parametrize("kind", ["plain", "aliased", "drawn_rewards", "noisy"])
def test_play_gives_the_exact_return_on_average(kind: str) -> None:
    """Null: the mean return of 20,000 episodes is J. |z| > 5.2 has probability 2e-7; four cases stay below 1e-6."""
    settings = dict(noisy_rewards=True, aliased=True) if kind == "noisy" else WORLDS[kind]
    spec = world(9, **settings)  # type: ignore[arg-type]
    policy = policy_on(spec)
    batch = rollout(policy, opened(spec), Noise(0, "training", 0), 20_000)
    z = (batch.returns.mean() - exact_return(policy, opened(spec), gamma=1.0)) / (batch.returns.std() / 20_000**0.5)
    assert abs(z) < 5.2


# --- what has no exact answer ----------------------------------------------------------------------------------------


def test_what_has_no_exact_answer_is_refused_with_the_way_out() -> None:
    spec = world(0)
    cartpole = GymnasiumSpec(id="CartPole-v1")
    remembering = pgengine.create_policy(TransformerPolicySpec(window=3), spec, pgengine.describe(spec), seed=0)
    over_numbers = policy_on(cartpole)  # type: ignore[arg-type]
    environment = pgengine.open_environment(cartpole)
    for policy, where, code, pointer in (
        (remembering, opened(spec), "exact_needs_no_memory", "/policy"),
        (over_numbers, opened(spec), "exact_needs_a_table", "/policy"),
        (policy_on(spec), environment, "exact_needs_a_model", "/environment"),
    ):
        for ask in (exact_return, exact_gradient):
            with pytest.raises(pgengine.SpecError) as refused:
                ask(policy, where, gamma=1.0)
            assert (refused.value.code, refused.value.pointer) == (code, pointer)
            assert "mode sample" not in refused.value.message
    with pytest.raises(pgengine.SpecError, match="take one of them"):
        exact_cost(environment.facts)
    environment.close()


def test_tables_that_do_not_fit_are_refused() -> None:
    mdp = opened(world(0))
    with pytest.raises(pgengine.ShapeMismatch, match=r"\(4, 3\), found \(4, 2\)"):
        exact_values(np.log(np.full((4, 2), 0.5)), mdp, gamma=1.0)
    with pytest.raises(pgengine.ShapeMismatch, match="sum 1"):
        exact_values(np.log(np.full((4, 3), 0.5)), mdp, gamma=1.0)


def test_values_of_too_many_steps_are_refused_but_their_return_is_not() -> None:
    spec = world(0, S=60, A=20, horizon=1_000_000)
    mdp = opened(spec)
    for ask in (exact_values, exact_gradient):
        with pytest.raises(pgengine.SpecError) as refused:
            ask(policy_on(spec), mdp, gamma=0.9)
        assert (refused.value.code, refused.value.pointer) == ("exact_too_large", "/environment/horizon")


def test_the_cost_grows_with_the_states_and_the_steps() -> None:
    sizes = ((4, 10), (4, 1000), (200, 1000))
    small, long, wide = (exact_cost(pgengine.describe(world(0, S=S, horizon=H))) for S, H in sizes)
    assert small < long / 50
    assert long < wide / 10
    assert exact_cost(pgengine.describe(world(0, horizon=None))) < small
