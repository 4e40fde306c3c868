"""The linear system: J and its gradient three ways, against play, and the Riccati optima."""

import math

import numpy as np
import pytest
import torch

import pgengine
from pgengine.exact import (
    best_linear,
    exact_gradient,
    exact_return,
    linear_values,
    lqr_return,
    optimal_control,
    stationary_control,
)
from pgengine.noise import Noise
from pgengine.rollout import rollout
from pgengine.spec import (
    GaussianSpec,
    LinearPolicySpec,
    LqrSpec,
    MlpPolicySpec,
    PolicySpec,
    PolynomialFeaturesSpec,
)
from tests.engine.exact_worlds import gaussian_on, opened_system, policy_on, system

SCALAR = LqrSpec(  # x' = x + u, cost x^2 + u^2
    dynamics=[[1.0]], control=[[1.0]], state_cost=[[1.0]], action_cost=[[1.0]], horizon=60
)
GOLDEN = (1.0 + math.sqrt(5.0)) / 2.0


# --- J and its gradient ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", ["fixed", "learned"])
@pytest.mark.parametrize("entropy", [0.0, 0.3])
@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_the_theorem_and_differentiation_give_the_same_gradient(gamma: float, entropy: float, sigma: str) -> None:
    for seed, (n, m) in enumerate([(1, 1), (3, 2), (2, 3)]):
        spec = system(seed, n=n, m=m)
        policy, lqr = gaussian_on(spec, sigma=sigma, seed=seed), opened_system(spec)
        theorem, other = (
            exact_gradient(policy, lqr, gamma=gamma, entropy=entropy, method=method)  # type: ignore[arg-type]
            for method in ("theorem", "differentiate")
        )
        assert len(theorem) == policy.size == (n + 1) * m + (m if sigma == "learned" else 0)
        assert theorem.numpy() == pytest.approx(other.numpy(), rel=1e-11, abs=1e-11)
        assert theorem.abs().min() > 1e-4


