"""Training learns, goes on to the bit, and says why it stopped."""

import math

import numpy as np
import pytest
import torch

import pgengine
from pgengine.estimators import BatchRows, step_weights
from pgengine.exact import log_policy, parameters_in_double
from pgengine.noise import Noise
from pgengine.rollout import rollout
from pgengine.spaces import DiscreteSpace
from pgengine.spec import AlgorithmSpec, GymnasiumSpec, LinearPolicySpec, SgdSpec, StopSpec, TabularSpec, TrainingSpec
from tests.engine.worlds import CARTPOLE, PENDULUM, bandit, random_mdp, table_policy


def parameters(update: pgengine.Update) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in update.policy.parameters.items()}


def run(spec: TrainingSpec, **where: object) -> list[tuple[int, dict[str, bytes], bytes]]:
    return [(update.updates, parameters(update), update.state()) for update in pgengine.train(spec, **where)]  # type: ignore[arg-type]


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam"])
@pytest.mark.parametrize("environment", [CARTPOLE, PENDULUM, random_mdp(0)], ids=["cartpole", "pendulum", "mdp"])
def test_a_resumed_run_has_the_bits_of_an_undisturbed_one(
    environment: GymnasiumSpec | TabularSpec, optimizer: str
) -> None:
    spec = TrainingSpec(
        environment=environment,
        algorithm={"trajectories": 3, "optimizer": {"kind": optimizer, "learning_rate": 1e-5}},  # type: ignore[arg-type]
        stop=StopSpec(updates=6, target_return=None),
    )
    undisturbed = run(spec)
    assert [updates for updates, _, _ in undisturbed] == [1, 2, 3, 4, 5, 6]
    for at in (0, 3, 4):
        resumed = run(spec, resume_from=undisturbed[at][2])
        assert [(u, p) for u, p, _ in resumed] == [(u, p) for u, p, _ in undisturbed[at + 1 :]]


def test_resuming_a_finished_run_gives_its_last_update_again() -> None:
    spec = TrainingSpec(environment=bandit(0.0, 1.0), stop=StopSpec(updates=2))
    last = list(pgengine.train(spec))[-1]
    (again,) = pgengine.train(spec, resume_from=last.state())
    assert (again.updates, again.stopped_by, parameters(again)) == (2, "updates", parameters(last))


def test_a_step_of_sgd_is_the_estimate_in_double_precision() -> None:
    spec = random_mdp(2, A=3, horizon=5)
    policy = table_policy(spec)
    algorithm = AlgorithmSpec(gamma=0.9, trajectories=40, optimizer=SgdSpec(learning_rate=1.0))
    training = TrainingSpec(environment=spec, algorithm=algorithm, stop=StopSpec(updates=1), seed=8)
    (update,) = pgengine.train(training, policy=policy)
    resolved = pgengine.resolve(training, pgengine.describe(spec)).algorithm
    batch = rollout(policy, pgengine.open_environment(spec), Noise(8, "training", 0), 40)
    theta = parameters_in_double(policy)
    log_pi = log_policy(policy, theta)[batch.observations, batch.samples]
    weights = torch.as_tensor(step_weights(BatchRows(batch.rewards, batch.offsets), resolved).score)
    (estimate,) = torch.autograd.grad((weights * log_pi).sum(), list(theta.values()))
    step = update.policy.parameters["theta"].astype(np.float64) - policy.parameters["theta"]
    assert np.allclose(step, estimate, atol=1e-6)
    assert update.metrics["gradient_norm"] == pytest.approx(float(estimate.norm()), rel=1e-5)


def test_training_leaves_the_policy_it_started_from_alone() -> None:
    policy = table_policy(random_mdp(0))
    before = policy.to_bytes()
    updates = list(pgengine.train(TrainingSpec(environment=random_mdp(0), stop=StopSpec(updates=2)), policy=policy))
    assert policy.to_bytes() == before
    assert updates[-1].updates == 2
    (more,) = pgengine.train(
        TrainingSpec(environment=random_mdp(0), stop=StopSpec(updates=1)), policy=updates[-1].policy
    )
    assert (more.updates, more.progress.updates) == (3, 1)


