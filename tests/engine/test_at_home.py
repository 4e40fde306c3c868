"""A policy without a server: read from a file, asked with what an environment gives, answering what it takes."""

import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import safetensors.numpy
import torch

import pgengine
from pgengine.environments import EnvironmentFacts
from pgengine.policies import Policy
from pgengine.spaces import Space, read_space
from pgengine.spec import GymnasiumSpec, LinearPolicySpec, MlpPolicySpec, PolicySpec, TransformerPolicySpec
from tests.engine.worlds import CARTPOLE, PENDULUM

NUMBERS = gymnasium.spaces.Box(-1.0, 1.0, (2, 2), np.float32)
ACTIONS: list[gymnasium.Space[Any]] = [
    gymnasium.spaces.Discrete(3),
    gymnasium.spaces.Discrete(3, start=-1),
    gymnasium.spaces.MultiDiscrete([2, 3], start=[0, -1]),
    gymnasium.spaces.MultiBinary(3),
    gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32),
    gymnasium.spaces.Box(-1.0, 1.0, (2, 1), np.float64),
    gymnasium.spaces.Box(0, 255, (3,), np.uint8),
]
OBSERVATIONS: list[gymnasium.Space[Any]] = [
    NUMBERS,
    gymnasium.spaces.Box(0, 255, (2, 2, 1), np.uint8),
    gymnasium.spaces.Box(-np.inf, np.inf, (), np.float64),
    gymnasium.spaces.Discrete(4, start=2),
    gymnasium.spaces.MultiDiscrete([2, 3], start=[0, -1]),
    gymnasium.spaces.MultiBinary(3),
]


def between(observations: Any, actions: Any, spec: PolicySpec | None = None) -> Policy:
    spaces: list[Space] = [read_space(observations, "observation"), read_space(actions, "action")]
    facts = EnvironmentFacts(
        observation_space=spaces[0], action_space=spaces[1], max_episode_steps=10, limit_from="declared"
    )
    return pgengine.create_policy(spec or MlpPolicySpec(hidden=[8]), CARTPOLE, facts, seed=0)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("space", ACTIONS, ids=str)
def test_an_action_is_what_the_space_contains(space: gymnasium.Space[Any], deterministic: bool) -> None:
    policy = between(NUMBERS, space)
    NUMBERS.seed(0)
    for _ in range(20):
        action = policy.act(NUMBERS.sample(), deterministic=deterministic)
        assert space.contains(action)
        assert isinstance(action, int) or action.dtype == space.dtype


@pytest.mark.parametrize("space", OBSERVATIONS, ids=str)
def test_an_observation_is_taken_as_a_list_and_as_an_array_alone_and_with_others(space: gymnasium.Space[Any]) -> None:
    policy = between(space, ACTIONS[4])
    space.seed(0)
    several = [space.sample() for _ in range(5)]
    together = policy.act(several, seed=3)
    assert np.array_equal(policy.act(np.array(several), seed=3), together)
    assert np.array_equal(policy.act(torch.as_tensor(np.array(several)), seed=3), together)
    assert np.array_equal(policy.answer(policy.parse(np.array(several).tolist(), batch=True), seed=3).actions, together)
    for same in (several[0], np.array(several[0]).tolist(), torch.as_tensor(several[0])):
        assert np.array_equal(policy.act(same, seed=3), together[0])


@pytest.mark.parametrize("spec", [CARTPOLE, PENDULUM, GymnasiumSpec(id="FrozenLake-v1")], ids=lambda spec: spec.id)
def test_an_episode_of_gymnasium_is_played_in_five_lines(spec: GymnasiumSpec, tmp_path: Path) -> None:
    made = pgengine.create_policy(LinearPolicySpec(), spec, pgengine.describe(spec), seed=0)
    (tmp_path / "policy.safetensors").write_bytes(made.to_bytes())
    environment = gymnasium.make(spec.id)

    policy = pgengine.load(tmp_path / "policy.safetensors")
    (observation, _), ended = environment.reset(seed=1), False
    while not ended:
        observation, _, terminated, truncated, _ = environment.step(policy.act(observation))
        ended = terminated or truncated


def test_a_policy_with_memory_is_asked_with_the_last_observations() -> None:
    policy = between(NUMBERS, ACTIONS[0], TransformerPolicySpec(window=3, width=4))
    NUMBERS.seed(0)
    history = [NUMBERS.sample() for _ in range(5)]
    for length in (1, 2, 3):
        assert isinstance(policy.act(history[:length], seed=0), int)
    assert policy.act([history[:1], history[-3:]], seed=0).shape == (2,)
    with pytest.raises(pgengine.ObservationError, match="1 to 3 observations, oldest first"):
        policy.act(history)


