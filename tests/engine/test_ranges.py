"""The range of returns is that of all sequences of moves, found without playing."""

import itertools
import math
import time

import numpy as np
import pytest

import pgengine
from pgengine.environments.ranges import StepRewards, range_of_steps
from pgengine.exact import enumerate_trajectories
from pgengine.intervals import ReturnRange
from pgengine.noise import Noise
from pgengine.rollout import rollout
from pgengine.spec import GymnasiumSpec, TabularSpec
from tests.engine.worlds import paying, random_mdp, small_mdp, steady_mdp

WORLDS = [
    random_mdp(1),
    random_mdp(2, horizon=5),
    small_mdp(3),
    steady_mdp(4, horizon=4),
    paying(0.3, 1.0),
    paying(0.0),
]


@pytest.mark.parametrize("spec", WORLDS)
@pytest.mark.parametrize("survival", [1.0, 0.5])
def test_it_is_that_of_all_trajectories(spec: TabularSpec, survival: float) -> None:
    mdp = pgengine.TabularMDP(spec)
    returns = enumerate_trajectories(mdp, survival=survival).rewards.sum(axis=1)
    facts = mdp.facts
    found = facts.return_range if survival == 1.0 else facts.cut_return_range
    assert found is not None
    assert (found.low, found.high) == (pytest.approx(returns.min()), pytest.approx(returns.max()))
    ends = np.isclose(returns, returns.min()) | np.isclose(returns, returns.max())
    assert found.two_values == bool(ends.all())


def loop(reward: float, horizon: int | None) -> TabularSpec:
    """Staying pays the reward; leaving pays 1 and ends."""
    return TabularSpec(
        transitions=[[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0]] * 2],
        rewards=[[reward, 1.0], [0.0, 0.0]],
        initial=[1.0, 0.0],
        terminal=[1],
        horizon=horizon,
    )


def test_without_a_horizon_returns_may_grow_for_ever() -> None:
    assert pgengine.describe(loop(-1.0, None)).return_range is None
    straight = TabularSpec(
        transitions=[[[0.0, 0.3, 0.7]], [[0.0, 0.0, 1.0]], [[0.0, 0.0, 1.0]]],
        rewards=[[2.0], [-5.0], [0.0]],
        initial=[1.0, 0.0, 0.0],
        terminal=[2],
    )
    assert pgengine.describe(straight).return_range == ReturnRange(low=-3.0, high=2.0, two_values=True)


def test_a_long_horizon_is_bounded_by_the_rewards_where_it_is_not_followed() -> None:
    began = time.process_time()
    found = pgengine.describe(loop(-1.0, 1_000_000)).return_range
    assert found is not None
    assert found.low == -1_000_000.0
    assert 1.0 <= found.high <= 1_000_000.0
    assert time.process_time() - began < 20.0  # following all of it would take minutes


def test_noise_and_numbers_beyond_every_float_have_no_range() -> None:
    noisy = loop(-1.0, 3).model_copy(update={"reward_deviation": [[0.1, 0.0], [0.0, 0.0]]})
    assert pgengine.describe(noisy).return_range is None
    assert pgengine.describe(loop(-1e308, 10)).return_range is None


@pytest.mark.parametrize(
    ("environment_id", "arguments", "expected"),
    [
        ("CartPole-v1", {}, (1.0, 500.0)),
        ("CartPole-v1", {"sutton_barto_reward": True}, None),
        ("Acrobot-v1", {}, (-500.0, 0.0)),
        ("MountainCar-v0", {}, (-200.0, -1.0)),
        ("MountainCarContinuous-v0", {}, (-99.9, 100.0)),
        ("Pendulum-v1", {}, (-200 * (math.pi**2 + 6.404), 0.0)),
        ("pgengine/Particle-v0", {}, (-100.0, 0.0)),
        ("pgengine/ParticleContinuous-v0", {}, (-100.0, 0.0)),
        ("FrozenLake-v1", {}, (0.0, 1.0)),
        ("Taxi-v4", {}, (-2000.0, 15.0)),
        ("pgengine/TMaze-v0", {}, (0.0, 1.0)),
    ],
)
def test_the_ranges_of_registered_ids(
    environment_id: str, arguments: dict[str, bool], expected: tuple[float, float] | None
) -> None:
    spec = GymnasiumSpec(id=environment_id, arguments=arguments)
    environment = pgengine.open_environment(spec)
    found = environment.facts.return_range
    assert (None if found is None else (found.low, found.high)) == (expected and pytest.approx(expected))
    if found is None:
        return
    policy = pgengine.create_policy(pgengine.MlpPolicySpec(), spec, environment.facts, seed=0)
    returns = rollout(policy, environment, Noise(0, "evaluation", 0), 4).returns
    assert ((returns >= found.low) & (returns <= found.high)).all()


def test_a_sum_of_rewards_is_between_the_shortest_and_the_longest_episode() -> None:
    for low, high, fixed in itertools.product((-2.0, -0.5, 0.5), (0.75, 3.0), (False, True)):
        found = range_of_steps(StepRewards(low, high), 4, fixed=fixed)
        fewest = 4 if fixed else 1
        totals = [n * reward for n in range(fewest, 5) for reward in (low, high)]
        assert found == ReturnRange(low=min(totals), high=max(totals))
    assert range_of_steps(None, 4, fixed=True) is None
