"""The moving particle is a good Gymnasium environment, and its optimum is the one that it claims."""

import subprocess
import sys

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import pgengine
from pgengine.environments import read_table, register_own_ids
from pgengine.environments.particle import ContinuousParticle, Particle
from pgengine.spaces import BoxSpace, DiscreteSpace
from pgengine.spec import GymnasiumSpec

IDS = ["pgengine/Particle-v0", "pgengine/ParticleContinuous-v0"]


@pytest.mark.parametrize("id", IDS)
def test_gymnasiums_checker_finds_nothing(id: str) -> None:
    register_own_ids()
    check_env(gymnasium.make(id).unwrapped)  # warnings are errors here


def test_facts() -> None:
    discrete, continuous = (pgengine.describe(GymnasiumSpec(id=id)) for id in IDS)
    assert discrete.action_space == DiscreteSpace(n=5)
    assert pgengine.describe(GymnasiumSpec(id=IDS[0], arguments={"directions": 8})).action_space == DiscreteSpace(n=9)
    assert isinstance(continuous.action_space, BoxSpace)
    for facts in (discrete, continuous):
        assert isinstance(facts.observation_space, BoxSpace)
        assert (facts.observation_space.shape, facts.observation_space.low) == ([2], [-1.0])
        assert (facts.max_episode_steps, facts.limit_from, facts.fixed_steps) == (50, "id", 50)
    assert read_table(GymnasiumSpec(id=IDS[0])) is None


def test_directions_are_four_or_eight() -> None:
    with pytest.raises(pgengine.SpecError) as error:
        pgengine.describe(GymnasiumSpec(id=IDS[0], arguments={"directions": 5}))
    assert (error.value.pointer, error.value.code) == ("/arguments/directions", "argument_value")
    assert error.value.message == "expected one of 4, 8"


def test_the_ids_are_registered_when_one_is_looked_up_and_not_before() -> None:
    program = """
import sys
import pgengine.environments
assert "gymnasium" not in sys.modules
import gymnasium
assert not [id for id in gymnasium.registry if id.startswith("pgengine/")]
pgengine.environments.describe(pgengine.GymnasiumSpec(id="CartPole-v1"))
assert "pgengine/Particle-v0" in gymnasium.registry
assert "pgengine.environments.particle" not in sys.modules
pgengine.environments.describe(pgengine.GymnasiumSpec(id="pgengine/Particle-v0"))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize("directions", [4, 8])
def test_each_action_moves_where_its_name_says(directions: int) -> None:
    particle = Particle(directions)
    angles = {"east": 0, "north": 90, "west": 180, "south": 270}
    angles |= {"north-east": 45, "north-west": 135, "south-west": 225, "south-east": 315}
    previous = -1
    for action, name in enumerate(particle.action_names):
        particle._go_to(np.array([2, -3]))
        seen, reward, terminated, truncated, _ = particle.step(np.int64(action))
        move = seen - np.array([0.2, -0.3])
        assert reward == pytest.approx(-float(seen.astype(float) @ seen), rel=1e-6)
        assert not terminated
        assert not truncated
        if name == "stay":
            assert np.allclose(move, 0.0, atol=1e-6)
            continue
        angle = (np.degrees(np.arctan2(move[1], move[0])) + 1) % 360 - 1
        assert angle == pytest.approx(angles[name], abs=1e-3)
        assert np.abs(move).max() == pytest.approx(0.1, abs=1e-6)
        assert previous < angles[name]  # counterclockwise
        previous = angles[name]


def test_walls_stop_a_coordinate() -> None:
    particle = Particle(8)
    particle._go_to(np.array([10, 0]))
    north_east = particle.action_names.index("north-east")
    assert particle.step(np.int64(north_east))[0] == pytest.approx([1.0, 0.1])
    continuous = ContinuousParticle()
    continuous._position = np.array([0.95, -0.99])
    assert continuous.step(np.array([1.0, -5.0], dtype=np.float32))[0].tolist() == [1.0, -1.0]


@pytest.mark.parametrize(("directions", "optimum"), [(4, -2.7378), (8, -11 / 7)])
def test_the_optimum_of_the_discrete_one(directions: int, optimum: float) -> None:
    """Dynamic programming through the class's own steps, and the way that the docstring calls optimal."""
    particle = Particle(directions)
    side, A = 21, len(particle.action_names)
    after, paid = np.zeros((side, side, A, 2), dtype=np.int64), np.zeros((side, side, A))
    for i, j, a in np.ndindex(side, side, A):
        particle._go_to(np.array([i - 10, j - 10]))
        paid[i, j, a] = particle.step(np.int64(a))[1]
        after[i, j, a] = particle._cell + 10
    v = np.zeros((side, side))
    for _ in range(50):
        v = (paid + v[after[..., 0], after[..., 1]]).max(axis=2)
    assert v.mean() == pytest.approx(optimum, abs=5e-5)
    stay = 50 * paid[..., 0].mean()
    assert stay == pytest.approx(-36.667, abs=1e-3)
    greedy = 0.0
    for i, j in np.ndindex(side, side):
        particle._go_to(np.array([i - 10, j - 10]))
        while particle._cell.any():  # at the origin nothing more is paid
            x, y = particle._cell
            move = -np.sign([x, y])
            if directions == 4:
                move = move * ([1, 0] if abs(x) >= abs(y) else [0, 1])
            greedy += particle.step(np.int64(np.flatnonzero((particle._moves == move).all(axis=1))[0]))[1]
    assert greedy / side**2 == pytest.approx(v.mean(), abs=1e-9)


def played(particle: ContinuousParticle, start: tuple[float, float], disturbance: np.ndarray) -> float:
    """Return of going to 0 as fast as each coordinate can, disturbed."""
    particle._position = np.array(start)
    total = 0.0
    for push in disturbance:
        total += particle.step(np.clip(-particle._position / 0.1, -1, 1) + push)[1]
    return total


def test_the_optimum_of_the_continuous_one() -> None:
    """The way that the docstring calls optimal has the J that it gives, and no disturbance of it does better."""
    particle, still = ContinuousParticle(), np.zeros((50, 2))
    side = (np.arange(40) + 0.5) / 20 - 1
    # the coordinates do not depend on each other, so one of them stands for both
    J = 2 * np.mean([played(particle, (x, 0.0), still) for x in side])
    assert pytest.approx(-1.35, abs=2e-3) == J
    generator = np.random.default_rng(0)
    for start in generator.uniform(-1, 1, size=(40, 2)):
        best = played(particle, start, still)
        for size in (0.01, 0.3):
            assert played(particle, start, size * generator.normal(size=(50, 2))) < best


def test_first_positions_are_uniform() -> None:
    """Null: mean 0 and variance 110/3 of a strided cell, 1/3 of a coordinate. n = 4,000 numbers, 6 standard errors."""
    for world, variance, fourth in [(Particle(), 36.667e-2, 0.2418), (ContinuousParticle(), 1 / 3, 1 / 5)]:
        begun = np.array([world.reset(seed=seed)[0] for seed in range(2_000)]).ravel().astype(float)
        assert abs(begun.mean()) < 6 * np.sqrt(variance / 4_000)
        assert abs((begun**2).mean() - variance) < 6 * np.sqrt((fourth - variance**2) / 4_000)
        assert np.abs(begun).max() <= 1.0


@pytest.mark.parametrize("id", IDS)
def test_it_says_where_it_is(id: str) -> None:
    register_own_ids()
    environment = gymnasium.make(id, render_mode="ansi")
    x, y = environment.reset(seed=1)[0]
    assert environment.render() == f"({x:+.3f}, {y:+.3f})"