def test_the_gradient_agrees_with_central_differences() -> None:
    spec = system(4)
    lqr = opened_system(spec)
    generator = np.random.default_rng(0)
    theta, log_sigma = generator.normal(size=(4, 2)) * 0.2, generator.normal(size=2) * 0.2
    values = linear_values(lqr, theta, log_sigma, gamma=0.9, entropy=0.4)

    def worth(theta: np.ndarray, log_sigma: np.ndarray) -> float:
        return float(lqr_return(lqr, torch.tensor(theta), torch.tensor(log_sigma), gamma=0.9, entropy=0.4))

    for index in np.ndindex(*theta.shape):
        step = np.zeros_like(theta)
        step[index] = 1e-6
        difference = (worth(theta + step, log_sigma) - worth(theta - step, log_sigma)) / 2e-6
        assert values.theta_gradient[index] == pytest.approx(difference, rel=1e-7, abs=1e-7)
    for i in range(2):
        step = 1e-6 * np.eye(2)[i]
        difference = (worth(theta, log_sigma + step) - worth(theta, log_sigma - step)) / 2e-6
        assert values.log_sigma_gradient[i] == pytest.approx(difference, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_values_and_moments_give_the_same_return(gamma: float) -> None:
    """J by the quadratic values from the end is J by the moments from the beginning, for every number of steps."""
    for horizon in (1, 2, 9):
        spec = system(1, horizon=horizon)
        lqr, policy = opened_system(spec), gaussian_on(spec)
        theta, log_sigma = (policy.parameters[name].astype(np.float64) for name in ("theta", "log_sigma"))
        values = linear_values(lqr, theta, log_sigma, gamma=gamma, entropy=0.2)
        assert pytest.approx(exact_return(policy, lqr, gamma=gamma, entropy=0.2), rel=1e-12) == values.J


def test_one_step_is_the_closed_form() -> None:
    """J = -(tr Q (S + mm') + E u' R u), grad over the mean = -2 R E[u] E-moments, over log sigma = -2 R sigma^2."""
    spec = LqrSpec(
        dynamics=[[1.0]],
        control=[[2.0]],
        state_cost=[[3.0]],
        action_cost=[[5.0]],
        initial_mean=[0.5],
        initial_deviation=[2.0],
        horizon=1,
    )
    theta, log_sigma, second = np.array([[0.3], [0.1]]), np.array([math.log(0.4)]), 0.25 + 4.0
    values = linear_values(opened_system(spec), theta, log_sigma, gamma=1.0)
    square = 0.09 * second + 2 * 0.3 * 0.1 * 0.5 + 0.01 + 0.16
    assert pytest.approx(-(3.0 * second + 5.0 * square), rel=1e-14) == values.J
    assert values.theta_gradient[0, 0] == pytest.approx(-10.0 * (0.3 * second + 0.1 * 0.5), rel=1e-14)
    assert values.theta_gradient[1, 0] == pytest.approx(-10.0 * (0.3 * 0.5 + 0.1), rel=1e-14)
    assert values.log_sigma_gradient[0] == pytest.approx(-10.0 * 0.16, rel=1e-14)


@pytest.mark.parametrize("sigma", ["fixed", "learned"])
def test_play_gives_the_exact_return_on_average(sigma: str) -> None:
    """Null: the mean return of 20,000 episodes is J; the return has finite moments of all orders.

    |z| > 5.2 has probability 2e-7, in two cases 4e-7.
    """
    spec = system(2, horizon=5)
    policy, lqr = gaussian_on(spec, sigma=sigma), opened_system(spec)
    batch = rollout(policy, lqr, Noise(1, "training", 0), 20_000)
    z = (batch.returns.mean() - exact_return(policy, lqr, gamma=1.0)) / (batch.returns.std() / 20_000**0.5)
    assert abs(z) < 5.2


def test_a_system_that_is_not_held_is_worth_minus_infinity() -> None:
    spec = SCALAR.model_copy(update={"horizon": 2_000})
    policy = gaussian_on(spec)
    policy.parameters["theta"][0] = 3.0
    assert exact_return(policy, opened_system(spec), gamma=1.0) == -math.inf


@pytest.mark.parametrize(("policy", "code", "pointer"), [
    (MlpPolicySpec(hidden=[3]), "exact_needs_linear_gaussian", "/policy"),
    (LinearPolicySpec(distribution=GaussianSpec(sigma="head")), "exact_needs_linear_gaussian", "/policy"),
    (LinearPolicySpec(features=PolynomialFeaturesSpec(degree=2)), "exact_needs_linear_gaussian", "/policy"),
    (LinearPolicySpec(normalise_observations=True), "exact_needs_no_normaliser", "/policy/normalise_observations"),
], ids=["mlp", "head", "polynomial", "normaliser"])  # fmt: skip
def test_other_policies_are_refused_with_the_way_out(policy: PolicySpec, code: str, pointer: str) -> None:
    spec = system(0)
    for ask in (exact_return, exact_gradient):
        with pytest.raises(pgengine.SpecError) as refused:
            ask(policy_on(spec, policy), opened_system(spec), gamma=1.0)
        assert (refused.value.code, refused.value.pointer) == (code, pointer)
        assert "; take such a policy" in refused.value.message or "; switch it off" in refused.value.message


# --- optima ----------------------------------------------------------------------------------------------------------


def test_the_scalar_system_costs_the_golden_ratio() -> None:
    stationary = stationary_control(opened_system(SCALAR), gamma=1.0)
    assert stationary.costs[0, 0] == pytest.approx(GOLDEN, rel=1e-14)
    assert stationary.gain[0, 0] == pytest.approx(-GOLDEN / (1.0 + GOLDEN), rel=1e-14)
    plan = optimal_control(opened_system(SCALAR), gamma=1.0)
    assert plan.costs[0] == pytest.approx(stationary.costs, rel=1e-12)
    assert plan.gains[0] == pytest.approx(stationary.gain, rel=1e-12)
    assert plan.gains[-1] == pytest.approx(0.0, abs=0.0)  # the last action changes nothing any more
    assert pytest.approx(-GOLDEN, rel=1e-12) == plan.J


@pytest.mark.parametrize("gamma", [1.0, 0.7])
def test_the_riccati_plan_is_worth_what_its_gains_earn_and_no_change_helps(gamma: float) -> None:
    spec = system(3, horizon=4)
    lqr, deviation = opened_system(spec), np.array([0.3, 0.1])

    def worth(gains: np.ndarray) -> float:
        mean, covariance = lqr.initial_mean, np.diag(lqr.initial_deviation**2)
        total, noise = 0.0, lqr.B @ np.diag(deviation**2) @ lqr.B.T + np.diag(lqr.noise_deviation**2)
        for t, F in enumerate(gains):
            second = covariance + np.outer(mean, mean)
            cost = np.trace((lqr.Q + F.T @ lqr.R @ F) @ second) + np.trace(lqr.R @ np.diag(deviation**2))
            total -= gamma**t * cost
            M = lqr.A + lqr.B @ F
            mean, covariance = M @ mean, M @ covariance @ M.T + noise
        return float(total)

    plan = optimal_control(lqr, gamma=gamma, deviation=deviation)
    assert pytest.approx(worth(plan.gains), rel=1e-12) == plan.J
    for index in np.ndindex(*plan.gains.shape):
        for sign in (1.0, -1.0):
            step = np.zeros_like(plan.gains)
            step[index] = sign * 1e-3
            assert worth(plan.gains + step) < plan.J


@pytest.mark.parametrize("gamma", [1.0, 0.7])
def test_the_stationary_gain_is_the_limit_of_long_plans(gamma: float) -> None:
    lqr = opened_system(system(5, horizon=300))
    stationary, plan = stationary_control(lqr, gamma=gamma), optimal_control(lqr, gamma=gamma)
    assert stationary.gain == pytest.approx(plan.gains[0], abs=1e-10)
    assert stationary.costs == pytest.approx(plan.costs[0], abs=1e-10)
    if gamma == 1.0:  # what one more step costs in the long run
        longer = optimal_control(opened_system(system(5, horizon=301)), gamma=1.0)
        assert pytest.approx(stationary.cost_per_step, rel=1e-9) == plan.J - longer.J


@pytest.mark.slow
def test_the_best_gain_without_a_clock_lies_between_the_stationary_one_and_the_plan() -> None:
    for seed, gamma in ((6, 1.0), (7, 0.9)):
        lqr, deviation = opened_system(system(seed, horizon=5)), 0.2
        plan = optimal_control(lqr, gamma=gamma, deviation=deviation)
        best = best_linear(lqr, gamma=gamma, deviation=deviation)
        gain = stationary_control(lqr, gamma=gamma).gain
        theta = np.concatenate([gain.T, np.zeros((1, 2))])
        log_sigma = np.full(2, math.log(deviation))
        stationary = linear_values(lqr, theta, log_sigma, gamma=gamma)
        assert stationary.J + 1e-6 < best.J < plan.J - 1e-6
        assert best.slope < 1e-5 * abs(best.J)
        assert pytest.approx(best.J, rel=1e-12) == linear_values(lqr, best.theta, log_sigma, gamma=gamma).J
        generator = np.random.default_rng(0)
        for _ in range(50):
            near = best.theta + 0.01 * generator.normal(size=best.theta.shape)
            assert linear_values(lqr, near, log_sigma, gamma=gamma).J < best.J


def test_a_system_that_no_control_holds_is_refused() -> None:
    loose = SCALAR.model_copy(update={"dynamics": [[2.0]], "control": [[0.0]]})
    with pytest.raises(pgengine.SpecError) as refused:
        stationary_control(opened_system(loose), gamma=1.0)
    assert (refused.value.code, refused.value.pointer) == ("no_stationary_control", "/environment")
    assert stationary_control(opened_system(loose), gamma=0.2).costs[0, 0] == pytest.approx(
        1.0 / (1.0 - 0.8), rel=1e-12
    )
