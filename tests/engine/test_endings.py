"""How episodes of Gymnasium's environments end: by the task, by the environment's own cut, by our limit."""

import gymnasium
import numpy as np
import pytest

import pgengine
from pgengine.noise import Noise
from pgengine.rollout import Batch, rollout
from pgengine.spec import GymnasiumSpec, LinearPolicySpec


class Ending(gymnasium.Env[np.ndarray, int]):
    """Says in its third step what it was told to say."""

    observation_space = gymnasium.spaces.Box(-10, 10, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, terminated: bool = False, truncated: bool = False) -> None:
        self.says, self.steps = (terminated, truncated), 0

    def reset(self, *, seed: int | None = None, options: object = None) -> tuple[np.ndarray, dict[str, object]]:
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, object]]:
        self.steps += 1
        assert self.steps <= 3 or not any(self.says), "stepped after its end"
        terminated, truncated = self.says if self.steps == 3 else (False, False)
        return np.full(1, self.steps, np.float32), 1.0, terminated, truncated, {}


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    gymnasium.register("tests/Ending-v0", entry_point=Ending, max_episode_steps=10)


def play(limit: int | None, **says: bool) -> Batch:
    spec = GymnasiumSpec(id="tests/Ending-v0", arguments=says, max_episode_steps=limit)
    policy = pgengine.create_policy(LinearPolicySpec(), spec, pgengine.describe(spec), seed=0)
    return rollout(policy, pgengine.open_environment(spec), Noise(0, "training", 0), 2)


@pytest.mark.parametrize(("says", "limit", "length", "terminated"), [
    ({}, None, 10, False),
    ({"truncated": True}, None, 3, False),
    ({"terminated": True}, None, 3, True),
    ({"terminated": True, "truncated": True}, None, 3, True),
    ({"terminated": True}, 3, 3, True),
    ({"terminated": True, "truncated": True}, 3, 3, True),
    ({"truncated": True}, 3, 3, False),
    ({"terminated": True}, 2, 2, False),
])  # fmt: skip
def test_an_episode_ends_once_and_terminated_wins(
    says: dict[str, bool], limit: int | None, length: int, terminated: bool
) -> None:
    batch = play(limit, **says)
    assert batch.lengths.tolist() == [length] * 2
    assert batch.terminated.tolist() == [terminated] * 2
    assert batch.truncated.tolist() == [not terminated] * 2
    assert batch.final_observations.tolist() == [[length]] * 2
    assert batch.observations[:, 0].tolist() == [*range(length)] * 2
