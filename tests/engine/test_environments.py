"""Environments are described before they are played, and wrong ones are named."""

import re
import textwrap
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from pydantic import ValidationError

import pgengine
from pgengine.spaces import (
    BoxSpace,
    DiscreteSpace,
    MultiBinarySpace,
    MultiDiscreteSpace,
    action_schema,
    observation_schema,
)
from pgengine.spec import GymnasiumSpec, TabularSpec
from tests.engine.worlds import CARTPOLE, PENDULUM, bandit, random_mdp


def test_facts_of_a_registered_environment() -> None:
    facts = pgengine.describe(CARTPOLE)
    assert facts.action_space == DiscreteSpace(n=2)
    assert isinstance(facts.observation_space, BoxSpace)
    assert facts.observation_space.shape == [4]
    assert facts.observation_space.low[1] is None
    assert (facts.max_episode_steps, facts.limit_from, facts.reward_threshold) == (500, "id", 475.0)
    declared = pgengine.describe(GymnasiumSpec(id="CartPole-v1", max_episode_steps=7))
    assert (declared.max_episode_steps, declared.limit_from) == (7, "declared")
    assert [pgengine.describe(spec).episode_length for spec in (CARTPOLE, PENDULUM)] == ["varying", "fixed"]


@pytest.mark.parametrize(("spec", "pointer", "code"), [
    (GymnasiumSpec(id="NoSuchThing-v1"), "/id", "unknown_environment"),
    (GymnasiumSpec(id="CliffWalking-v1"), "/max_episode_steps", "episode_limit_missing"),
    (GymnasiumSpec(id="Blackjack-v1"), "/id", "unsupported_space"),
    (GymnasiumSpec(id="CartPole-v1", arguments={"gravity": 9}), "/arguments/gravity", "unknown_argument"),
    (GymnasiumSpec(id="FrozenLake-v1", arguments={"map_name": "9x9"}), "/arguments/map_name", "argument_value"),
    (GymnasiumSpec(id="FrozenLake-v1", arguments={"desc": ["SF", "G"]}), "/arguments", "environment_not_made"),
])  # fmt: skip
def test_an_environment_that_cannot_be_had_is_named(spec: GymnasiumSpec, pointer: str, code: str) -> None:
    with pytest.raises(pgengine.SpecError) as error:
        pgengine.describe(spec)
    assert (error.value.pointer, error.value.code) == (pointer, code)


def test_an_id_with_a_colon_imports_nothing() -> None:
    with pytest.raises(ValidationError, match="pattern"):
        GymnasiumSpec(id="antigravity:CartPole-v1")
    with pytest.raises(pgengine.SpecError, match="without a colon"):
        pgengine.describe(GymnasiumSpec.model_construct(id="antigravity:CartPole-v1", arguments={}))


def change(spec: TabularSpec, **fields: object) -> TabularSpec:
    return TabularSpec.model_validate({**spec.model_dump(), **fields})


@pytest.mark.parametrize(("fields", "pointer", "code"), [
    ({"transitions": [[[0.5, 0.499], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]]}, "/transitions/0/0", "probabilities_sum"),
    ({"transitions": [[[0.0, 1.0], [1.0]], [[0.0, 1.0], [0.0, 1.0]]]}, "/transitions/0/1", "shape"),
    ({"initial": [0.5, 0.4]}, "/initial", "probabilities_sum"),
    ({"initial": [0.5, 0.5]}, "/initial/1", "initial_terminal"),
    ({"initial": [1.0]}, "/initial", "shape"),
    ({"terminal": [2]}, "/terminal/0", "out_of_range"),
    ({"rewards": [[1.0], [0.0, 0.0]]}, "/rewards/0", "shape"),
    ({"rewards": None}, "/rewards", "one_of"),
    ({"features": [[[1.0]], [[1.0]]]}, "/features/0", "shape"),
])  # fmt: skip
def test_a_wrong_finite_mdp_is_named_at_its_cell(fields: dict[str, object], pointer: str, code: str) -> None:
    with pytest.raises(pgengine.SpecError) as error:
        pgengine.describe(change(bandit(0.0, 1.0), **fields))
    assert (error.value.pointer, error.value.code) == (pointer, code)


@pytest.mark.parametrize(("horizon", "terminal", "length"), [(1, [2], "fixed"), (3, [2], "varying"), (3, [], "fixed")])
def test_whether_all_episodes_are_equally_long_is_known(horizon: int, terminal: list[int], length: str) -> None:
    spec = change(random_mdp(0), horizon=horizon, terminal=terminal)
    assert pgengine.describe(spec).episode_length == length


