"""An explained update is what happened: its contributions sum to the estimate, its step is the real one to the bit."""

import json
import math
from typing import Any

import numpy as np
import pytest

import pgengine
from pgengine.contributions import Rows, contributions
from pgengine.spec import LinearPolicySpec, LqrSpec, StopSpec, TrainingSpec
from tests.engine.worlds import CARTPOLE, PENDULUM, bandit, random_mdp, table_policy
from tests.server import careless_environments  # noqa: F401  registers environments

MDP = random_mdp(0, horizon=4)
SGD = {"kind": "sgd", "learning_rate": 0.5}
LINEAR = {"kind": "linear"}


def run(environment: Any = MDP, policy: Any = LINEAR, seed: int = 3, **algorithm: Any) -> TrainingSpec:
    return TrainingSpec.model_validate(
        {
            "environment": environment,
            "policy": policy,
            "algorithm": {"trajectories": 4, **algorithm},
            "stop": {"updates": 4, "target_return": None},
            "seed": seed,
        }
    )


RUNS = {
    "sgd": run(optimizer=SGD),
    "adam": run(gamma=0.9),
    "total return": run(credit="total_return", gamma=0.9, optimizer=SGD),
    "own steps, batch mean": run(mean_over="own_steps", baseline={"kind": "batch_mean"}),
    "moving average": run(baseline={"kind": "moving_average"}, optimizer=SGD),
    "linear value": run(baseline={"kind": "linear_value"}),
    "mixture": run(importance={"kind": "per_decision", "behaviour": {"kind": "mixture", "epsilon": 0.5}}),
    "older": run(importance={"kind": "trajectory", "behaviour": {"kind": "older", "refresh_every": 3}}, optimizer=SGD),
    "entropy": run(gamma=0.9, entropy={"coefficient": 0.4}, optimizer=SGD),
    "bonus": run(entropy={"coefficient": 0.4, "as": "bonus"}),
    "batch used twice": run(steps_per_batch=2),
    "moving": run(trajectories=1, within_episode="moving", baseline={"kind": "none"}, optimizer=SGD),
    "termination": run(gamma=0.8, discount="termination"),
    "falling steps": run(optimizer={**SGD, "schedule": {"kind": "inverse_time", "scale": 1.0}}),
    "gaussian": run(PENDULUM, LINEAR, trajectories=2),
    "cartpole": run(CARTPOLE, {"kind": "mlp", "hidden": [8]}, trajectories=2),
    "score": run(CARTPOLE, {"kind": "score", "hidden": [4]}, trajectories=2),
    "memory": run(CARTPOLE, {"kind": "transformer", "window": 3, "width": 4}, trajectories=2),
    "normalised head": run(
        PENDULUM,
        {
            "kind": "mlp",
            "hidden": [4],
            "normalise_observations": True,
            "distribution": {"kind": "gaussian", "sigma": "head", "action_map": "tanh"},
        },
        trajectories=2,
    ),
}


def flat(vectors: dict[str, Any] | None) -> np.ndarray:
    assert vectors is not None
    return np.concatenate([np.ravel(vectors[name]) for name in sorted(vectors)])


@pytest.mark.parametrize("name", RUNS)
def test_contributions_sum_to_the_estimate_and_the_step_is_the_real_one(name: str) -> None:
    spec = RUNS[name]
    made = [update.policy.copy() for update in pgengine.train(spec)]
    for number in (1, 3):
        worked = pgengine.explain(spec, number, max_steps=10_000)
        estimate = flat(worked.estimate)
        assert np.linalg.norm(estimate) == pytest.approx(worked.estimate_norm, rel=1e-12)
        # a moving step is made of 32-bit parameters, all else in 64 bits
        tolerance = 1e-5 if name == "moving" else 1e-9
        assert worked.sum_of_contributions_norm == pytest.approx(worked.estimate_norm, rel=tolerance)
        steps = [step for episode in worked.episodes for step in episode.steps]
        assert len(steps) == worked.steps_total
        if steps[0].contribution is not None:
            total = np.sum([step.contribution for step in steps], axis=0)
            assert total == pytest.approx(estimate, rel=tolerance, abs=tolerance * worked.estimate_norm)
        begin = (
            pgengine.create_policy(spec.policy, spec.environment, pgengine.describe(spec.environment), seed=spec.seed)
            if number == 1
            else made[number - 2]
        )
        before, after = flat(begin.parameters), flat(made[number - 1].parameters)
        assert np.array_equal(flat(worked.step.parameters), after.astype(np.float64) - before)
        assert worked.step.norm == pytest.approx(float(np.linalg.norm(flat(worked.step.parameters))), rel=1e-12)
        assert worked.estimate_norm > 0.0


