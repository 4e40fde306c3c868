"""Environments that go wrong in ways that real ones do. Imported by name through PGENGINE_ENVIRONMENT_MODULES."""

import os
import signal
import sys
import threading
from typing import Any

import gymnasium
import numpy as np

STEPS_BEFORE = 300
"""Steps, over all episodes of a trainer, before an environment goes wrong."""

IN_A_TRAINER = getattr(sys.modules["__main__"].__spec__, "name", None) == "server.worker.trainer"
"""Whoever describes an environment plays it, too; a test that has described one some times must go on."""


class Walk(gymnasium.Env[np.ndarray, Any]):
    """A walk of 10 steps in which nothing matters."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)
    steps_of_all = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        type(self).steps_of_all += 1
        if IN_A_TRAINER and type(self).steps_of_all > STEPS_BEFORE:
            self.go_wrong()
        return np.zeros(2, np.float32), float(action), False, False, {}

    def go_wrong(self) -> None:
        """What happens after so many steps."""


class Raising(Walk):
    """Raises, and is well again in the next job."""

    def go_wrong(self) -> None:
        type(self).steps_of_all = 0
        raise RuntimeError("the robot fell over\0")


class Greedy(Walk):
    """Wants more memory than there is."""

    def go_wrong(self) -> None:
        type(self).steps_of_all = 0
        np.ones(2**50)


class Swelling(Walk):
    """Keeps what it has seen, more with each step."""

    def go_wrong(self) -> None:
        kept = []
        while True:
            kept.append(bytearray(2**24))


class Starved(Walk):
    """Takes most of the memory that it may have, and is then ended as by the kernel."""

    def go_wrong(self) -> None:
        kept = bytearray(700 * 2**20)
        kept[:: 2**12] = b"x" * len(kept[:: 2**12])
        os.kill(os.getpid(), signal.SIGKILL)


class Hanging(Walk):
    """Never comes back, and does not care about SIGTERM."""

    def go_wrong(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("an environment hangs", flush=True)
        threading.Event().wait()


class Crashing(Walk):
    """Takes its process with it, each time."""

    def go_wrong(self) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)


for environment in (Raising, Greedy, Swelling, Starved, Hanging, Crashing):
    gymnasium.register(f"{environment.__name__}-v0", environment, max_episode_steps=10)