LAKE = GymnasiumSpec(id="FrozenLake-v1", arguments={"is_slippery": False})
WAY = {0: 1, 4: 1, 8: 2, 9: 1, 13: 2, 14: 2}
"""What leads to the goal from where one begins; the id has a threshold of 0.70."""


def test_a_policy_that_has_passed_the_threshold_goes_on_for_as_long_as_it_is_told() -> None:
    """Whoever goes on with a policy wants more of it; so does the run after it was interrupted."""
    table = [[20.0 * (WAY.get(state) == action) for action in range(4)] for state in range(16)]
    known = LinearPolicySpec(initial_parameters={"theta": table})
    spec = TrainingSpec(environment=LAKE, policy=known)
    assert [update.stopped_by for update in pgengine.train(spec)] == ["target_return"]
    policy = pgengine.create_policy(known, LAKE, pgengine.describe(LAKE), seed=0)
    run = pgengine.train(spec, policy=policy)
    first = next(run)
    state = first.state()
    assert first.stopped_by is None
    assert next(pgengine.train(spec, resume_from=state)).stopped_by is None
    few = spec.model_copy(update={"stop": StopSpec(updates=4)})
    assert [update.stopped_by for update in pgengine.train(few)] == [None, None, None, "updates"]
    named = spec.model_copy(update={"stop": StopSpec(updates=4, target_return=0.5)})
    assert [update.stopped_by for update in pgengine.train(named, policy=policy)] == ["target_return"]


@pytest.mark.slow
def test_a_bandit_finds_its_best_arm() -> None:
    spec = TrainingSpec(
        environment=bandit(0.0, 1.0, 0.5),
        policy={"kind": "linear"},  # type: ignore[arg-type]
        algorithm={"optimizer": {"kind": "adam", "learning_rate": 0.1}},  # type: ignore[arg-type]
        stop=StopSpec(updates=150),
    )
    last = list(pgengine.train(spec))[-1]
    probabilities = last.policy.answer(np.array([0])).probabilities
    assert probabilities is not None
    assert probabilities[0, 1] > 0.95


def test_a_gaussian_policy_moves_its_mean_and_its_deviation() -> None:
    spec = TrainingSpec(environment=PENDULUM, stop=StopSpec(updates=2), algorithm=AlgorithmSpec(trajectories=4))
    last = list(pgengine.train(spec))[-1]
    start = pgengine.create_policy(spec.policy, PENDULUM, pgengine.describe(PENDULUM), seed=0).parameters
    assert all(not np.array_equal(array, start[name]) for name, array in last.policy.parameters.items())
    assert "log_sigma" in start
    assert math.isfinite(last.metrics["gradient_norm"])


@pytest.mark.slow
def test_cartpole_is_solved_with_an_exact_estimator() -> None:
    spec = TrainingSpec(environment=CARTPOLE, seed=1)
    facts = pgengine.describe(CARTPOLE)
    assert pgengine.label(pgengine.resolve(spec, facts), facts).kind == "exact"
    last = list(pgengine.train(spec))[-1]
    assert last.stopped_by == "target_return"
    assert last.selection is not None
    assert (last.selection.method, last.selection.is_proven) == ("betting", True)
    assert last.selection.lower_bound >= 475
    report = pgengine.evaluate(last.policy, CARTPOLE, episodes=100, seed=1)
    assert report.mean_return >= 475
    assert report.method == "betting"
    assert report.mean_return != last.selection.mean_return or report.mean_return == 500


@pytest.mark.parametrize(("stop", "reason", "updates"), [
    (StopSpec(updates=3), "updates", 3),
    (StopSpec(env_steps=33), "env_steps", 3),
    (StopSpec(seconds=1e-9), "seconds", 1),
    (StopSpec(target_return=-1.0), "target_return", 1),
    (StopSpec(updates=2, target_return=5.0), "updates", 2),
])  # fmt: skip
def test_it_says_why_it_stopped(stop: StopSpec, reason: str, updates: int) -> None:
    spec = TrainingSpec(environment=bandit(0.0, 1.0), stop=stop)
    collected = list(pgengine.train(spec))
    assert (collected[-1].stopped_by, len(collected)) == (reason, updates)
    assert all(update.stopped_by is None for update in collected[:-1])


