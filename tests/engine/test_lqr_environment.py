"""The linear system moves, pays and draws as its equations say."""

import numpy as np
import pytest

import pgengine
from pgengine.environments import Lqr
from pgengine.environments.episodes import EpisodeEnvironment
from pgengine.spaces import BoxSpace
from pgengine.spec import LqrSpec


def system(**fields: object) -> LqrSpec:
    """A point with position and velocity, pushed by one force."""
    base: dict[str, object] = {
        "dynamics": [[1.0, 0.1], [0.0, 0.9]],
        "control": [[0.0], [0.5]],
        "state_cost": [[1.0, 0.2], [0.2, 0.5]],
        "action_cost": [[0.3]],
        "noise_deviation": [0.1, 0.3],
        "initial_mean": [1.0, -2.0],
        "initial_deviation": [0.5, 2.0],
        "horizon": 20,
    }
    return LqrSpec.model_validate({**base, **fields})


def words(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, size=count, dtype=np.uint64)


def test_facts() -> None:
    facts = pgengine.describe(system())
    assert isinstance(facts.observation_space, BoxSpace)
    assert isinstance(facts.action_space, BoxSpace)
    assert (facts.observation_space.shape, facts.action_space.shape) == ([2], [1])
    assert facts.observation_space.low == facts.action_space.high == [None]
    assert (facts.max_episode_steps, facts.limit_from, facts.fixed_steps) == (20, "horizon", 20)
    assert (facts.limit_cuts, facts.exact) == (True, "lqr")
    environment = pgengine.open_environment(system())
    assert isinstance(environment, Lqr)
    assert isinstance(environment, EpisodeEnvironment)


def test_defaults_are_no_noise_and_a_standard_normal_beginning() -> None:
    lqr = Lqr(system(noise_deviation=None, initial_mean=None, initial_deviation=None))
    assert lqr.uniforms == 0
    assert (lqr.noise_deviation.tolist(), lqr.initial_mean.tolist()) == ([0.0, 0.0], [0.0, 0.0])
    assert lqr.initial_deviation.tolist() == [1.0, 1.0]
    assert [Lqr(system(**three(n))).uniforms for n in (1, 2, 3)] == [2, 2, 4]


def three(n: int) -> dict[str, object]:
    eye = np.eye(n).tolist()
    numbers = [0.5] * n
    return {
        "dynamics": eye, "control": eye, "state_cost": eye, "action_cost": eye,
        "noise_deviation": numbers, "initial_mean": numbers, "initial_deviation": numbers,
    }  # fmt: skip


def test_without_noise_it_follows_the_equations() -> None:
    lqr = Lqr(system(noise_deviation=None, initial_deviation=[0.0, 0.0], horizon=3))
    states = np.tile(lqr.initial_mean, (5, 1))
    assert np.array_equal(lqr.begin(words(5)), states)
    for t in range(3):
        u = np.arange(5.0)[:, None] - t
        paid = [-(s @ lqr.Q @ s + a @ lqr.R @ a) for s, a in zip(states, u, strict=True)]
        states = states @ lqr.A.T + u @ lqr.B.T
        step = lqr.step(u, None)
        assert step.rewards == pytest.approx(paid, rel=1e-12)
        assert np.allclose(step.observations, states, rtol=1e-6)
        assert step.observations.dtype == np.float32
        assert not step.terminated.any()
        assert (step.truncated == (t == 2)).all()


def test_the_state_keeps_64_bits() -> None:
    """1 + 2^-40 is 1 in 32 bits; what it pays in the next step tells them apart."""
    lqr = Lqr(system(**{**three(1), "noise_deviation": None, "initial_mean": [0.0], "initial_deviation": [0.0]}))
    lqr.begin(words(1))
    assert lqr.step(np.array([[1.0 + 2.0**-40]]), None).observations.tolist() == [[1.0]]
    assert lqr.step(np.zeros((1, 1)), None).rewards[0] == -((1.0 + 2.0**-40) ** 2)


def test_first_states_and_noise_are_normal_and_independent() -> None:
    """Null: mean, variance, fourth moment and correlations are those of independent normal numbers.

    n = 200,000; each of the 16 statistics is within 6.5 of its standard errors, whose odds are 1e-9 together.
    """
    n = 200_000
    lqr = Lqr(system())
    begun = (lqr.begin(words(n)).astype(np.float64) - lqr.initial_mean) / lqr.initial_deviation
    u = np.zeros((n, 1))
    before = lqr._states.copy()
    noise = np.random.default_rng(1).random((n, lqr.uniforms))
    lqr.step(u, noise)
    moved = (lqr._states - before @ lqr.A.T) / lqr.noise_deviation
    neighbours = (begun[1:, 0] * begun[:-1, 0]).mean()  # words of different episodes
    statistics = [neighbours / (1 / np.sqrt(n)), (begun[:, 0] * moved[:, 0]).mean() * np.sqrt(n)]
    for z in (begun, moved):
        for column in z.T:
            statistics.append(column.mean() * np.sqrt(n))
            statistics.append(((column**2).mean() - 1) * np.sqrt(n / 2))
            statistics.append(((column**4).mean() - 3) * np.sqrt(n / 96))
        statistics.append(z.prod(axis=1).mean() * np.sqrt(n))
    assert len(statistics) == 16
    assert np.abs(statistics).max() < 6.5


