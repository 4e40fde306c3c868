"""Environments that draw random numbers of their own, registered when this module is imported."""

import random
from typing import Any

import gymnasium
import numpy as np

GLOBAL_NUMPY, GLOBAL_PYTHON = "test/GlobalNumpy-v0", "test/GlobalPython-v0"


class Careless(gymnasium.Env[np.ndarray, Any]):
    """A walk of 5 steps whose rewards come from a generator that nobody has seeded."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, python: bool = False) -> None:
        self._python = python

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return np.ones(2, np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        drawn = random.random() if self._python else float(np.random.rand())
        return np.ones(2, np.float32), drawn + float(action), False, False, {}


for _id, _python in ((GLOBAL_NUMPY, False), (GLOBAL_PYTHON, True)):
    if _id not in gymnasium.registry:
        gymnasium.register(_id, entry_point=Careless, max_episode_steps=5, kwargs={"python": _python})
