"""Figures of the gradient in every update: unbiased where they say so, and without any effect on the training."""

import math
import re
from statistics import NormalDist

import numpy as np
import pytest
import torch

import pgengine
from pgengine.diagnostics import gradient_figures, return_figures, saturated_fraction
from pgengine.estimation import Estimator, gradient, tensors_of
from pgengine.exact import exact_gradient, exact_return
from pgengine.exactness import unmeasured
from pgengine.noise import Noise
from pgengine.rollout import Batch, rollout
from pgengine.spec import (
    AlgorithmSpec,
    EnvironmentSpec,
    GymnasiumSpec,
    LinearPolicySpec,
    MlpPolicySpec,
    PolicySpec,
    StopSpec,
    TabularSpec,
    TrainingSpec,
    TransformerPolicySpec,
)
from tests.engine.exact_worlds import system
from tests.engine.worlds import PENDULUM, algorithm, bandit, random_mdp, table_policy

FALSE_ALARM = 1e-7


def figures(world: TabularSpec, chosen: AlgorithmSpec, repeats: int) -> list[dict[str, float]]:
    """The figures of many independent batches at the same parameters."""
    policy, environment = table_policy(world), pgengine.open_environment(world)
    estimator = Estimator(chosen, environment.facts, seed=0)
    tensors = tensors_of(policy)
    return [
        gradient_figures(
            estimator, policy, tensors, rollout(policy, environment, Noise(1, "training", u), chosen.trajectories)
        )
        for u in range(repeats)
    ]


def agrees(values: list[float], expected: float) -> bool:
    """Null: the mean is as expected. Two-sided normal test at FALSE_ALARM."""
    array = np.array(values)
    z = (array.mean() - expected) / (array.std(ddof=1) / math.sqrt(len(array)))
    return bool(abs(z) < NormalDist().inv_cdf(1 - FALSE_ALARM / 2))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "leave_one_out"])
def test_the_pair_statistic_is_unbiased_where_the_square_of_an_estimate_is_not(kind: str) -> None:
    world = random_mdp(0, horizon=3)
    chosen = algorithm(world, trajectories=8, gamma=0.9, baseline={"kind": kind})
    exact = exact_gradient(table_policy(world), pgengine.TabularMDP(world), gamma=0.9)
    square = float((torch.as_tensor(exact) ** 2).sum())
    found = figures(world, chosen, 500)
    assert agrees([each["gradient_squared_norm"] for each in found], square)
    naive = [each["gradient_squared_norm"] + each["gradient_noise"] for each in found]
    assert not agrees(naive, square)


@pytest.mark.slow
def test_the_noise_is_the_trace_of_the_variance_of_the_estimate() -> None:
    """Without a baseline within the batch the mean of the groups is the estimate itself."""
    world = random_mdp(1, horizon=3)
    chosen = algorithm(world, trajectories=8, baseline={"kind": "none"})
    policy, environment = table_policy(world), pgengine.open_environment(world)
    estimator = Estimator(chosen, environment.facts, seed=0)
    estimates = []
    for update in range(500):
        batch = rollout(policy, environment, Noise(1, "training", update), 8)
        estimates.append(gradient(policy, batch, estimator.weigh(policy, batch).weights))
    centred = np.array(estimates) - np.mean(estimates, axis=0)
    squares = (centred**2).sum(axis=1)
    noises = np.array([each["gradient_noise"] for each in figures(world, chosen, 500)])
    deviation = math.sqrt((squares.var() + noises.var()) / 500)
    assert abs(noises.mean() - squares.mean()) < NormalDist().inv_cdf(1 - FALSE_ALARM / 2) * deviation


@pytest.mark.parametrize(("kind", "K", "told"), [
    ("none", 1, False), ("none", 2, True), ("leave_one_out", 3, False), ("leave_one_out", 4, True),
    ("batch_mean", 3, False), ("batch_mean", 4, True),
])  # fmt: skip
def test_too_few_trajectories_tell_nothing(kind: str, K: int, told: bool) -> None:
    world = bandit(0.0, 1.0)
    (found,) = figures(world, algorithm(world, trajectories=K, baseline={"kind": kind}), 1)
    assert ("gradient_squared_norm" in found) == told


@pytest.mark.parametrize(
    "baseline",
    [{"kind": "batch_mean", "over": "time_step"}, {"kind": "moving_average", "decay": 0.0, "includes_batch": True}],
)
def test_what_a_baseline_with_the_own_trajectory_leaves_is_what_it_leaves_in_the_batch(
    baseline: dict[str, object],
) -> None:
    """Such an estimate is 1 - 1/K of the leave-one-out one, in a group too, where K is smaller."""
    world = random_mdp(0, horizon=3)
    (own,) = figures(world, algorithm(world, trajectories=16, baseline=baseline), 1)
    (others,) = figures(world, algorithm(world, trajectories=16, baseline={"kind": "leave_one_out"}), 1)
    for name in ("gradient_squared_norm", "gradient_noise"):
        assert own[name] == pytest.approx((15 / 16) ** 2 * others[name], rel=1e-9)


def test_measuring_changes_no_bit() -> None:
    world = random_mdp(0)
    runs = []
    for every in (0, 1, 3):
        spec = TrainingSpec(environment=world, stop=StopSpec(updates=5), diagnostics_every=every)
        updates = [(u.policy.to_bytes(), "gradient_noise" in u.metrics) for u in pgengine.train(spec)]
        runs.append(updates)
    assert [[data for data, _ in run] for run in runs] == [[data for data, _ in runs[0]]] * 3
    assert [[told for _, told in run] for run in runs] == [[False] * 5, [True] * 5, [True, False, False, True, False]]


