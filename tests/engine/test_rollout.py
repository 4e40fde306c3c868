"""Episodes are complete, independent, and the same however they are played."""

import gymnasium
import numpy as np
import pytest

import pgengine
from pgengine.exact import enumerate_trajectories, exact_return
from pgengine.noise import Noise
from pgengine.policies import Policy
from pgengine.rollout import Batch, rollout
from pgengine.spec import GymnasiumSpec, MlpPolicySpec, TabularSpec
from tests.engine.worlds import CARTPOLE, PENDULUM, random_mdp, table_policy


def play(spec: GymnasiumSpec | TabularSpec, policy: Policy, episodes: int, *, first: int = 0, update: int = 0) -> Batch:
    environment = pgengine.open_environment(spec)
    try:
        return rollout(policy, environment, Noise(1, "training", update), episodes, first=first)
    finally:
        environment.close()


def network(spec: GymnasiumSpec | TabularSpec) -> Policy:
    return pgengine.create_policy(MlpPolicySpec(), spec, pgengine.describe(spec), seed=3)


def episode(batch: Batch, k: int) -> list[np.ndarray]:
    rows = slice(batch.offsets[k], batch.offsets[k + 1])
    return [
        batch.observations[rows], batch.samples[rows], batch.actions[rows], batch.log_probs[rows], batch.rewards[rows]
    ]  # fmt: skip


@pytest.mark.parametrize("spec", [CARTPOLE, PENDULUM, random_mdp(0, horizon=6)], ids=["cartpole", "pendulum", "mdp"])
def test_an_episode_is_the_same_alone_and_among_others(spec: GymnasiumSpec | TabularSpec) -> None:
    policy = network(spec)
    together = play(spec, policy, 21)
    for k in (0, 7, 20):
        alone = play(spec, policy, 1, first=k)
        for one, among in zip(episode(alone, 0), episode(together, k), strict=True):
            assert np.array_equal(one, among)


@pytest.mark.parametrize("spec", [CARTPOLE, PENDULUM], ids=["cartpole", "pendulum"])
def test_gymnasium_itself_plays_the_same_episode(spec: GymnasiumSpec) -> None:
    batch = play(spec, network(spec), 3)
    seeds = Noise(1, "training", 0).words("begin", 3) >> np.uint64(1)
    for k in range(3):
        environment = gymnasium.make(spec.id)
        observation, _ = environment.reset(seed=int(seeds[k]))
        observations, _, actions, _, rewards = episode(batch, k)
        for t in range(len(rewards)):
            assert np.array_equal(observation, observations[t])
            observation, reward, terminated, truncated, _ = environment.step(actions[t])
            assert reward == rewards[t]
            assert (terminated or truncated) == (t == len(rewards) - 1)
        assert (terminated, truncated) == (batch.terminated[k], batch.truncated[k])
        assert np.array_equal(observation, batch.final_observations[k])
        environment.close()


def test_the_limit_truncates_and_is_counted_by_us() -> None:
    batch = play(GymnasiumSpec(id="CartPole-v1", max_episode_steps=5), network(CARTPOLE), 8)
    assert batch.lengths.tolist() == [5] * 8
    assert batch.truncated.all()
    assert not batch.terminated.any()


def test_updates_and_episodes_begin_differently() -> None:
    policy = network(CARTPOLE)
    first, second = play(CARTPOLE, policy, 4), play(CARTPOLE, policy, 4, update=1)
    beginnings = np.concatenate([b.observations[b.offsets[:-1]] for b in (first, second)])
    assert len(np.unique(beginnings, axis=0)) == 8


def test_sampled_returns_have_the_exact_mean() -> None:
    """Short and long episodes pay differently, so favouring those that end first would show.

    Null: the mean return of 40,000 episodes is J. A deviation of 6 standard errors has odds below 1e-8.
    """
    spec = random_mdp(6, horizon=6)
    policy, mdp = table_policy(spec), pgengine.TabularMDP(spec)
    J = exact_return(policy, mdp, gamma=1.0)
    returns = play(spec, policy, 40_000).returns
    assert abs(returns.mean() - J) < 6 * returns.std() / np.sqrt(len(returns))


def test_rollouts_read_no_impossible_transition() -> None:
    spec = random_mdp(0, horizon=3)
    trajectories = enumerate_trajectories(pgengine.TabularMDP(spec))
    possible = {tuple(r[:n]) for r, n in zip(trajectories.rewards, trajectories.lengths, strict=True)}
    batch = play(spec, table_policy(spec), 500)
    for k in range(500):
        assert tuple(episode(batch, k)[4]) in possible


class Raising(gymnasium.Env[np.ndarray, int]):
    """Raises in its third step."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, reward: float = 0.0) -> None:
        self.reward, self.steps = reward, 0

    def reset(self, *, seed: int | None = None, options: object = None) -> tuple[np.ndarray, dict[str, object]]:
        self.steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, object]]:
        self.steps += 1
        if self.steps == 3:
            raise ValueError("the motor is on fire")
        return np.zeros(2, np.float32), self.reward, False, False, {}


class Exiting(Raising):
    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, object]]:
        raise SystemExit(1)


class Blind(Raising):
    """Gives something else than it promised."""

    def __init__(self, at: str = "step", gives: str = "nan") -> None:
        super().__init__()
        self.at, self.wrong = at, np.array([np.nan, 0.0], np.float32) if gives == "nan" else np.float32(0.0)

    def reset(self, *, seed: int | None = None, options: object = None) -> tuple[np.ndarray, dict[str, object]]:
        observation, info = super().reset()
        return (self.wrong if self.at == "reset" else observation), info  # type: ignore[return-value]

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, object]]:
        return self.wrong, 0.0, False, False, {}  # type: ignore[return-value]


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    gymnasium.register("tests/Raising-v0", entry_point=Raising, max_episode_steps=10)
    gymnasium.register("tests/Exiting-v0", entry_point=Exiting, max_episode_steps=10)
    gymnasium.register("tests/Blind-v0", entry_point=Blind, max_episode_steps=10)
    gymnasium.register("tests/Infinite-v0", entry_point=Raising, kwargs={"reward": np.inf}, max_episode_steps=10)


def test_an_environment_that_raises_is_named() -> None:
    spec = GymnasiumSpec(id="tests/Raising-v0")
    with pytest.raises(pgengine.EnvironmentFailure, match="ValueError in step at step 2: the motor is on fire"):
        play(spec, network(spec), 2)


def test_an_environment_that_exits_is_a_failure_like_any_other() -> None:
    spec = GymnasiumSpec(id="tests/Exiting-v0")
    with pytest.raises(pgengine.EnvironmentFailure, match="SystemExit in step"):
        play(spec, network(spec), 2)


@pytest.mark.parametrize("at", ["reset", "step"])
@pytest.mark.parametrize(
    ("gives", "said"), [("nan", "not finite"), ("scalar", r"expected an array of numbers of shape \(2,\)")]
)
def test_an_observation_outside_of_the_space_is_the_environments_failure(at: str, gives: str, said: str) -> None:
    spec = GymnasiumSpec(id="tests/Blind-v0", arguments={"at": at, "gives": gives})
    with pytest.raises(pgengine.EnvironmentFailure, match=said):
        play(spec, network(spec), 2)


def test_a_reward_that_is_not_finite_is_a_failure() -> None:
    spec = GymnasiumSpec(id="tests/Infinite-v0")
    with pytest.raises(pgengine.EnvironmentFailure, match="not finite"):
        play(spec, network(spec), 2)
