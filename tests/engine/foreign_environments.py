"""Environments as other people write them, registered when this module is imported."""

import itertools
import random
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, Literal

import gymnasium
import numpy as np
from gymnasium import spaces
from pydantic import Field

if TYPE_CHECKING:
    from decimal import Decimal

Info = dict[str, Any]
BOX = spaces.Box(-1.0, 1.0, (2,), np.float32)


class Says(gymnasium.Env[Any, Any]):
    """Returns what it was made with; an episode has three steps."""

    def __init__(self, space: Any, reset: Any, step: Any) -> None:
        self.observation_space = space
        self.action_space = spaces.Discrete(2)
        self._reset, self._step = reset, step

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> Any:
        super().reset(seed=seed)
        return self._reset

    def step(self, action: Any) -> Any:
        return self._step


class Drawing(gymnasium.Env[Any, Any]):
    """Shows a number in each step; where it comes from is what the classes below differ in."""

    observation_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def number(self) -> float:
        return float(self.np_random.random())

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[np.ndarray, Info]:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, Info]:
        return np.full(1, self.number(), np.float32), 0.0, False, False, {}


class FromRandom(Drawing):
    def number(self) -> float:
        return random.random()


class FromNumpy(Drawing):
    def number(self) -> float:
        return float(np.random.random())


class FromConstructor(Drawing):
    """Is another world each time that it is made, as Gymnasium's FrozenLake without a map is."""

    def __init__(self) -> None:
        self.shown = random.random()

    def number(self) -> float:
        return self.shown


class FromEarlierEpisodes(Drawing):
    """Is another world in each episode."""

    episodes = itertools.count()
    shown = 0.0

    def number(self) -> float:
        return self.shown

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[np.ndarray, Info]:
        self.shown = (next(self.episodes) % 7) / 7
        return super().reset(seed=seed)


class Rewarding(Drawing):
    """Pays what `random` draws, and shows nothing of it."""

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, Info]:
        return np.zeros(1, np.float32), random.random(), False, False, {}


class Ending(Drawing):
    """Ends when `random` says so, and shows nothing of it."""

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, Info]:
        return np.zeros(1, np.float32), 0.0, random.random() < 0.5, False, {}


class SeedingNumpy(Drawing):
    """Sets the generator of the whole process, as code from before `Generator` does."""

    def number(self) -> float:
        return float(np.random.random())

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[np.ndarray, Info]:
        np.random.seed(seed)
        return np.full(1, np.random.random(), np.float32), {}


class SeedingC(Drawing):
    """Keeps its seed in an integer of C."""

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[np.ndarray, Info]:
        if seed is not None:
            self.kept = np.int32(seed)
        return super().reset(seed=seed)


class Flaky(Drawing):
    """Fails at every second reset, whatever the seed."""

    resets = itertools.count()

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[np.ndarray, Info]:
        if next(self.resets) % 2 == 0:
            raise ValueError("the simulator was not ready")
        return super().reset(seed=seed)


class OldReset(Drawing):
    def reset(self) -> np.ndarray:  # type: ignore[override]
        return np.zeros(1, np.float32)


class Level(Enum):
    EASY = "easy"
    HARD = "hard"


class Game(Drawing):
    """Takes what games take."""

    def __init__(
        self,
        game: str,
        mode: "int | None" = None,
        obs_type: Literal["rgb", "grayscale", "ram"] = "rgb",
        frameskip: tuple[int, int] | int = 4,
        chance: Annotated[float, Field(ge=0.0, le=1.0)] = 0.25,
        level: Level = Level.EASY,
        sizes: list[int] | None = None,
        rewards: dict[str, float] | None = None,
        goal: "np.ndarray | None" = None,
        price: "Decimal | None" = None,
        hook: Callable[[], None] | None = None,
        free=None,  # type: ignore[no-untyped-def]
        rom_path: str = "",
        render_mode: str | None = None,
    ) -> None:
        if type(frameskip) not in (int, tuple):
            raise TypeError(f"Invalid frameskip type: {type(frameskip)}.")
        self.given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}


class Open(Drawing):
    """Takes whatever it is given."""

    def __init__(self, **settings: Any) -> None:
        self.given = settings


class Refusing(Drawing):
    def __init__(self, reason: str = "the licence has expired") -> None:
        raise SystemExit(reason)


class Continuous(gymnasium.Env[Any, Any]):
    """One step; pays the more the nearer the action is to the target."""

    observation_space = BOX

    def __init__(self, low: float, high: float, target: float) -> None:
        self.action_space = spaces.Box(low, high, (1,), np.float32)
        self._target, self._half = target, (high - low) / 2

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[np.ndarray, Info]:
        super().reset(seed=seed)
        return np.ones(2, np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, Info]:
        return np.ones(2, np.float32), -abs(float(action[0]) - self._target) / self._half, True, False, {}


class Narrow(Continuous):
    """Pays 1 within a tenth of the box around the target, and nothing elsewhere."""

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, Info]:
        return np.ones(2, np.float32), float(abs(float(action[0]) - self._target) <= 0.2 * self._half), True, False, {}


class Picture(Drawing):
    observation_space = spaces.Box(0, 255, (84, 84, 3), np.uint8)

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[np.ndarray, Info]:
        super().reset(seed=seed)
        return np.zeros((84, 84, 3), np.uint8), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, Info]:
        return np.zeros((84, 84, 3), np.uint8), 1.0, False, False, {}


class Composite(Drawing):
    """Shows a dictionary."""

    observation_space = spaces.Dict(a=spaces.Discrete(3), b=BOX)  # type: ignore[assignment]


class TwoActions(Drawing):
    action_space = spaces.Tuple([spaces.Discrete(2), BOX])  # type: ignore[assignment]


CLASSES: tuple[type[gymnasium.Env[Any, Any]], ...] = (
    FromRandom, FromNumpy, FromConstructor, FromEarlierEpisodes, Rewarding, Ending, SeedingNumpy, SeedingC, Flaky,
    OldReset, Drawing, Open, Refusing, Picture, Composite, TwoActions, Continuous, Says,
)  # fmt: skip
for environment in CLASSES:
    name = f"foreign/{environment.__name__}-v0"
    if name not in gymnasium.registry:
        gymnasium.register(name, environment, max_episode_steps=30 if environment is Ending else 3)
if "foreign/Game-v0" not in gymnasium.registry:
    gymnasium.register("foreign/Game-v0", Game, max_episode_steps=3, kwargs={"game": "pong"})
    gymnasium.register("foreign/Wide-v0", Continuous, max_episode_steps=1, kwargs={"low": 0, "high": 90, "target": 70})
    gymnasium.register("foreign/Narrow-v0", Narrow, max_episode_steps=1, kwargs={"low": 0, "high": 90, "target": 60})
    gymnasium.register("foreign/Usual-v0", Continuous, max_episode_steps=1, kwargs={"low": -2, "high": 2, "target": 1})
