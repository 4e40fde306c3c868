"""One update against formulas written by hand, and what a run remembers, proves and refuses."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import pgengine
from pgengine.estimation import ROWS_AT_ONCE
from pgengine.estimators import BatchRows, step_weights
from pgengine.evaluation import SELECTION_ERROR, select
from pgengine.exact import log_policy, parameters_in_double
from pgengine.intervals import ReturnRange
from pgengine.noise import Noise
from pgengine.policies import Policy
from pgengine.rollout import Batch, rollout
from pgengine.spec import (
    AdaGradSpec,
    AdamSpec,
    AlgorithmSpec,
    GymnasiumSpec,
    NoBaselineSpec,
    SgdSpec,
    StopSpec,
    TabularSpec,
    TrainingSpec,
)
from pgengine.training import SELECTION_PAUSE
from tests.engine.worlds import Played, bandit, paying, random_mdp, table_policy

Trained = list[pgengine.Update]


def batch_of(spec: TrainingSpec, policy: Policy) -> Batch:
    """The batch that the next update of a policy will see."""
    noise = Noise(spec.seed, "training", policy.updates)
    return rollout(policy, pgengine.open_environment(spec.environment), noise, spec.algorithm.trajectories)


def estimate(spec: TrainingSpec, policy: Policy) -> np.ndarray:
    """The estimate of the gradient by theta, in double precision and in one piece."""
    batch = batch_of(spec, policy)
    algorithm = pgengine.resolve(spec, pgengine.describe(spec.environment)).algorithm
    theta = parameters_in_double(policy)
    log_pi = log_policy(policy, theta)[batch.observations, batch.samples]
    weights = torch.as_tensor(step_weights(BatchRows(batch.rewards, batch.offsets), algorithm).score)
    (gradient,) = torch.autograd.grad((weights * log_pi).sum(), list(theta.values()))
    return gradient.numpy()


# --- one update -------------------------------------------------------------------------------------------------------


def test_every_row_of_a_batch_larger_than_one_chunk_counts() -> None:
    world = random_mdp(2, A=3, horizon=61, terminal=False)
    algorithm = AlgorithmSpec(gamma=0.9, trajectories=301, optimizer=SgdSpec(learning_rate=1.0))
    spec = TrainingSpec(environment=world, algorithm=algorithm, stop=StopSpec(updates=1), seed=8)
    policy = table_policy(world)
    assert 2 * ROWS_AT_ONCE < len(batch_of(spec, policy).rewards) < 3 * ROWS_AT_ONCE
    (update,) = pgengine.train(spec, policy=policy)
    step = update.policy.parameters["theta"].astype(np.float64) - policy.parameters["theta"]
    assert np.allclose(step, estimate(spec, policy), atol=1e-5)


@pytest.mark.parametrize("trajectories", [3, 8, 301])
def test_the_entropy_of_a_softmax_is_the_mean_over_the_rows_alone(trajectories: int) -> None:
    world = random_mdp(2, A=3, horizon=61, terminal=False)
    policy = table_policy(world, seed=4)
    algorithm = AlgorithmSpec(trajectories=trajectories)
    spec = TrainingSpec(environment=world, algorithm=algorithm, stop=StopSpec(updates=1))
    (update,) = pgengine.train(spec, policy=policy)
    p = np.exp(log_policy(policy, parameters_in_double(policy)).detach().numpy())
    entropies = -(p * np.log(p)).sum(axis=1)
    expected = float(entropies[batch_of(spec, policy).observations].mean())
    assert 0 < entropies.min() < entropies.max() - 0.1
    assert update.metrics["entropy"] == pytest.approx(expected, rel=1e-5)


def test_the_entropy_of_a_gaussian_is_that_of_one_row() -> None:
    world = GymnasiumSpec(id="Pendulum-v1", max_episode_steps=5)
    spec = TrainingSpec(environment=world, algorithm=AlgorithmSpec(trajectories=3), stop=StopSpec(updates=1))
    policy = pgengine.create_policy(spec.policy, world, pgengine.describe(world), seed=0)
    policy.parameters["log_sigma"][:] = -3.0
    (update,) = pgengine.train(spec, policy=policy)
    assert update.metrics["entropy"] == pytest.approx(-3.0 + 0.5 * math.log(2 * math.pi * math.e), rel=1e-5)


def steps(optimizer: SgdSpec | AdaGradSpec | AdamSpec) -> list[tuple[np.ndarray, np.ndarray]]:
    """(estimate, change of theta) of each of three updates."""
    world = random_mdp(2, A=3, horizon=5)
    algorithm = AlgorithmSpec(trajectories=30, optimizer=optimizer)
    spec = TrainingSpec(environment=world, algorithm=algorithm, stop=StopSpec(updates=3), seed=8)
    before, found = table_policy(world), []
    for update in pgengine.train(spec, policy=before):
        after = update.policy.copy()
        change = after.parameters["theta"].astype(np.float64) - before.parameters["theta"]
        found.append((estimate(spec, before), change))
        before = after
    return found


def test_sgd_is_its_formula() -> None:
    for g, change in steps(SgdSpec(learning_rate=0.3)):
        assert np.allclose(change, 0.3 * g, atol=1e-6)


def test_adagrad_is_its_formula() -> None:
    squares = np.zeros(1)
    for g, change in steps(AdaGradSpec(learning_rate=0.3)):
        squares = squares + g**2
        moved = g != 0  # a terminal state is never left
        assert np.allclose(change[moved], (0.3 * g / np.sqrt(squares + 1e-300))[moved], atol=1e-5)


def test_adam_is_its_formula() -> None:
    b1, b2, epsilon = 0.6, 0.7, 0.05
    m, v = np.zeros(1), np.zeros(1)
    for t, (g, change) in enumerate(steps(AdamSpec(learning_rate=0.3, beta1=b1, beta2=b2, epsilon=epsilon)), start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        expected = 0.3 * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + epsilon)
        assert np.allclose(change, expected, atol=1e-5)


# --- what a run remembers ---------------------------------------------------------------------------------------------


def coin(target: float | None, updates: int = 60) -> TrainingSpec:
    """Heads pays one; the policy hardly moves, and a batch of two is often lucky."""
    return TrainingSpec(
        environment=bandit(0.0, 1.0),
        algorithm=AlgorithmSpec(trajectories=2, optimizer=SgdSpec(learning_rate=1e-9)),
        stop=StopSpec(updates=updates, target_return=target),
    )


def told(update: pgengine.Update) -> tuple[object, ...]:
    """Everything that does not depend on the clock."""
    clock = ("seconds", "per_second")
    metrics = {name: value for name, value in update.metrics.items() if not name.endswith(clock)}
    return update.updates, metrics, update.progress.model_copy(update={"seconds": 0.0}), update.selection


def test_a_resumed_run_has_the_counters_and_evaluations_of_an_undisturbed_one() -> None:
    spec = coin(target=0.9, updates=40)
    undisturbed = [(told(update), update.progress, update.state()) for update in pgengine.train(spec)]
    evaluated = [at for at, (known, _, _) in enumerate(undisturbed) if known[3] is not None]
    assert len(evaluated) >= 3
    for at in evaluated:
        _, progress, state = undisturbed[at]
        resumed = [(told(update), update.progress) for update in pgengine.train(spec, resume_from=state)]
        assert [known for known, _ in resumed] == [known for known, _, _ in undisturbed[at + 1 :]]
        seconds = [progress.seconds, *(later.seconds for _, later in resumed)]
        assert all(a < b for a, b in zip(seconds[:-1], seconds[1:], strict=True))


def test_progress_counts_what_was_played() -> None:
    world = random_mdp(2, horizon=5)
    spec = TrainingSpec(environment=world, algorithm=AlgorithmSpec(trajectories=7), stop=StopSpec(updates=4))
    policy, env_steps = table_policy(world), 0
    for n, update in enumerate(pgengine.train(spec, policy=policy), start=1):
        batch = batch_of(spec, policy)
        env_steps += len(batch.rewards)
        policy = update.policy.copy()
        progress = update.progress
        assert (progress.updates, progress.episodes, progress.env_steps) == (n, 7 * n, env_steps)
        assert progress.fraction == n / 4
        assert update.metrics["mean_return"] == pytest.approx(batch.rewards.sum() / 7)


@pytest.mark.parametrize("target", [-1.0, 0.9])
def test_a_finished_run_gives_its_figures_again(target: float) -> None:
    last = list(pgengine.train(coin(target, updates=8)))[-1]
    assert (last.stopped_by == "target_return") == (target == -1.0) == (last.selection is not None)
    (again,) = pgengine.train(coin(target, updates=8), resume_from=last.state())
    assert (again.metrics, again.selection, again.progress) == (last.metrics, last.selection, last.progress)


# --- what a run proves ------------------------------------------------------------------------------------------------


def stopped(world: pgengine.EpisodeEnvironment, target: float, seed: int, updates: int = 100) -> pgengine.Update:
    """Last update of a run whose policy stays as it is."""
    spec = TrainingSpec(
        environment=paying(1.0),  # not asked for: the world is given
        policy={"kind": "linear"},  # type: ignore[arg-type]
        algorithm=AlgorithmSpec(trajectories=2, optimizer=SgdSpec(learning_rate=1e-30)),
        stop=StopSpec(updates=updates, target_return=target),
        diagnostics_every=0,
        seed=seed,
    )
    return list(pgengine.train(spec, environment=world))[-1]


ZERO_OR_ONE = ReturnRange(low=0.0, high=1.0)


@pytest.mark.parametrize(("chance", "reached"), [(0.98, False), (0.99, True)])
def test_where_the_model_is_known_a_target_is_compared_with_the_mean_itself(chance: float, reached: bool) -> None:
    """Both arms pay 1 with that probability; 100 fresh episodes are often all alike."""
    last = stopped(pgengine.TabularMDP(paying(chance, chance)), 0.99, seed=0)
    assert (last.stopped_by == "target_return") == reached
    if reached:
        assert last.selection is not None
        assert (last.selection.method, last.selection.is_proven, last.selection.episodes) == ("exact", True, 0)
        assert last.selection.lower_bound == last.selection.mean_return == pytest.approx(0.99, abs=1e-12)


@pytest.mark.slow
def test_rare_failures_do_not_pass_for_a_target_where_the_range_is_known() -> None:
    """Null: a world that pays 1 with probability 0.98 is stopped at a target of 0.99 in at most 5% of runs.

    It is held fixed. Of 25 runs, more than 10 have a probability below 1e-6. With Student's t all of them stop.
    """
    world = Played(paying(0.98, 0.98), return_range=ZERO_OR_ONE)
    ends = [stopped(world, 0.99, seed) for seed in range(25)]
    assert sum(end.stopped_by == "target_return" for end in ends) <= 10
    assert all(end.selection is None or end.selection.is_proven for end in ends)


def test_where_nothing_is_known_of_the_range_a_target_is_not_called_proven() -> None:
    last = stopped(Played(paying(0.98, 0.98)), 0.99, seed=0)
    assert last.stopped_by == "target_return"
    assert last.selection is not None
    assert (last.selection.method, last.selection.is_proven) == ("t", False)


def test_a_discount_by_termination_has_a_range_of_its_own() -> None:
    """Two steps pay 1 each at the end alone, so that whole episodes pay 2 and those that end early less."""
    world = TabularSpec(
        transitions=[[[0.0, 1.0, 0.0]], [[0.0, 0.0, 1.0]], [[0.0, 0.0, 1.0]]],
        rewards=[[-1.0], [3.0], [0.0]],
        initial=[1.0, 0.0, 0.0],
        terminal=[2],
        horizon=2,
    )
    facts = pgengine.describe(world)
    assert facts.return_range == ReturnRange(low=2.0, high=2.0, two_values=True)
    assert facts.cut_return_range == ReturnRange(low=-1.0, high=2.0, two_values=True)
    policy = table_policy(world)
    assert pgengine.evaluate(policy, world, episodes=10).method == "exact"
    half = pgengine.evaluate(policy, world, episodes=100, survival=0.5)
    assert (half.method, half.exact_mean_return) == ("clopper_pearson", pytest.approx(0.5))
    played = Played(world, return_range=facts.return_range, cut_return_range=facts.cut_return_range)
    selection = select(played, policy, target=None, error=0.05, episodes=100, seed=0, survival=0.5)
    assert selection.method == "betting"
    assert selection.lower_bound < 0.5


def test_a_look_is_as_long_again_where_it_is_not_decided() -> None:
    """All returns are 1: at 0.97 a hundred of them are not enough for the error of the fifth look, two hundred are."""
    world, policy = Played(bandit(1.0, 1.0), return_range=ZERO_OR_ONE), table_policy(bandit(1.0, 1.0))
    for target, error, episodes, reached in (
        (0.95, 0.025, 100, True),  # 475 of 500 at the first look
        (0.95, 0.05 / 6, 200, True),
        (0.97, 0.05 / 30, 200, False),
        (1.1, 0.025, 100, False),
    ):
        selection = select(world, policy, target=target, error=error, episodes=100, seed=0)
        assert (selection.episodes, selection.lower_bound >= target) == (episodes, reached)


def test_the_error_is_shared_out_over_the_looks() -> None:
    world = Played(paying(0.5, 0.5), return_range=ZERO_OR_ONE)
    spec = coin(target=0.9)
    looks = [update.selection for update in pgengine.train(spec, environment=world) if update.selection is not None]
    assert len(looks) >= 3
    assert [look.error for look in looks] == [SELECTION_ERROR / (i * (i + 1)) for i in range(1, len(looks) + 1)]


def test_after_a_miss_some_updates_pass_without_a_look() -> None:
    collected = list(pgengine.train(coin(target=0.9)))
    looked = [update.updates for update in collected if update.selection is not None]
    assert np.diff(looked).min() == SELECTION_PAUSE
    assert all(update.metrics["mean_return"] >= 0.9 for update in collected if update.selection is not None)


def test_episodes_that_select_a_policy_are_not_those_that_report_it() -> None:
    world: TabularSpec = random_mdp(1, horizon=4)
    spec = TrainingSpec(environment=world, stop=StopSpec(updates=5, target_return=-100.0), seed=9)
    (update,) = pgengine.train(spec, environment=Played(world))
    assert update.selection is not None
    selected = rollout(update.policy, pgengine.open_environment(world), Noise(9, "selection", 1), 100)
    report = pgengine.evaluate(update.policy, world, episodes=100, seed=9)
    assert update.selection.mean_return == pytest.approx(selected.returns.mean(), abs=1e-12)
    assert update.selection.mean_return != pytest.approx(report.mean_return, abs=1e-9)


# --- what a run refuses -----------------------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_is_divergence() -> None:
    algorithm = AlgorithmSpec(baseline=NoBaselineSpec(), optimizer=SgdSpec(learning_rate=1e-6))
    spec = TrainingSpec(environment=bandit(0.0, 1e300), algorithm=algorithm, seed=4)
    with pytest.raises(pgengine.DivergedError, match=r"the gradient is not finite in update 1 \(seed 4\)") as error:
        next(pgengine.train(spec))
    assert (error.value.update, error.value.seed) == (1, 4)


def test_a_parameter_that_is_not_finite_is_divergence() -> None:
    """The first step makes the policy certain; the gradient is zero then, but Adam divides momentum by epsilon."""
    optimizer = AdamSpec(learning_rate=1e6, beta2=0.0, epsilon=1e-30)
    spec = TrainingSpec(
        environment=bandit(0.0, 1e6),
        policy={"kind": "linear"},  # type: ignore[arg-type]
        algorithm=AlgorithmSpec(optimizer=optimizer),
        seed=4,
    )
    run = pgengine.train(spec)
    assert next(run).metrics["gradient_norm"] > 0
    with pytest.raises(pgengine.DivergedError, match=r"the parameter theta is not finite in update 2 \(seed 4\)"):
        next(run)


def test_returns_whose_variance_is_beyond_every_float_are_divergence() -> None:
    world = bandit(1e200, 2e200)
    with pytest.raises(pgengine.DivergedError, match="variance of the returns"):
        pgengine.evaluate(table_policy(world), world, episodes=5)


def test_a_state_of_a_policy_whose_outputs_overflow_can_be_read() -> None:
    """Whoever goes on finds the divergence, not a file that is called damaged."""
    world = random_mdp(0)
    policy = table_policy(world)
    policy.parameters["theta"][0, 0] = np.nan
    assert np.isnan(pgengine.load(policy.to_bytes()).parameters["theta"][0, 0])


# --- what earlier versions have written -------------------------------------------------------------------------------

FIXTURES = Path(__file__).parent / "fixtures"


def test_a_run_of_the_first_version_goes_on() -> None:
    """State after 3 of 6 updates, its spec, and the policy with which that version ended."""
    spec = TrainingSpec.model_validate_json((FIXTURES / "training_spec_version_1.json").read_text())
    state = (FIXTURES / "state_version_1.safetensors").read_bytes()
    ended = pgengine.load((FIXTURES / "policy_after_version_1.safetensors").read_bytes())
    updates = list(pgengine.train(spec, resume_from=state))
    assert [update.updates for update in updates] == [4, 5, 6]
    assert np.allclose(updates[-1].policy.parameters["theta"], ended.parameters["theta"], atol=1e-6)