def test_returns_have_the_mean_that_the_covariances_give() -> None:
    """Null: mean return under u = -K x + noise is -sum_t tr(Q S_t + R U_t), by S' = M S M' + W. 6 standard errors."""
    n, K, sigma = 100_000, np.array([[0.4, 0.3]]), 0.2
    lqr = Lqr(system())
    generator = np.random.default_rng(3)
    lqr.begin(words(n, 2))
    returns = np.zeros(n)
    for _ in range(lqr.horizon):
        u = -lqr._states @ K.T + sigma * generator.standard_normal((n, 1))
        returns += lqr.step(u, generator.random((n, 2))).rewards
    M = lqr.A - lqr.B @ K
    W = np.diag(lqr.noise_deviation**2) + sigma**2 * lqr.B @ lqr.B.T
    S = np.diag(lqr.initial_deviation**2) + np.outer(lqr.initial_mean, lqr.initial_mean)
    J = 0.0
    for _ in range(lqr.horizon):
        J -= np.trace(lqr.Q @ S) + np.trace(lqr.R @ (K @ S @ K.T + sigma**2))
        S = M @ S @ M.T + W
    assert abs(returns.mean() - J) < 6 * returns.std() / np.sqrt(n)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16])
def test_an_episode_is_the_same_alone_and_among_others(n: int) -> None:
    generator = np.random.default_rng(n)
    spec = system(**{**three(n), "dynamics": (generator.normal(size=(n, n)) / n).tolist()})
    together, alone = Lqr(spec), Lqr(spec)
    seeds, actions = words(33), generator.normal(size=(4, 33, n)).astype(np.float32)
    noise = generator.random((4, 33, together.uniforms))
    first = together.begin(seeds)
    steps = [together.step(actions[t], noise[t]) for t in range(4)]
    for k in (0, 8, 32):
        assert np.array_equal(alone.begin(seeds[k : k + 1])[0], first[k])
        for t in range(4):
            step = alone.step(actions[t, k : k + 1], noise[t, k : k + 1])
            assert step.rewards[0] == steps[t].rewards[k]
            assert np.array_equal(step.observations[0], steps[t].observations[k])


def test_lanes_that_are_kept_go_on() -> None:
    lqr, other = Lqr(system()), Lqr(system())
    seeds, mask = words(4), np.array([False, True, False, True])
    lqr.begin(seeds)
    other.begin(seeds[mask])
    lqr.keep(mask)
    noise = np.random.default_rng(0).random((2, 2))
    one, two = (each.step(np.ones((2, 1)), noise) for each in (lqr, other))
    assert np.array_equal(one.observations, two.observations)


def test_a_state_that_grows_without_bound_is_a_failure_and_not_a_number() -> None:
    lqr = Lqr(system(dynamics=[[1e30, 0.0], [0.0, 1.0]]))
    lqr.begin(words(3))
    lqr.step(np.zeros((3, 1)), np.full((3, 2), 0.5))
    with pytest.raises(pgengine.EnvironmentFailure, match="in step 2: the policy does not hold it"):
        lqr.step(np.zeros((3, 1)), np.full((3, 2), 0.5))


@pytest.mark.parametrize(("fields", "pointer", "code"), [
    ({"dynamics": [[1.0, 0.1], [0.0]]}, "/dynamics/1", "shape"),
    ({"dynamics": [[1.0]]}, "/control", "shape"),
    ({"control": [[0.0], [0.5, 1.0]]}, "/control/1", "shape"),
    ({"control": [[], []]}, "/control/0", "shape"),
    ({"state_cost": [[1.0]]}, "/state_cost", "shape"),
    ({"action_cost": [[1.0, 0.0], [0.0, 1.0]]}, "/action_cost", "shape"),
    ({"state_cost": [[1.0, 0.2], [0.3, 0.5]]}, "/state_cost/0/1", "not_symmetric"),
    ({"state_cost": [[1.0, 2.0], [2.0, 1.0]]}, "/state_cost", "not_semidefinite"),
    ({"action_cost": [[0.0]]}, "/action_cost", "not_definite"),
    ({"action_cost": [[-1.0]]}, "/action_cost", "not_definite"),
    ({"noise_deviation": [0.1, -0.1]}, "/noise_deviation/1", "negative_deviation"),
    ({"noise_deviation": [0.1]}, "/noise_deviation", "shape"),
    ({"initial_deviation": [-1.0, 0.0]}, "/initial_deviation/0", "negative_deviation"),
    ({"initial_mean": [1.0]}, "/initial_mean", "shape"),
])  # fmt: skip
def test_a_wrong_system_is_named_at_its_cell(fields: dict[str, object], pointer: str, code: str) -> None:
    with pytest.raises(pgengine.SpecError) as error:
        pgengine.describe(system(**fields))
    assert (error.value.pointer, error.value.code) == (pointer, code)


def test_a_cost_may_be_semidefinite_and_zero() -> None:
    pgengine.describe(system(state_cost=[[1.0, 1.0], [1.0, 1.0]]))
    pgengine.describe(system(state_cost=[[0.0, 0.0], [0.0, 0.0]]))