def test_the_one_length_of_all_episodes_is_found() -> None:
    line = TabularSpec(
        transitions=[[[0.0, 1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0, 0.0]], [[0.0, 0.0, 0.0, 1.0]], [[0.0, 0.0, 0.0, 1.0]]],
        rewards=[[1.0]] * 4,
        initial=[1.0, 0.0, 0.0, 0.0],
        terminal=[3],
        horizon=3,
    )
    assert pgengine.describe(line).episode_length == "fixed"
    longer = pgengine.describe(change(line, horizon=4))
    assert (longer.fixed_steps, longer.limit_cuts) == (3, False)
    assert pgengine.describe(change(line, horizon=2)).limit_cuts
    swinging = change(line, transitions=[[[0.0, 1.0, 0.0, 0.0]], [[1.0, 0.0, 0.0, 0.0]], *line.transitions[2:]])
    assert pgengine.describe(change(swinging, horizon=1_000_000)).fixed_steps == 1_000_000


def test_nothing_impossible_is_drawn_at_the_edge_of_the_noise() -> None:
    third = 1 / 3
    spec = TabularSpec(
        transitions=[[[third, third, 1 - 2 * third, 0.0]]] * 4,
        rewards=[[0.0]] * 4,
        initial=[0.0, 1.0, 0.0, 0.0],
        horizon=2,
    )
    mdp = pgengine.TabularMDP(spec)
    assert mdp.begin(np.array([0, 2**64 - 1], dtype=np.uint64)).tolist() == [1, 1]
    step = mdp.step(np.array([0, 0]), np.array([[0.0], [np.nextafter(1.0, 0.0)]]))
    assert step.observations.tolist() == [0, 2]


class Switches(gymnasium.Env[np.ndarray, np.ndarray]):
    """Shows two dials, the second of which is broken from the third step on, and pays for the switches that are on."""

    observation_space = gymnasium.spaces.MultiDiscrete([3, 4], start=[0, -1])
    action_space = gymnasium.spaces.MultiBinary(3)

    def __init__(self) -> None:
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: object = None) -> tuple[np.ndarray, dict[str, object]]:
        self.steps = 0
        return np.array([2, -1]), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, object]]:
        assert self.action_space.contains(action)
        self.steps += 1
        return np.array([0, 3 if self.steps == 3 else 2]), float(action.sum()), False, False, {}


gymnasium.register("Switches-v0", entry_point=Switches, max_episode_steps=9)


def test_lists_of_integers_are_observed_and_done() -> None:
    environment = pgengine.open_environment(GymnasiumSpec(id="Switches-v0"))
    assert environment.facts.observation_space == MultiDiscreteSpace(nvec=[3, 4], start=[0, -1])
    assert environment.facts.action_space == MultiBinarySpace(n=3)
    first = environment.begin(np.arange(2, dtype=np.uint64))
    assert (first.dtype, first.tolist()) == (np.int64, [[2, -1], [2, -1]])
    actions = np.array([[0, 1, 1], [0, 0, 0]])
    step = environment.step(actions, None)
    assert (step.observations.tolist(), step.rewards.tolist()) == ([[0, 2], [0, 2]], [2.0, 0.0])
    environment.step(actions, None)
    with pytest.raises(pgengine.EnvironmentFailure, match="outside of its space"):
        environment.step(actions, None)


def test_schemas_of_observations_and_actions() -> None:
    facts = pgengine.describe(PENDULUM)
    assert observation_schema(facts.observation_space) == {
        "type": "array", "items": {"type": "number"}, "minItems": 3, "maxItems": 3
    }  # fmt: skip
    assert action_schema(facts.action_space) == {
        "type": "array", "items": {"type": "number", "minimum": -2.0, "maximum": 2.0}, "minItems": 1, "maxItems": 1
    }  # fmt: skip
    assert action_schema(DiscreteSpace(n=3, start=1)) == {"type": "integer", "minimum": 1, "maximum": 3}


def test_the_examples_of_the_documentation_run() -> None:
    page = (Path(__file__).parents[2] / "docs" / "engine" / "environments.md").read_text()
    examples = re.findall(r"(?:^    .*\n|^\n)+", page, flags=re.MULTILINE)
    programs = [example for example in examples if "import pgengine" in example]
    assert len(programs) == 2
    names: dict[str, object] = {}
    for program in programs:
        exec(textwrap.dedent(program), names)
    lake, step = names["lake"], names["step"]
    assert isinstance(lake, pgengine.TabularMDP)
    assert (lake.facts.max_episode_steps, lake.facts.limit_from, lake.facts.exact) == (100, "id", "finite_mdp")
    assert lake.transitions.shape == (16, 4, 16)
    assert isinstance(step, pgengine.Step)
    assert set(step.rewards.tolist()) <= {-1.0, 0.0, 4.0}