def test_a_step_of_sgd_is_the_rate_times_the_estimate() -> None:
    for number in (1, 4):
        worked = pgengine.explain(RUNS["falling steps"], number)
        assert worked.step.learning_rate == pytest.approx(0.5 / number)
        assert flat(worked.step.parameters) == pytest.approx(
            worked.step.learning_rate * flat(worked.estimate), abs=1e-6
        )


def test_the_first_step_of_adam_has_the_sign_of_the_estimate() -> None:
    worked = pgengine.explain(RUNS["adam"], 1)
    estimate, step = flat(worked.estimate), flat(worked.step.parameters)
    assert step[estimate != 0.0] == pytest.approx(0.01 * np.sign(estimate[estimate != 0.0]), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adam", "moving average", "older", "batch used twice", "gaussian"])
def test_an_explanation_from_a_state_is_that_from_the_beginning(name: str) -> None:
    spec = RUNS[name]
    states = [update.state() for update in pgengine.train(spec)]
    for number in (2, 4):
        from_state = pgengine.explain(spec, number, resume_from=states[number - 2])
        assert from_state == pgengine.explain(spec, number)


def test_the_figures_of_each_step_are_those_of_the_definition() -> None:
    worked = pgengine.explain(run(gamma=0.9, optimizer=SGD), 2)
    policy = None
    for update in pgengine.train(run(gamma=0.9, optimizer=SGD)):
        policy = update.policy.copy()
        if update.updates == 1:
            break
    assert policy is not None
    assert (worked.update, worked.policy_updates, worked.episodes_total) == (2, 1, 4)
    for episode in worked.episodes:
        rewards = [step.reward for step in episode.steps]
        assert episode.total_return == pytest.approx(sum(rewards))
        assert episode.length == len(episode.steps)
        for step in episode.steps:
            t = step.time
            to_go = sum(0.9 ** (k - t) * rewards[k] for k in range(t, len(rewards)))
            others = [
                sum(0.9 ** (k - t) * s.reward for k, s in enumerate(other.steps) if k >= t)
                for other in worked.episodes
                if other is not episode
            ]
            assert step.return_to_go == pytest.approx(to_go)
            assert step.credit == pytest.approx(to_go)
            assert step.baseline == pytest.approx(sum(others) / 3)
            assert step.weight == pytest.approx(0.9**t * (step.credit - step.baseline) / 4)
            pi = policy.answer(np.array([step.observation])).probabilities[0]
            score = np.zeros((3, 2))
            score[step.observation] = np.eye(2)[step.action] - pi
            assert step.log_prob == pytest.approx(math.log(pi[step.action]), rel=1e-5)
            assert step.score_norm == pytest.approx(np.linalg.norm(score), rel=1e-5)
            assert step.contribution == pytest.approx((step.weight * score).ravel(), rel=1e-5, abs=1e-9)
            assert step.contribution_norm == pytest.approx(abs(step.weight) * step.score_norm, rel=1e-9)
            assert step.ratio is None
            assert step.entropy_weight is None


def test_entropy_and_ratios_are_named() -> None:
    with_entropy = pgengine.explain(RUNS["entropy"], 2).episodes[0].steps
    assert [step.entropy_weight for step in with_entropy] == pytest.approx(
        [0.9**step.time * 0.4 / 4 for step in with_entropy]
    )
    assert any(step.entropy_contribution_norm or 0.0 for step in with_entropy)
    weighted = [step for episode in pgengine.explain(RUNS["mixture"], 2).episodes for step in episode.steps]
    assert all(step.ratio is not None and 0.0 < step.ratio <= 2.0**4 for step in weighted)  # 1 / (1 - epsilon) a step
    assert any(step.ratio != 1.0 for step in weighted)


def test_moving_contributions_are_those_of_parameters_that_move() -> None:
    spec = RUNS["moving"]
    for update in pgengine.train(spec.model_copy(update={"stop": StopSpec(updates=1, target_return=None)})):
        record = update.record
        weights = record.weighed.weights
        rows = Rows(record.before, record.batch)
        moving = np.concatenate([c.weighted for c in contributions(rows, weights.score, weights.entropy, moving=0.5)])
        still = np.concatenate([c.weighted for c in contributions(rows, weights.score, weights.entropy)])
        assert len(moving) > 1
        assert np.array_equal(moving[0], still[0])
        assert not np.allclose(moving[1:], still[1:])


def test_exact_figures_stand_beside_the_estimate_of_a_finite_mdp() -> None:
    spec = run(gamma=0.9)
    policy = table_policy(MDP)
    worked = pgengine.explain(spec, 1, policy=policy)
    environment = pgengine.open_environment(MDP)
    assert worked.expected_return == pytest.approx(pgengine.exact_return(policy, environment, gamma=0.9))
    exact = np.linalg.norm(np.asarray(pgengine.exact_gradient(policy, environment, gamma=0.9)))
    assert worked.exact_gradient_norm == pytest.approx(exact)
    assert pgengine.explain(RUNS["cartpole"], 1).exact_gradient_norm is None


def test_episodes_and_steps_are_cut_as_asked() -> None:
    worked = pgengine.explain(RUNS["adam"], 1, first_episode=1, episodes=2)
    whole = pgengine.explain(RUNS["adam"], 1)
    assert worked.episodes == whole.episodes[1:3]
    few = pgengine.explain(RUNS["cartpole"], 1, max_steps=5)
    assert [len(episode.steps) for episode in few.episodes] == [5]
    assert few.episodes[0].length > 5
    assert few.steps_total > 5
    longest = pgengine.explain(RUNS["cartpole"], 1, max_steps=10_000)
    assert few.episodes[0].contribution_norm == longest.episodes[0].contribution_norm


def test_large_policies_are_explained_by_norms() -> None:
    worked = pgengine.explain(run(CARTPOLE, {"kind": "mlp"}, trajectories=2), 1)
    assert (worked.estimate, worked.step.parameters) == (None, None)
    assert worked.episodes[0].steps[0].contribution is None
    assert worked.sum_of_contributions_norm == pytest.approx(worked.estimate_norm, rel=1e-9)


def test_updates_are_counted_on_from_the_policy_that_is_given() -> None:
    spec = run()
    first = list(pgengine.train(spec))[-1].policy
    second = list(pgengine.train(spec, policy=first))
    worked = pgengine.explain(spec, 6, policy=first)
    assert (worked.update, worked.policy_updates) == (6, 5)
    assert second[-1].updates == 8
    with pytest.raises(pgengine.SpecError, match="from 5 on"):
        pgengine.explain(spec, 4, policy=first)


@pytest.mark.parametrize(("update", "message"), [(0, "from 1 on"), (5, "ends with update 4")])
def test_an_update_that_the_run_never_had_is_refused(update: int, message: str) -> None:
    with pytest.raises(pgengine.SpecError, match=message) as refused:
        pgengine.explain(RUNS["adam"], update)
    assert (refused.value.pointer, refused.value.code) == ("/update", "no_such_update")


def test_a_run_without_a_limit_has_the_default_one() -> None:
    spec = RUNS["adam"].model_copy(update={"stop": StopSpec()})
    with pytest.raises(pgengine.SpecError, match="ends with update 500"):
        pgengine.explain(spec, 501)


def test_a_batch_that_was_not_learned_from_makes_no_step() -> None:
    """With a floor of the effective sample size that ratios of an unlike policy cannot reach."""
    importance = {"kind": "trajectory", "behaviour": {"kind": "policy"}, "minimum_effective_sample_size": 0.999}
    spec = run(trajectories=16, importance=importance, optimizer=SGD)
    worked = pgengine.explain(spec, 1, behaviour=table_policy(MDP))
    assert worked.estimate_norm > 0.0
    assert worked.step.norm == 0.0
    with pytest.raises(pgengine.SpecError, match="ended before update 2"):
        pgengine.explain(spec, 2, behaviour=table_policy(MDP))


def test_states_that_do_not_lead_to_the_update_are_refused() -> None:
    spec = RUNS["adam"]
    states = [update.state() for update in pgengine.train(spec)]
    with pytest.raises(pgengine.SpecError, match="from 4 on"):
        pgengine.explain(spec, 3, resume_from=states[2])
    with pytest.raises(pgengine.SpecError, match="ended with update 4"):
        pgengine.explain(spec, 5, resume_from=states[3])
    with pytest.raises(pgengine.CheckpointError):
        pgengine.explain(RUNS["sgd"], 3, resume_from=states[0])
    with pytest.raises(pgengine.CheckpointError):
        pgengine.explain(spec, 3, resume_from=b"nothing")


def test_an_episode_that_does_not_exist_is_refused() -> None:
    with pytest.raises(pgengine.SpecError) as refused:
        pgengine.explain(RUNS["adam"], 1, first_episode=4)
    assert (refused.value.pointer, refused.value.code) == ("/first_episode", "no_such_episode")


@pytest.mark.parametrize("asked", [{"episodes": 0}, {"episodes": -3}, {"max_steps": 0}])
def test_nothing_to_show_is_refused(asked: dict[str, int]) -> None:
    with pytest.raises(pgengine.SpecError) as refused:
        pgengine.explain(RUNS["adam"], 1, **asked)  # type: ignore[arg-type]
    assert (refused.value.pointer, refused.value.code) == (f"/{next(iter(asked))}", "greater_than_equal")


def test_an_exact_figure_beyond_every_float_is_left_out() -> None:
    """Rewards of 1e300: weights over their deviation are of size 1, the exact gradient's norm fits in no float."""
    worked = pgengine.explain(run(bandit(1e300, -1e300), trajectories=2, standardise="batch"), 1)
    assert worked.exact_gradient_norm is None
    assert worked.estimate_norm < 10.0


def test_figures_beyond_every_float_raise() -> None:
    """Rewards of 1e300 end the run; a density without end ends the explanation of a batch that no step was made of."""
    with pytest.raises(pgengine.DivergedError):
        pgengine.explain(run(bandit(1e300, -1e300), optimizer=SGD), 1)
    lqr = LqrSpec(
        dynamics=[[0.9]], control=[[1.0]], state_cost=[[1.0]], action_cost=[[0.1]], initial_mean=[1.0], horizon=3
    )
    acts = pgengine.create_policy(LinearPolicySpec(), lqr, pgengine.describe(lqr), seed=0)
    narrow = {"kind": "linear", "initial_parameters": {"log_sigma": [-1000.0]}}
    spec = run(lqr, narrow, importance={"kind": "trajectory", "behaviour": {"kind": "policy"}})
    with pytest.raises(pgengine.DivergedError):
        pgengine.explain(spec, 1, behaviour=acts)


# --- compared with what was recorded


def recorded_of(spec: TrainingSpec) -> pgengine.Recorded:
    """What a run measures, as a server keeps it."""
    metrics: dict[int, dict[str, float | None]] = {
        update.updates: {
            name: value if math.isfinite(value) else None
            for name, value in json.loads(json.dumps(update.metrics)).items()
        }
        for update in pgengine.train(spec)
    }
    return pgengine.Recorded(metrics, pgengine.runtime_fingerprint())


@pytest.mark.parametrize("name", sorted(RUNS))
def test_a_replay_measures_what_the_run_has_measured(name: str) -> None:
    spec = RUNS[name]
    recorded = recorded_of(spec)
    assert len(recorded.metrics) == 4
    for update in (1, 4):
        assert pgengine.explain(spec, update, recorded=recorded, episodes=1).update == update


def changed(recorded: pgengine.Recorded, update: int, factor: float, **runtime: Any) -> pgengine.Recorded:
    """The record with another gradient norm, as if it came from elsewhere."""
    assert recorded.runtime is not None
    figures = dict(recorded.metrics[update])
    figures["gradient_norm"] = factor * (figures["gradient_norm"] or 0.0)
    return pgengine.Recorded({**recorded.metrics, update: figures}, {**recorded.runtime, **runtime})


def test_a_replay_that_differs_says_where_and_in_what() -> None:
    spec = RUNS["sgd"]
    recorded = recorded_of(spec)
    with pytest.raises(pgengine.ReplayDiffers) as caught:
        pgengine.explain(spec, 4, recorded=changed(recorded, 2, 1.00001))
    assert (caught.value.update, list(caught.value.figures), caught.value.runtime) == (2, ["gradient_norm"], [])
    then, now = caught.value.figures["gradient_norm"]
    assert then == pytest.approx(1.00001 * now, rel=1e-9)
    assert "random numbers that do not come from its seed" in str(caught.value)
    # an update behind the one that is explained is not made again
    pgengine.explain(spec, 1, recorded=changed(recorded, 2, 1.00001))


def test_another_runtime_may_round_otherwise_and_is_named_where_more_differs() -> None:
    spec = RUNS["sgd"]
    recorded = recorded_of(spec)
    pgengine.explain(spec, 2, recorded=changed(recorded, 2, 1.00001, threads=63))
    with pytest.raises(pgengine.ReplayDiffers, match="threads: 63 then, ") as caught:
        pgengine.explain(spec, 2, recorded=changed(recorded, 2, 1.5, threads=63))
    assert len(caught.value.runtime) == 1


@pytest.mark.parametrize("environment_id", ["test/GlobalNumpy-v0", "test/GlobalPython-v0"])
def test_an_environment_that_draws_numbers_of_its_own_is_found_out(environment_id: str) -> None:
    spec = run({"kind": "gymnasium", "id": environment_id})
    recorded = recorded_of(spec)
    with pytest.raises(pgengine.ReplayDiffers) as caught:
        pgengine.explain(spec, 2, recorded=recorded)
    assert caught.value.update == 1
    assert {"mean_return", "gradient_norm"} <= caught.value.figures.keys()


def test_an_explanation_survives_json() -> None:
    worked = pgengine.explain(RUNS["gaussian"], 1, max_steps=10)
    assert pgengine.Explanation.model_validate_json(worked.model_dump_json()) == worked