@pytest.mark.parametrize(("observation", "message"), [
    ([0.0, 0.0, 0.0], r"expected shape \[4\]: a list of 4 here, it is 3 long"),
    (np.zeros((2, 3)), r"/0: expected shape \[4\]: a list of 4 here, it is 3 long"),
    (np.zeros((0, 4)), "expected shape"),
    (0.5, r"expected shape \[4\]"),
    (None, r"expected shape \[4\]"),
    ({"x": 1.0}, r"expected shape \[4\]"),
    (np.array([0.0, np.nan, 0.0, 0.0]), "expected finite numbers that fit into 32-bit floats"),
    (["0", "0", "0", "0"], "/0: expected a number"),
    ((np.zeros(4), {}), r"/1: expected shape \[4\]"),  # what reset of an environment gives, as a whole
])  # fmt: skip
def test_a_wrong_observation_is_said_by_name(observation: object, message: str) -> None:
    policy = pgengine.create_policy(MlpPolicySpec(), CARTPOLE, pgengine.describe(CARTPOLE), seed=0)
    with pytest.raises(pgengine.ObservationError, match=message):
        policy.act(observation)


@pytest.mark.parametrize("seed", [-1, 2**53, 2**64])
def test_a_wrong_seed_is_said_by_name(seed: int) -> None:
    policy = between(NUMBERS, ACTIONS[0])
    with pytest.raises(ValueError, match="seed: expected an integer from 0 to 9007199254740991, or None"):
        policy.act(NUMBERS.sample(), seed=seed)
    assert policy.act(NUMBERS.sample(), seed=2**53 - 1) in (0, 1, 2)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_policy_is_read_from_a_path_and_from_bytes(tmp_path: Path) -> None:
    data = between(NUMBERS, ACTIONS[0]).to_bytes()
    path = tmp_path / "policy.safetensors"
    path.write_bytes(data)
    for source in (path, str(path), data, bytearray(data)):
        assert pgengine.load(source).to_bytes() == data


def state_of_a_run() -> bytes:
    stop = pgengine.StopSpec(updates=1, target_return=None)
    spec = pgengine.TrainingSpec(environment=GymnasiumSpec(id="pgengine/Chain-v0"), stop=stop)
    return next(pgengine.train(spec)).state()


def test_loading_a_file_that_is_no_policy_names_what_the_file_is(tmp_path: Path) -> None:
    data = between(NUMBERS, ACTIONS[0]).to_bytes()
    with zipfile.ZipFile(tmp_path / "policy.pt", "w") as archive:
        archive.writestr("data.pkl", b"")
    cases = {
        "other.safetensors": (safetensors.numpy.save({"x": np.zeros(3)}), "a safetensors file of something else"),
        "policy.pt": ((tmp_path / "policy.pt").read_bytes(), "a zip archive or a pickle"),
        "policy.pkl": (pickle.dumps({"x": 1}), "a zip archive or a pickle"),
        "answer.json": (b'{"title": "Unauthorized", "status": 401}', "text, .*Unauthorized"),
        "page.html": (b"<html><body>502 Bad Gateway</body></html>", "text, .*502"),
        "empty.safetensors": (b"", "it is empty"),
        "cut.safetensors": (data[:-5], "damaged"),
        "noise.safetensors": (bytes(range(1, 128)), "damaged, or something else"),
        "state.safetensors": (state_of_a_run(), "the state of a training run"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(pgengine.CheckpointError, match=f"{name} is not a policy: .*{message}"):
            pgengine.load(path)
        with pytest.raises(pgengine.CheckpointError, match=f"these bytes are not a policy: .*{message}"):
            pgengine.load(content)
    missing = [
        (tmp_path / "nowhere.safetensors", "there is no file .*nowhere.safetensors"),
        (str(tmp_path), "cannot be read: Is a directory"),
        ("bad\0name", "cannot be read"),
    ]
    for source, message in missing:
        with pytest.raises(pgengine.CheckpointError, match=message):
            pgengine.load(source)


def test_acting_at_home_needs_no_torch(tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    path.write_bytes(between(NUMBERS, ACTIONS[0]).to_bytes())
    program = (
        "import sys, numpy, pgengine\n"
        f"action = pgengine.load({str(path)!r}).act(numpy.zeros((2, 2)))\n"
        "assert action in (0, 1, 2)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
