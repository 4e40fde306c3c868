"""Spaces of lists: read from Gymnasium, written as JSON Schema, parsed, and played."""

from typing import Any

import gymnasium
import numpy as np
import pytest
from pydantic import ValidationError

import pgengine
from pgengine.noise import Noise
from pgengine.rollout import rollout
from pgengine.spaces import (
    BoxSpace,
    DiscreteSpace,
    MultiBinarySpace,
    MultiDiscreteSpace,
    Space,
    action_schema,
    array_dtype,
    array_shape,
    inside,
    observation_numbers,
    observation_schema,
    parse_observations,
    read_space,
)
from pgengine.spec import GymnasiumSpec, LinearPolicySpec, MlpPolicySpec, TransformerPolicySpec

LEVERS = MultiDiscreteSpace(nvec=[2, 3], start=[0, -1])
LAMPS = MultiBinarySpace(n=3)
PLANE = BoxSpace(shape=[2, 1], low=[None], high=[None], dtype="float64")


@pytest.mark.parametrize(("space", "expected"), [
    (gymnasium.spaces.MultiDiscrete([2, 3], start=[0, -1]), LEVERS),
    (gymnasium.spaces.MultiDiscrete([4, 2]), MultiDiscreteSpace(nvec=[4, 2])),
    (gymnasium.spaces.MultiBinary(3), LAMPS),
])  # fmt: skip
def test_spaces_of_lists_are_read(space: gymnasium.Space[Any], expected: Space) -> None:
    assert read_space(space, "action") == expected
    assert space.sample().shape == array_shape(expected)


@pytest.mark.parametrize("space", [
    gymnasium.spaces.MultiDiscrete([[2, 3], [2, 2]]),
    gymnasium.spaces.MultiBinary([2, 2]),
    gymnasium.spaces.MultiBinary(5000),
    gymnasium.spaces.MultiDiscrete([2] * 5000),
    gymnasium.spaces.MultiDiscrete([900_000, 900_000]),
    gymnasium.spaces.Text(3),
])  # fmt: skip
def test_other_spaces_are_refused(space: gymnasium.Space[Any]) -> None:
    with pytest.raises(pgengine.SpecError) as error:
        read_space(space, "action")
    assert error.value.code == "unsupported_space"


@pytest.mark.parametrize("claims", [
    {"nvec": [2, 3], "start": [0]},
    {"nvec": [600_000, 600_000]},
    {"nvec": []},
    {"nvec": [0]},
])  # fmt: skip
def test_a_space_that_cannot_be_is_refused(claims: dict[str, list[int]]) -> None:
    with pytest.raises(ValidationError):
        MultiDiscreteSpace.model_validate(claims)


@pytest.mark.parametrize(("space", "good", "bad"), [
    (LEVERS, [[0, -1], [1, 1]], [[2, 0], [0, 2], [0, -2], [0], [0, 0, 0], 0, [0.0, 0], [True, 0], None]),
    (LAMPS, [[0, 1, 0], [1, 1, 1]], [[0, 1, 2], [0, -1, 0], [0, 1], [1.0, 0, 0], [True, 0, 0], "101"]),
])  # fmt: skip
def test_what_is_inside_is_parsed_and_what_is_not_is_refused(space: Space, good: list[Any], bad: list[Any]) -> None:
    parsed = parse_observations(space, good)
    assert parsed.tolist() == good
    assert parsed.dtype == array_dtype(space) == np.int64
    assert inside(space, parsed).all()
    for value in bad:
        with pytest.raises(pgengine.ObservationError) as error:
            parse_observations(space, [good[0], value])
        assert error.value.pointer.startswith("/1")


def test_schemas_of_lists() -> None:
    assert observation_schema(LEVERS) == action_schema(LEVERS) == {
        "type": "array",
        "prefixItems": [
            {"type": "integer", "minimum": 0, "maximum": 1},
            {"type": "integer", "minimum": -1, "maximum": 1},
        ],
        "items": False,
        "minItems": 2,
        "maxItems": 2,
    }  # fmt: skip
    assert action_schema(LAMPS) == {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": 1},
        "minItems": 3,
        "maxItems": 3,
    }