def test_exact_figures_are_those_of_the_policy_before_the_step() -> None:
    world = random_mdp(0)
    policy = table_policy(world)
    spec = TrainingSpec(environment=world, algorithm=AlgorithmSpec(gamma=0.9), stop=StopSpec(updates=1))
    (update,) = pgengine.train(spec, policy=policy)
    mdp = pgengine.TabularMDP(world)
    assert update.metrics["exact_return"] == pytest.approx(exact_return(policy, mdp, gamma=0.9), abs=1e-12)
    norm = np.linalg.norm(np.asarray(exact_gradient(policy, mdp, gamma=0.9)))
    assert update.metrics["exact_gradient_norm"] == pytest.approx(norm, abs=1e-12)


def test_where_nothing_exact_is_known_nothing_is_said() -> None:
    spec = TrainingSpec(environment=PENDULUM, algorithm=AlgorithmSpec(trajectories=4), stop=StopSpec(updates=1))
    (update,) = pgengine.train(spec)
    assert not [name for name in update.metrics if name.startswith("exact")]


LONG_LAKE = GymnasiumSpec(id="FrozenLake-v1", max_episode_steps=1000)


@pytest.mark.parametrize(
    ("world", "policy", "every", "code"),
    [
        (random_mdp(0), MlpPolicySpec(), 1, None),
        (random_mdp(0), MlpPolicySpec(), 0, "exact_not_measured"),
        (random_mdp(0), TransformerPolicySpec(window=2, width=8, heads=1), 1, "exact_needs_no_memory"),
        (LONG_LAKE, MlpPolicySpec(), 1, "exact_too_large"),
        (LONG_LAKE, MlpPolicySpec(), 3, None),
        (GymnasiumSpec(id="FrozenLake8x8-v1"), MlpPolicySpec(), 1, "exact_too_large"),
        (PENDULUM, MlpPolicySpec(), 1, "exact_needs_a_model"),
        (system(0, horizon=3), MlpPolicySpec(), 1, "exact_needs_linear_gaussian"),
        (system(0, horizon=3), LinearPolicySpec(normalise_observations=True), 1, "exact_needs_no_normaliser"),
        (system(0, horizon=3), LinearPolicySpec(), 1, None),
        (system(0, horizon=14), LinearPolicySpec(), 1, "exact_too_large"),
    ],
)
def test_an_update_has_exact_figures_unless_a_reason_for_their_absence_is_given(
    world: EnvironmentSpec, policy: PolicySpec, every: int, code: str | None
) -> None:
    spec = TrainingSpec(
        environment=world,
        policy=policy,
        algorithm=AlgorithmSpec(trajectories=2),
        stop=StopSpec(updates=1),
        diagnostics_every=every,
    )
    facts = pgengine.describe(world)
    learns = pgengine.resolve(spec, facts).policy
    absent = unmeasured(facts, learns, every)
    assert (None if absent is None else absent.code) == code
    (update,) = pgengine.train(spec)
    assert ("exact_return" in update.metrics) == ("exact_gradient_norm" in update.metrics) == (code is None)
    if absent is not None and code == "exact_too_large":
        # the message says what helps, and nothing less does
        (said,) = re.findall(r"diagnostics_every (\d+) or more", absent.message)
        assert unmeasured(facts, learns, int(said) - 1) is not None
        assert unmeasured(facts, learns, int(said)) is None


def test_the_share_of_saturated_actions() -> None:
    world = GymnasiumSpec(id="Pendulum-v1", max_episode_steps=20)
    policy = pgengine.create_policy(pgengine.LinearPolicySpec(), world, pgengine.describe(world), seed=0)
    policy.parameters["log_sigma"][:] = math.log(4.0)
    batch = rollout(policy, pgengine.open_environment(world), Noise(0, "training", 0), 10)
    assert saturated_fraction(policy, batch) == pytest.approx(np.mean(np.abs(batch.samples) >= 2.0))
    assert 0.3 < np.mean(np.abs(batch.samples) >= 2.0) < 0.9
    discrete = random_mdp(0)
    none = rollout(table_policy(discrete), pgengine.open_environment(discrete), Noise(0, "training", 0), 2)
    assert saturated_fraction(table_policy(discrete), none) is None


def test_the_interval_of_the_mean_return_is_students() -> None:
    figures = return_figures(np.array([1.0, 2.0, 4.0]))
    half = 4.30265 * math.sqrt(7 / 3) / math.sqrt(3)
    assert figures["mean_return"] == pytest.approx(7 / 3)
    assert figures["return_deviation"] == pytest.approx(math.sqrt(14 / 9))
    assert (figures["return_low"], figures["return_high"]) == pytest.approx((7 / 3 - half, 7 / 3 + half), rel=1e-4)
    assert return_figures(np.array([1.0])) == {"mean_return": 1.0, "return_deviation": 0.0}


def test_groups_are_parts_of_the_batch() -> None:
    world = random_mdp(0, horizon=5)
    batch = rollout(table_policy(world), pgengine.open_environment(world), Noise(0, "training", 0), 7)
    parts: list[Batch] = [batch.episodes(0, 3), batch.episodes(3, 7)]
    for name in ("observations", "rewards", "log_probs", "terminated", "final_observations"):
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(batch, name))
    assert [list(part.lengths) for part in parts] == [list(batch.lengths[:3]), list(batch.lengths[3:])]
    assert parts[1].offsets[0] == 0
