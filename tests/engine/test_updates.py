"""Updates that are more than one fresh batch and one step: who acts, batches used again, parameters that move."""

import numpy as np
import pytest

import pgengine
from pgengine.estimation import Estimator, gradient
from pgengine.noise import Noise
from pgengine.policies import Policy
from pgengine.rollout import rollout
from pgengine.spec import AlgorithmSpec, GymnasiumSpec, LinearPolicySpec, StopSpec, TabularSpec, TrainingSpec
from tests.engine.worlds import CARTPOLE, algorithm, bandit, random_mdp, table_policy

WORLD = random_mdp(0, A=3, horizon=5)
SGD = {"kind": "sgd", "learning_rate": 0.5}


def spec(updates: int = 6, world: TabularSpec = WORLD, **settings: object) -> TrainingSpec:
    return TrainingSpec(
        environment=world,
        policy={"kind": "linear"},  # type: ignore[arg-type]
        algorithm={"optimizer": SGD, "trajectories": 6} | settings,  # type: ignore[arg-type]
        stop=StopSpec(updates=updates),
        seed=4,
    )


def trained(training: TrainingSpec, **where: object) -> list[tuple[bytes, dict[str, float], bytes]]:
    return [
        (update.policy.to_bytes(), dict(update.metrics), update.state())
        for update in pgengine.train(training, **where)  # type: ignore[arg-type]
    ]


REMEMBERING = [
    {"baseline": {"kind": "moving_average"}},
    {"baseline": {"kind": "linear_value"}},
    {"baseline": {"kind": "neural_value", "steps": 3}},
    {"importance": {"kind": "per_decision", "behaviour": {"kind": "older", "refresh_every": 4}}},
    {"importance": {"kind": "trajectory", "behaviour": {"kind": "mixture", "epsilon": 0.2}}},
    {"steps_per_batch": 3},
    {"steps_per_batch": 3, "importance": {"kind": "per_decision"}, "baseline": {"kind": "linear_value"}},
    {
        "entropy": {"coefficient": 0.1},
        "optimizer": {"kind": "adam", "schedule": {"kind": "inverse_time", "scale": 3.0}},
    },
    {"gamma": 0.8, "discount": "termination"},
    {"trajectories": 1, "baseline": {"kind": "none"}, "within_episode": "moving"},
]


@pytest.mark.parametrize("settings", REMEMBERING, ids=[str(list(s.items())[-1])[:60] for s in REMEMBERING])
def test_a_run_that_remembers_goes_on_to_the_bit(settings: dict[str, object]) -> None:
    training = spec(**settings)
    undisturbed = trained(training)
    assert len({data for data, _, _ in undisturbed}) == 6
    for at in (0, 1, 3, 4):
        resumed = trained(training, resume_from=undisturbed[at][2])
        assert [data for data, _, _ in resumed] == [data for data, _, _ in undisturbed[at + 1 :]]


# --- who acts ---------------------------------------------------------------------------------------------------------


def test_weights_of_one_give_the_same_bits() -> None:
    plain = trained(spec())
    for kind in ("trajectory", "per_decision"):
        if kind == "trajectory":
            plain_kind = trained(spec(credit="total_return"))
            weighted = trained(spec(credit="total_return", importance={"kind": kind}))
        else:
            plain_kind, weighted = plain, trained(spec(importance={"kind": kind}))
        assert [data for data, _, _ in weighted] == [data for data, _, _ in plain_kind]
        assert {metrics["effective_sample_size"] for _, metrics, _ in weighted} == {6.0}