def test_a_wrong_component_is_named() -> None:
    with pytest.raises(pgengine.ObservationError, match="expected an integer from -1 to 1") as error:
        parse_observations(LEVERS, [[0, 0], [1, 2]])
    assert (error.value.pointer, error.value.code) == ("/1/1", "observation_kind")
    with pytest.raises(pgengine.ObservationError) as error:
        parse_observations(LEVERS, [[0, 0], [1]])
    assert (error.value.pointer, error.value.code) == ("/1", "observation_shape")


@pytest.mark.parametrize(("space", "rows", "expected"), [
    (DiscreteSpace(n=2, start=3), [2, 3, 4, 5], [False, True, True, False]),
    (LEVERS, [[0, -1], [2, 0], [1, -2], [1, 2]], [True, False, False, False]),
    (LAMPS, [[0, 1, 0], [0, 2, 0], [-1, 0, 0]], [True, False, False]),
    (PLANE, [[[0.0], [1.0]], [[np.nan], [0.0]], [[np.inf], [0.0]]], [True, False, False]),
])  # fmt: skip
def test_rows_outside_of_a_space_are_found(space: Space, rows: list[Any], expected: list[bool]) -> None:
    assert inside(space, np.array(rows)).tolist() == expected


def test_how_many_numbers_an_element_has() -> None:
    assert [observation_numbers(s) for s in (DiscreteSpace(n=7), PLANE, LEVERS, LAMPS)] == [1, 2, 2, 3]


class Panel(gymnasium.Env[np.ndarray, np.ndarray]):
    """Shows two dials and takes three switches; pays for switches that are on, and insists on its own spaces."""

    observation_space = gymnasium.spaces.MultiDiscrete([2, 3], start=[0, -1])
    action_space = gymnasium.spaces.MultiBinary(3)

    def reset(self, *, seed: int | None = None, options: object = None) -> tuple[np.ndarray, dict[str, object]]:
        super().reset(seed=seed)
        return self._shown(), {}

    def _shown(self) -> np.ndarray:
        return np.array([self.np_random.integers(2), self.np_random.integers(-1, 2)])

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, object]]:
        assert self.action_space.contains(action)
        return self._shown(), float(action.sum()), False, False, {}


class Mixer(Panel):
    """Shows three lamps and takes two dials."""

    observation_space = gymnasium.spaces.MultiBinary(3)  # type: ignore[assignment]
    action_space = gymnasium.spaces.MultiDiscrete([2, 3], start=[0, -1])  # type: ignore[assignment]

    def _shown(self) -> np.ndarray:
        return self.np_random.integers(2, size=3, dtype=np.int8)


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    gymnasium.register("tests/Panel-v0", entry_point=Panel, max_episode_steps=20)
    gymnasium.register("tests/Mixer-v0", entry_point=Mixer, max_episode_steps=20)


@pytest.mark.parametrize("spec", [LinearPolicySpec(), MlpPolicySpec(hidden=[4]), TransformerPolicySpec(window=3)],
                         ids=["linear", "mlp", "transformer"])  # fmt: skip
@pytest.mark.parametrize("world", ["tests/Panel-v0", "tests/Mixer-v0"])
def test_environments_with_lists_are_played(
    spec: LinearPolicySpec | MlpPolicySpec | TransformerPolicySpec, world: str
) -> None:
    environment = GymnasiumSpec(id=world)
    policy = pgengine.create_policy(spec, environment, pgengine.describe(environment), seed=0)
    opened = pgengine.open_environment(environment)
    batch = rollout(policy, opened, Noise(0, "training", 0), 30)
    opened.close()
    values = {tuple(action) for action in batch.actions.tolist()}
    # null: every action has probability 1/8 or 1/6; that one of them is missing in 600 steps has odds below 1e-33
    assert len(values) == (8 if world == "tests/Panel-v0" else 6)
    assert batch.rewards.tolist() == batch.actions.sum(axis=1).tolist()
    probabilities = np.exp(batch.log_probs)
    assert np.allclose(probabilities, 1 / len(values), rtol=0.2)  # at the start all are about equally likely
