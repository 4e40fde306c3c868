"""Every estimator against the exact gradient, by enumerating all batches of small MDPs; the wrong ones must fail."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

import pgengine
from pgengine.estimators import reward_to_go, step_weights, total_return
from pgengine.exact import (
    enumerate_trajectories,
    exact_gradient,
    exact_return,
    expected_estimate,
    log_policy,
    parameters_in_double,
    trajectory_probabilities,
)
from pgengine.spec import AlgorithmSpec, TabularSpec, TrainingSpec
from tests.engine.worlds import algorithm, bandit, random_mdp, table_policy

TOLERANCE = 1e-9
NONE, CONSTANT, OTHERS = {"kind": "none"}, {"kind": "constant", "value": 0.7}, {"kind": "leave_one_out"}


def expectation(spec: TabularSpec, weights: Callable[[np.ndarray, np.ndarray], np.ndarray], K: int) -> torch.Tensor:
    return expected_estimate(table_policy(spec), enumerate_trajectories(pgengine.TabularMDP(spec)), weights, K=K)


def gradient(spec: TabularSpec, gamma: float) -> torch.Tensor:
    return exact_gradient(table_policy(spec), pgengine.TabularMDP(spec), gamma=gamma)


def distance(estimate: torch.Tensor, exact: torch.Tensor) -> float:
    return float((estimate - exact).abs().max())


# --- the exact answers themselves ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_the_gradient_of_the_return_is_the_sum_over_all_trajectories(seed: int, gamma: float) -> None:
    spec = random_mdp(seed, A=3)
    mdp, policy = pgengine.TabularMDP(spec), table_policy(spec, seed)
    trajectories = enumerate_trajectories(mdp)
    parameters = parameters_in_double(policy)
    p = trajectory_probabilities(trajectories, log_policy(policy, parameters))
    discounts = gamma ** np.arange(spec.horizon)
    J = (p * torch.as_tensor((trajectories.rewards * discounts).sum(axis=1))).sum()
    by_enumeration = torch.autograd.grad(J, list(parameters.values()))[0].reshape(-1)
    assert distance(by_enumeration, exact_gradient(policy, mdp, gamma=gamma)) < 1e-12
    assert float(p.detach().sum()) == pytest.approx(1.0, abs=1e-12)


def test_the_gradient_of_the_return_agrees_with_central_differences() -> None:
    spec = random_mdp(5, A=3)
    mdp, policy = pgengine.TabularMDP(spec), table_policy(spec)
    log_pi = lambda theta: log_policy(policy, {"theta": theta})  # noqa: E731
    theta = torch.tensor(policy.parameters["theta"], dtype=torch.float64)
    differences = torch.zeros_like(theta)
    for index in np.ndindex(*theta.shape):
        step = torch.zeros_like(theta)
        step[index] = 1e-6
        above, below = (float(exact_return(mdp, log_pi(theta + sign * step), gamma=0.9)) for sign in (1, -1))
        differences[index] = (above - below) / 2e-6
    assert distance(differences.reshape(-1), exact_gradient(policy, mdp, gamma=0.9)) < 1e-8


def test_the_bandit_gradient_is_the_closed_form() -> None:
    spec = bandit(1.0, 2.0, 4.0)
    policy = table_policy(spec)
    scores = policy.parameters["theta"][0].astype(np.float64)
    pi = np.exp(scores) / np.exp(scores).sum()
    means = np.array([1.0, 2.0, 4.0])
    expected = np.concatenate([pi * (means - pi @ means), np.zeros(3)])
    assert distance(gradient(spec, 1.0), torch.as_tensor(expected)) < 1e-12


# --- the label table -------------------------------------------------------------------------------------------------


def rows_of_the_label_table() -> list[object]:
    rows = []
    for credit in ("total_return", "reward_to_go"):
        for gamma in (1.0, 0.8):
            for weight in ("none", "gamma_power"):
                if credit == "total_return" and weight == "gamma_power":
                    continue  # refused: see test_resolution
                for mean in ("trajectories", "all_steps", "own_steps"):
                    for baseline in (NONE, CONSTANT, OTHERS):
                        settings = dict(
                            credit=credit, gamma=gamma, discount_weight=weight, mean_over=mean, baseline=baseline
                        )
                        rows.append(
                            pytest.param(settings, id="-".join([credit, str(gamma), weight, mean, baseline["kind"]]))
                        )  # type: ignore[arg-type]
    return rows


WORLDS = {
    "varying": random_mdp(0, horizon=3),
    "fixed": random_mdp(1, horizon=3, S=2, terminal=False),
    "one_step": random_mdp(2, horizon=1),
    "ends_at_once": bandit(0.0, 1.0, 0.3).model_copy(update={"horizon": 5}),
    "ends_at_the_second": TabularSpec(
        transitions=[[[0.0, 0.5, 0.5, 0.0], [0.0, 1.0, 0.0, 0.0]], *[[[0.0, 0.0, 0.0, 1.0]] * 2] * 3],
        rewards=[[0.2, 1.0], [-1.0, 0.5], [2.0, -0.3], [0.0, 0.0]],
        initial=[1.0, 0.0, 0.0, 0.0],
        terminal=[3],
        horizon=5,
    ),
}


@pytest.mark.parametrize("settings", rows_of_the_label_table())
@pytest.mark.parametrize("world", WORLDS)
def test_the_label_says_what_enumeration_finds(world: str, settings: dict[str, object]) -> None:
    spec = WORLDS[world]
    resolved = TrainingSpec(environment=spec, algorithm=algorithm(spec, trajectories=2, **settings))
    said = pgengine.label(resolved, pgengine.describe(spec))
    exact = gradient(spec, resolved.algorithm.gamma)
    found = expectation(spec, lambda r, o: step_weights(r, o, resolved.algorithm), K=2)
    if said.kind == "biased":
        scale = float(found @ exact / (exact @ exact))
        assert distance(found, scale * exact) > 1e-4, "labelled biased, but it is a multiple of the gradient"
        assert said.factor is None
    else:
        assert said.factor is not None
        assert (said.kind == "exact") == (said.factor == 1.0)
        assert distance(found, said.factor * exact) < TOLERANCE


@pytest.mark.parametrize("settings", [
    dict(credit="total_return", gamma=0.8, baseline=OTHERS),
    dict(credit="reward_to_go", gamma=0.8, baseline=OTHERS),
    dict(credit="reward_to_go", gamma=1.0, baseline=OTHERS),
    dict(credit="reward_to_go", gamma=1.0, baseline=CONSTANT),
])  # fmt: skip
def test_exact_with_three_trajectories(settings: dict[str, object]) -> None:
    spec = random_mdp(3, horizon=2)
    a = algorithm(spec, trajectories=3, **settings)
    assert distance(expectation(spec, lambda r, o: step_weights(r, o, a), K=3), gradient(spec, a.gamma)) < TOLERANCE


@pytest.mark.parametrize("settings", [
    dict(credit="total_return", gamma=0.8, baseline=NONE),
    dict(credit="total_return", gamma=1.0, baseline=CONSTANT),
    dict(credit="reward_to_go", gamma=0.8, baseline=NONE),
    dict(credit="reward_to_go", gamma=1.0, baseline=CONSTANT),
])  # fmt: skip
def test_exact_with_one_trajectory_three_actions_and_four_steps(settings: dict[str, object]) -> None:
    spec = random_mdp(4, A=3, horizon=4)
    a = algorithm(spec, trajectories=1, **settings)
    assert distance(expectation(spec, lambda r, o: step_weights(r, o, a), K=1), gradient(spec, a.gamma)) < TOLERANCE


def test_mean_over_all_steps_with_one_trajectory_is_the_mean_over_its_own() -> None:
    spec = WORLDS["varying"]
    both = [
        pgengine.label(
            TrainingSpec(environment=spec, algorithm=algorithm(spec, trajectories=1, mean_over=mean, baseline=NONE)),
            pgengine.describe(spec),
        )
        for mean in ("all_steps", "own_steps")
    ]
    assert both[0] == both[1]


# --- the wrong ones --------------------------------------------------------------------------------------------------
# Each is an estimator that some library ships or shipped. gamma is 1 where discounting is not the defect, so that
# nothing else can catch it.

Mutant = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _episodes(values: np.ndarray, offsets: np.ndarray) -> list[np.ndarray]:
    return [values[..., a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


def gamma_ignored(rewards: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    return reward_to_go(rewards, offsets, gamma=1.0) / (len(offsets) - 1)


def gamma_power_dropped(rewards: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    return reward_to_go(rewards, offsets, gamma=0.8) / (len(offsets) - 1)


def total_return_times_gamma_power(rewards: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    time = np.concatenate([np.arange(b - a) for a, b in zip(offsets[:-1], offsets[1:], strict=True)])
    return total_return(rewards, offsets, gamma=0.8) * 0.8**time / (len(offsets) - 1)


def mean_over_steps(rewards: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    return reward_to_go(rewards, offsets, gamma=1.0) / offsets[-1]


def mean_over_own_steps(rewards: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    lengths = np.diff(offsets)
    return reward_to_go(rewards, offsets, gamma=1.0) / np.repeat(lengths, lengths) / len(lengths)


def own_episode_mean(rewards: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    parts = [G - G.mean(axis=-1, keepdims=True) for G in _episodes(reward_to_go(rewards, offsets, gamma=1.0), offsets)]
    return np.concatenate(parts, axis=-1) / len(parts)


def own_episode_whitening(rewards: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    parts = [
        (G - G.mean(axis=-1, keepdims=True)) / (G.std(axis=-1, keepdims=True) + 1e-8)
        for G in _episodes(reward_to_go(rewards, offsets, gamma=1.0), offsets)
    ]
    return np.concatenate(parts, axis=-1) / len(parts)


def batch_step_mean(rewards: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    G = reward_to_go(rewards, offsets, gamma=1.0)
    return (G - G.mean(axis=-1, keepdims=True)) / (len(offsets) - 1)


def batch_step_whitening(rewards: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    G = reward_to_go(rewards, offsets, gamma=1.0)
    return (G - G.mean(axis=-1, keepdims=True)) / (G.std(axis=-1, keepdims=True) + 1e-8) / offsets[-1]


def alive_mean_own_included(rewards: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    parts = _episodes(reward_to_go(rewards, offsets, gamma=1.0), offsets)
    result = [part.copy() for part in parts]
    for t in range(max(part.shape[-1] for part in parts)):
        alive = [part[..., t] for part in parts if part.shape[-1] > t]
        mean = np.mean(alive, axis=0)
        for part in result:
            if part.shape[-1] > t:
                part[..., t] -= mean
    return np.concatenate(result, axis=-1) / len(parts)


def returns_off_by_one(rewards: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    parts = []
    # the first reward never, the last one twice: [210, 200, 100] for 1, 10, 100
    for r in _episodes(rewards, offsets):
        shifted = np.concatenate([r[..., 1:], r[..., -1:]], axis=-1)
        parts.append(np.cumsum(shifted[..., ::-1], axis=-1)[..., ::-1])
    return np.concatenate(parts, axis=-1) / (len(offsets) - 1)


def everything_credited_with_the_first_reward(rewards: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    parts = [np.broadcast_to(r[..., :1], r.shape) for r in _episodes(rewards, offsets)]
    return np.concatenate(parts, axis=-1) / len(parts)


WRONG: list[tuple[Mutant, int, float]] = [
    (gamma_ignored, 1, 0.8),
    (gamma_power_dropped, 1, 0.8),
    (total_return_times_gamma_power, 1, 0.8),
    (mean_over_steps, 2, 1.0),
    (mean_over_own_steps, 1, 1.0),
    (own_episode_mean, 1, 1.0),
    (own_episode_whitening, 1, 1.0),
    (batch_step_mean, 2, 1.0),
    (batch_step_whitening, 2, 1.0),
    (alive_mean_own_included, 2, 1.0),
    (returns_off_by_one, 1, 1.0),
    (everything_credited_with_the_first_reward, 1, 1.0),
]


@pytest.mark.parametrize(("mutant", "K", "gamma"), WRONG, ids=[mutant.__name__ for mutant, _, _ in WRONG])
def test_a_wrong_estimator_is_caught(mutant: Mutant, K: int, gamma: float) -> None:
    spec = WORLDS["varying"]
    exact = gradient(spec, gamma)
    found = expectation(spec, mutant, K)
    scale = float(found @ exact / (exact @ exact))
    assert distance(found, exact) > 1e-3, "not caught"
    assert distance(found, scale * exact) > 1e-4, "only scaled"


def test_truncated_episodes_thrown_away_is_caught() -> None:
    spec = WORLDS["varying"]
    trajectories = enumerate_trajectories(pgengine.TabularMDP(spec))
    policy = table_policy(spec)
    p = trajectory_probabilities(trajectories, log_policy(policy, parameters_in_double(policy))).detach().numpy()
    kept = 1.0 / p[~trajectories.truncated].sum()
    cut = {
        tuple(r[:n]): bool(c)
        for r, n, c in zip(trajectories.rewards, trajectories.lengths, trajectories.truncated, strict=True)
    }

    def weights(rewards: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        G = reward_to_go(rewards, offsets, gamma=1.0)
        return G * np.array([0.0 if cut[tuple(row)] else kept for row in rewards])[:, None]

    exact, found = gradient(spec, 1.0), expectation(spec, weights, 1)
    scale = float(found @ exact / (exact @ exact))
    assert distance(found, scale * exact) > 1e-4


def test_the_score_of_an_action_that_was_not_taken_is_caught() -> None:
    """A loss that asks the policy for its mode has the same gradient whatever was done."""
    spec = WORLDS["varying"]
    policy, trajectories = table_policy(spec), enumerate_trajectories(pgengine.TabularMDP(spec))
    parameters = parameters_in_double(policy)
    log_pi = log_policy(policy, parameters)
    p = trajectory_probabilities(trajectories, log_pi).detach()
    taken = torch.as_tensor(trajectories.taken)
    G = torch.as_tensor(np.cumsum(trajectories.rewards[:, ::-1], axis=1)[:, ::-1].copy())
    mode = log_pi.argmax(dim=1)[trajectories.states]
    surrogate = (p[:, None] * G * taken * log_pi[trajectories.states, mode]).sum()
    found = torch.autograd.grad(surrogate, parameters["theta"])[0].reshape(-1)
    exact = gradient(spec, 1.0)
    assert distance(found, float(found @ exact / (exact @ exact)) * exact) > 1e-3


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_batch_mean_of_returns_own_included_only_scales(gamma: float) -> None:
    """Not wrong in direction: exactly 1 - 1/K of the gradient."""
    spec = WORLDS["varying"]

    def weights(rewards: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        lengths = np.diff(offsets)
        R = total_return(rewards, offsets, gamma=gamma)
        mean = R[..., offsets[:-1]].mean(axis=-1, keepdims=True)
        return (R - mean) / len(lengths)

    assert distance(expectation(spec, weights, 2), 0.5 * gradient(spec, gamma)) < TOLERANCE


def test_a_label_is_derived_for_each_algorithm() -> None:
    spec = WORLDS["varying"]
    facts = pgengine.describe(spec)
    default = pgengine.label(pgengine.resolve(TrainingSpec(environment=spec), facts), facts)
    assert (default.kind, default.factor) == ("exact", 1.0)
    assert [reason.code for reason in default.reasons] == ["time_limit_not_observed"]
    dropped = AlgorithmSpec(gamma=0.9, discount_weight="none")
    biased = pgengine.label(pgengine.resolve(TrainingSpec(environment=spec, algorithm=dropped), facts), facts)
    assert biased.kind == "biased"
    assert "discount_dropped" in [reason.code for reason in biased.reasons]