def test_the_older_policy_acts_until_it_is_brought_up_to_date() -> None:
    importance = {"kind": "per_decision", "behaviour": {"kind": "older", "refresh_every": 3}}
    before = [pgengine.create_policy(spec().policy, WORLD, pgengine.describe(WORLD), seed=4)]
    for update in pgengine.train(spec(7, importance=importance)):
        batch = update.record.batch
        actor = before[(update.progress.updates - 1) // 3 * 3]
        outputs = actor.outputs(batch.observations)
        assert np.array_equal(batch.log_probs, actor.distribution.log_prob(actor.parameters, outputs, batch.samples))
        before.append(update.policy.copy())


def test_a_named_policy_acts_all_the_time() -> None:
    other = table_policy(WORLD, seed=9)
    importance = {"kind": "per_decision", "behaviour": {"kind": "policy"}}
    for update in pgengine.train(spec(3, importance=importance), behaviour=other):
        noise = Noise(4, "training", update.updates - 1)
        assert np.array_equal(
            update.record.batch.samples, rollout(other, pgengine.open_environment(WORLD), noise, 6).samples
        )
    with pytest.raises(pgengine.SpecError, match="behaviour"):
        next(pgengine.train(spec(3, importance=importance)))


def test_the_mixture_with_uniform_acts_and_its_ratio_is_bounded() -> None:
    start = table_policy(WORLD, seed=2)
    importance = {"kind": "per_decision", "behaviour": {"kind": "mixture", "epsilon": 0.3}}
    for update in pgengine.train(spec(5, importance=importance), policy=start):
        ratios = update.record.weighed.rows.log_ratios
        assert ratios is not None
        assert ratios.max() <= -np.log(0.7) + 1e-6
        assert ratios.min() < -1e-3


def test_a_batch_below_the_floor_is_not_learned_from_and_not_drawn_again() -> None:
    start, other = table_policy(WORLD, seed=0), table_policy(WORLD, seed=1)
    other.parameters["theta"] *= 6
    importance = {
        "kind": "trajectory",
        "behaviour": {"kind": "policy"},
        "minimum_effective_sample_size": 0.99,
    }
    training = spec(50, credit="total_return", importance=importance)
    (last,) = pgengine.train(training, policy=start, behaviour=other)
    assert last.stopped_by == "effective_sample_size"
    assert last.metrics["effective_sample_size"] < 0.99 * 6
    assert np.array_equal(last.policy.parameters["theta"], start.parameters["theta"])
    drawn = rollout(other, pgengine.open_environment(WORLD), Noise(4, "training", 0), 6)
    assert last.progress.env_steps == len(drawn.rewards), "one batch, drawn once"
    again = list(pgengine.train(training, policy=start, behaviour=other, resume_from=last.state()))
    assert [u.stopped_by for u in again] == ["effective_sample_size"]


def gaussian(**settings: object) -> tuple[TrainingSpec, Policy, Policy]:
    """A Gaussian policy that learns from what a copy does, and both."""
    environment = GymnasiumSpec(id="Pendulum-v1", max_episode_steps=3)
    facts = pgengine.describe(environment)
    learning, acting = (pgengine.create_policy(LinearPolicySpec(), environment, facts, seed=0) for _ in range(2))
    importance = {"kind": "per_decision", "behaviour": {"kind": "policy"}, "minimum_effective_sample_size": 0.0}
    training = TrainingSpec(
        environment=environment,
        policy=LinearPolicySpec(),
        algorithm={"importance": importance, "trajectories": 4, **settings},  # type: ignore[arg-type]
        stop=StopSpec(updates=3, target_return=None),
    )
    return training, learning, acting


def test_a_gaussian_ratio_of_infinite_variance_is_refused_before_anything_is_played() -> None:
    training, learning, acting = gaussian()
    learning.parameters["log_sigma"][:] = acting.parameters["log_sigma"] + np.log(1.4)
    assert len(list(pgengine.train(training, policy=learning, behaviour=acting))) == 3
    learning.parameters["log_sigma"][:] = acting.parameters["log_sigma"] + np.log(1.5)
    with pytest.raises(pgengine.SpecError) as refused:
        next(pgengine.train(training, policy=learning, behaviour=acting))
    assert (refused.value.pointer, refused.value.code) == (
        "/algorithm/importance/behaviour",
        "ratio_variance_unbounded",
    )


def test_a_gaussian_that_outgrows_the_acting_one_ends_the_run_whatever_the_floor() -> None:
    """Paying for entropy widens it: by about 0.1 in its logarithm in each update, from just below the bound."""
    entropy = {"coefficient": 100.0}
    training, learning, acting = gaussian(entropy=entropy, optimizer={"kind": "sgd", "learning_rate": 3e-4})
    learning.parameters["log_sigma"][:] = acting.parameters["log_sigma"] + np.log(1.41)
    updates = [(u.stopped_by, u.policy.to_bytes()) for u in pgengine.train(training, policy=learning, behaviour=acting)]
    assert [stopped_by for stopped_by, _ in updates] == [None, "ratio_variance"]


def test_a_run_goes_on_with_the_policy_that_acted_and_no_other() -> None:
    training, learning, acting = gaussian()
    state = next(pgengine.train(training, policy=learning, behaviour=acting)).state()
    assert len(list(pgengine.train(training, behaviour=acting, resume_from=state))) == 2
    other = acting.copy()
    other.parameters["theta"] += 0.1
    with pytest.raises(pgengine.CheckpointError, match="another policy acted"):
        next(pgengine.train(training, behaviour=other, resume_from=state))


def test_a_ratio_that_is_no_number_is_divergence() -> None:
    training, learning, acting = gaussian()
    importance = training.algorithm.importance.model_copy(update={"clip": 10.0})  # whose variance is finite
    algorithm = training.algorithm.model_copy(update={"importance": importance})
    training = training.model_copy(update={"algorithm": algorithm})
    for policy in (learning, acting):
        policy.parameters["log_sigma"][:] = -1000.0
    with pytest.raises(pgengine.DivergedError):
        next(pgengine.train(training, policy=learning, behaviour=acting))


# --- batches used again -----------------------------------------------------------------------------------------------


def test_a_batch_is_used_as_often_as_asked_for() -> None:
    found = [
        (update.record.batch.rewards.tobytes(), update.progress.env_steps, update.progress.episodes)
        for update in pgengine.train(spec(7, steps_per_batch=3))
    ]
    batches = [rewards for rewards, _, _ in found]
    assert batches[0] == batches[1] == batches[2] != batches[3] == batches[4] == batches[5] != batches[6]
    assert [episodes for _, _, episodes in found] == [6, 6, 6, 12, 12, 12, 18]
    assert found[0][1] == found[2][1] < found[3][1]


def test_an_older_policy_is_brought_up_to_date_with_new_batches_alone() -> None:
    importance = {"kind": "per_decision", "behaviour": {"kind": "older", "refresh_every": 3}}
    training = spec(8, steps_per_batch=2, importance=importance)
    acting = [pgengine.create_policy(training.policy, WORLD, pgengine.describe(WORLD), seed=4)]
    drawn_by = []
    for update in pgengine.train(training):
        batch = update.record.batch
        matches = [
            index
            for index, actor in enumerate(acting)
            if np.array_equal(
                batch.log_probs,
                actor.distribution.log_prob(actor.parameters, actor.outputs(batch.observations), batch.samples),
            )
        ]
        drawn_by.append(matches[0])
        acting.append(update.policy.copy())
    # new batches at updates 0, 2, 4, 6; three updates have passed at 4 and not before
    assert drawn_by == [0, 0, 0, 0, 4, 4, 4, 4]


# --- parameters that move within an episode ---------------------------------------------------------------------------


def one_episode(within_episode: str, rate: float, policy: Policy) -> np.ndarray:
    training = spec(
        1,
        trajectories=1,
        baseline={"kind": "none"},
        within_episode=within_episode,
        optimizer={"kind": "sgd", "learning_rate": rate},
    )
    (update,) = pgengine.train(training, policy=policy)
    return update.policy.parameters["theta"].astype(np.float64) - policy.parameters["theta"]


def test_moving_parameters_are_the_inner_loop_as_printed() -> None:
    """theta <- theta + alpha G_t grad log pi_theta(A_t|S_t), written by hand."""
    policy = table_policy(WORLD)
    batch = rollout(policy, pgengine.open_environment(WORLD), Noise(4, "training", 0), 1)
    theta = policy.parameters["theta"].astype(np.float64)
    G = np.cumsum(batch.rewards[::-1])[::-1]
    assert len(G) > 1
    for s, a, credit in zip(batch.observations, batch.samples, G, strict=True):
        pi = np.exp(theta[s]) / np.exp(theta[s]).sum()
        score = -pi
        score[a] += 1.0
        theta[s] += 0.3 * credit * score
    assert np.allclose(one_episode("moving", 0.3, policy), theta - policy.parameters["theta"], atol=1e-5)


def test_moving_differs_from_frozen_by_the_order_of_the_learning_rate() -> None:
    policy = table_policy(WORLD)
    gaps = []
    for rate in (0.1, 0.01):
        frozen, moving = (one_episode(name, rate, policy) / rate for name in ("frozen", "moving"))
        gaps.append(np.abs(frozen - moving).max())
    assert gaps[0] > 1e-3
    assert 5 < gaps[0] / gaps[1] < 20


# --- schedules and discounts ------------------------------------------------------------------------------------------


def test_the_learning_rate_falls_as_its_schedule_says() -> None:
    schedule = {"kind": "inverse_time", "scale": 2.0}
    updates = pgengine.train(spec(4, optimizer={"kind": "sgd", "learning_rate": 0.6, "schedule": schedule}))
    assert [u.metrics["learning_rate"] for u in updates] == pytest.approx([0.6, 0.4, 0.3, 0.24])
    schedule = {"kind": "inverse_root", "scale": 1.0}
    updates = pgengine.train(spec(4, optimizer={"kind": "adam", "learning_rate": 0.6, "schedule": schedule}))
    assert [u.metrics["learning_rate"] for u in updates] == pytest.approx([0.6 / np.sqrt(1 + u) for u in range(4)])


def test_the_step_has_the_scheduled_size() -> None:
    policy = table_policy(WORLD)
    schedule = {"kind": "inverse_time", "scale": 1.0}
    before = policy
    for update in pgengine.train(
        spec(3, optimizer={"kind": "sgd", "learning_rate": 1.0, "schedule": schedule}), policy=policy
    ):
        record = update.record
        change = update.policy.parameters["theta"].astype(np.float64) - before.parameters["theta"]
        estimate = gradient(before, record.batch, record.weighed.weights).reshape(change.shape)
        assert np.allclose(change, record.learning_rate * estimate, atol=1e-6)
        before = update.policy.copy()


def test_discounting_by_termination_has_geometric_episodes() -> None:
    endless = TabularSpec(transitions=[[[1.0], [1.0]]], rewards=[[1.0, 1.0]], initial=[1.0])
    training = spec(1, world=endless, gamma=0.75, discount="termination", trajectories=4000)
    (update,) = pgengine.train(training)
    lengths = update.record.batch.lengths
    assert update.record.batch.terminated.all()
    # null: P(T = n) = 0.25 * 0.75^(n - 1); mean 4, variance 12; n = 4000; z below 5.4 in all but 1e-7
    assert abs(lengths.mean() - 4.0) < 5.4 * np.sqrt(12 / 4000)
    assert (lengths == 1).mean() == pytest.approx(0.25, abs=5.4 * np.sqrt(0.25 * 0.75 / 4000))
    result = pgengine.evaluate(update.policy, endless, episodes=2000, survival=0.75)
    assert result.mean_return == pytest.approx(4.0, abs=5.4 * np.sqrt(12 / 2000))


def test_a_bootstrap_adds_what_the_last_observation_promises() -> None:
    chosen = algorithm(WORLD, horizon="bootstrap", gamma=0.9, baseline={"kind": "linear_value"}, trajectories=20)
    policy, environment = table_policy(WORLD), pgengine.open_environment(WORLD)
    estimator = Estimator(chosen, environment.facts, seed=0)
    first, second = (rollout(policy, environment, Noise(0, "training", u), 20) for u in (0, 1))
    assert np.array_equal(estimator.weigh(policy, first).rows.rewards, first.rewards)
    estimator.fit(first, estimator.weigh(policy, first))
    added = estimator.weigh(policy, second).rows.rewards - second.rewards
    last = second.offsets[1:] - 1
    assert second.truncated.any()
    assert second.terminated.any()
    assert (added[last[second.truncated]] != 0).all()
    assert np.count_nonzero(added) == second.truncated.sum()


@pytest.mark.slow
def test_a_bootstrap_promises_the_same_under_both_ways_to_discount() -> None:
    """Reward 1 for ever at gamma 0.8 is worth 5, wherever it is cut and however it is discounted.

    Credits of the first step are all alike by weights, and have a deviation below 5 by termination. Null: their mean
    is 5. With 4,000 episodes 0.45 is more than 5.4 standard errors, odds below 1e-7; survival counted twice gives 3.95.
    """
    world = TabularSpec(transitions=[[[1.0], [1.0]]], rewards=[[1.0, 1.0]], initial=[1.0], horizon=3)
    for discount in ("weight", "termination"):
        chosen = algorithm(
            world,
            gamma=0.8,
            discount=discount,
            horizon="bootstrap",
            baseline={"kind": "linear_value"},
            trajectories=4000,
        )
        policy, environment = table_policy(world), pgengine.open_environment(world)
        estimator = Estimator(chosen, environment.facts, seed=0)
        for update in range(60):
            batch = rollout(policy, environment, Noise(0, "training", update), 4000, survival=chosen.survival)
            weighed = estimator.weigh(policy, batch)
            estimator.fit(batch, weighed)
        assert weighed.weights.credit[batch.offsets[:-1]].mean() == pytest.approx(5.0, abs=0.45)


def test_a_policy_with_a_normaliser_moves_it_between_updates_only() -> None:
    training = TrainingSpec(
        environment=CARTPOLE,
        policy={"kind": "linear", "normalise_observations": True},  # type: ignore[arg-type]
        algorithm=AlgorithmSpec(trajectories=4),
        stop=StopSpec(updates=3, target_return=None),
    )
    seen = []
    for update in pgengine.train(training):
        record = update.record
        replayed = rollout(
            record.before, pgengine.open_environment(CARTPOLE), Noise(0, "training", update.updates - 1), 4
        )
        assert np.array_equal(replayed.log_probs, record.batch.log_probs), "one normaliser for the whole batch"
        seen.append({name: array.copy() for name, array in update.policy.buffers.items()})
    assert len(seen) == 3
    assert all(not np.array_equal(seen[0][name], seen[2][name]) for name in seen[0])
    states = trained(training)
    assert [d for d, _, _ in trained(training, resume_from=states[0][2])] == [d for d, _, _ in states[1:]]


def test_a_record_belongs_to_the_last_update() -> None:
    updates = []
    for update in pgengine.train(spec(2, world=bandit(0.0, 1.0))):
        updates.append(update)
    with pytest.raises(RuntimeError, match="last"):
        _ = updates[0].record