def test_a_target_is_proven_on_fresh_episodes_not_on_the_batch() -> None:
    coin = bandit(0.0, 1.0)  # a batch of two can be lucky; the mean of 100 fresh episodes at the start is one half
    spec = TrainingSpec(
        environment=coin,
        algorithm={"trajectories": 2, "optimizer": {"kind": "sgd", "learning_rate": 1e-9}},  # type: ignore[arg-type]
        stop=StopSpec(updates=60, target_return=0.9),
    )
    collected = list(pgengine.train(spec))
    looks = [update for update in collected if update.selection is not None]
    assert 2 <= len(looks) <= 12
    assert collected[-1].stopped_by == "updates"


def test_divergence_is_named_with_update_and_seed() -> None:
    steep = bandit(0.0, 3e38)
    spec = TrainingSpec(
        environment=steep,
        algorithm={"baseline": {"kind": "none"}, "optimizer": {"kind": "sgd", "learning_rate": 1e6}},  # type: ignore[arg-type]
        seed=4,
    )
    with pytest.raises(pgengine.DivergedError, match=r"update \d+ \(seed 4\)"):
        list(pgengine.train(spec))


class Corridor:
    """An environment of one's own: walk right, three steps, no noise."""

    facts = pgengine.EnvironmentFacts(
        observation_space=DiscreteSpace(n=4),
        action_space=DiscreteSpace(n=2),
        max_episode_steps=6,
        limit_from="declared",
    )
    uniforms = 0

    def begin(self, noise: np.ndarray) -> np.ndarray:
        self.at, self.steps = np.zeros(len(noise), dtype=np.int64), 0
        return self.at

    def step(self, actions: np.ndarray, noise: np.ndarray | None) -> pgengine.Step:
        self.at, self.steps = np.clip(self.at + 2 * actions - 1, 0, 3), self.steps + 1
        terminated = self.at == 3
        cut = np.full(len(self.at), self.steps >= 6) & ~terminated
        return pgengine.Step(self.at, np.full(len(self.at), -1.0), terminated, cut)

    def keep(self, mask: np.ndarray) -> None:
        self.at = self.at[mask]

    def close(self) -> None:
        raise AssertionError("it belongs to the caller")


def test_an_environment_of_ones_own_is_learned() -> None:
    spec = TrainingSpec(
        environment=GymnasiumSpec(id="corridor"),
        policy={"kind": "linear"},  # type: ignore[arg-type]
        algorithm={"optimizer": {"kind": "adam", "learning_rate": 0.2}},  # type: ignore[arg-type]
        stop=StopSpec(updates=60),
    )
    corridor = Corridor()
    last = list(pgengine.train(spec, environment=corridor))[-1]
    assert pgengine.evaluate(last.policy, corridor, episodes=50).mean_return > -3.2


def test_a_state_of_something_else_is_refused() -> None:
    spec = TrainingSpec(environment=bandit(0.0, 1.0))
    for data in (b"", b"x" * 50, table_policy(bandit(0.0, 1.0)).to_bytes()):
        with pytest.raises(pgengine.CheckpointError):
            next(pgengine.train(spec, resume_from=data))


def test_state_belongs_to_the_last_update() -> None:
    run_ = pgengine.train(TrainingSpec(environment=bandit(0.0, 1.0), stop=StopSpec(updates=3)))
    first = next(run_)
    next(run_)
    with pytest.raises(RuntimeError, match="gone on"):
        first.state()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named() -> None:
    with pytest.raises(pgengine.SpecError) as error:
        next(pgengine.train(TrainingSpec(environment=bandit(0.0, 1.0), device="cuda")))
    assert (error.value.pointer, error.value.code) == ("/device", "device_not_available")


def test_a_state_of_another_spec_is_refused() -> None:
    spec = TrainingSpec(environment=bandit(0.0, 1.0), stop=StopSpec(updates=2))
    state = next(pgengine.train(spec)).state()
    for change in ({"seed": 1}, {"policy": {"kind": "linear"}}, {"algorithm": {"optimizer": {"kind": "sgd"}}}):
        other = TrainingSpec.model_validate({**spec.model_dump(), **change})
        with pytest.raises(pgengine.CheckpointError, match="another spec"):
            next(pgengine.train(other, resume_from=state))
    longer = spec.model_copy(update={"stop": StopSpec(updates=3)})
    assert [update.updates for update in pgengine.train(longer, resume_from=state)] == [2, 3]
