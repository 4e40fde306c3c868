"""Environments whose observations and actions have several components, registered when this module is imported."""

from typing import Any

import gymnasium
import numpy as np

MULTI_DISCRETE, MULTI_BINARY, WIDE = "test/MultiDiscrete-v0", "test/MultiBinary-v0", "test/Wide-v0"
IDS = (MULTI_DISCRETE, MULTI_BINARY, WIDE)


class Components(gymnasium.Env[Any, Any]):
    """One step in which nothing matters."""

    def __init__(self, observation_space: Any, action_space: Any) -> None:
        self.observation_space = observation_space
        self.action_space = action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.observation_space.sample() * 0, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.observation_space.sample() * 0, 1.0, True, False, {}


def _register(name: str, observation_space: Any, action_space: Any) -> None:
    if name not in gymnasium.registry:
        kwargs = {"observation_space": observation_space, "action_space": action_space}
        gymnasium.register(name, entry_point=Components, max_episode_steps=2, kwargs=kwargs)


_register(MULTI_DISCRETE, gymnasium.spaces.MultiDiscrete([2, 5]), gymnasium.spaces.MultiDiscrete([3, 2], start=[1, 0]))
_register(MULTI_BINARY, gymnasium.spaces.MultiBinary(4), gymnasium.spaces.MultiBinary(3))
_register(WIDE, gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32), gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32))
