"""The moving particle: a point in the plane that is steered to the origin, with discrete and with continuous actions.

Registered as `pgengine/Particle-v0` and `pgengine/ParticleContinuous-v0`; an episode takes 50 steps.

Source: Bereyhi, chapter 5, the moving particle in its two variants, with features x(s, a) = [x, y, a].
"""

from typing import Any, Generic, Literal, TypeVar

import gymnasium
import numpy as np

__all__ = ["ContinuousParticle", "Particle"]

STRIDE = 0.1  # how far a coordinate moves in one step at most
CELLS = 10  # strides from the origin to a wall

DIRECTIONS = {
    4: ["east", "north", "west", "south"],
    8: ["east", "north-east", "north", "north-west", "west", "south-west", "south", "south-east"],
}
MOVES = {
    "stay": (0, 0),
    "east": (1, 0),
    "north-east": (1, 1),
    "north": (0, 1),
    "north-west": (-1, 1),
    "west": (-1, 0),
    "south-west": (-1, -1),
    "south": (0, -1),
    "south-east": (1, -1),
}

Action = TypeVar("Action")


class _InTheSquare(gymnasium.Env[np.ndarray, Action], Generic[Action]):
    """What both have in common: the square from -1 to 1, what is seen of it, and the reward."""

    metadata = {"render_modes": ["ansi"], "render_fps": 4}

    def __init__(self, render_mode: str | None) -> None:
        self.observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.render_mode = render_mode
        self._position = np.zeros(2)

    def _seen(self) -> np.ndarray:
        return self._position.astype(np.float32)

    def _after_step(self) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return self._seen(), -float(self._position @ self._position), False, False, {}

    def render(self) -> Any:
        """The position."""
        x, y = self._position
        return f"({x:+.3f}, {y:+.3f})"


class Particle(_InTheSquare[np.int64]):
    """The particle moves one stride of 0.1 in one of four or eight directions, or stays; it begins on a grid.

    Observation [x, y], multiples of 0.1 from -1 to 1; a wall stops a coordinate. Reward -(x^2 + y^2) after the move.
    Action 0 stays, the others go east and on counterclockwise. A diagonal moves both coordinates by 0.1.

    Known answer: going along the coordinate that is farther off is optimal; over 50 steps J = -36.667 for staying,
    and the optimum is -2.7378 with four directions (by dynamic programming) and -11/7 = -1.5714 with eight.
    """

    def __init__(self, directions: Literal[4, 8] = 4, render_mode: str | None = None) -> None:
        """Begins at the origin; `reset` draws the first position.

        Args:
            directions: 4 or 8.
            render_mode: `ansi` for the position.

        Raises:
            ValueError: if the directions are neither 4 nor 8.
        """
        if directions not in DIRECTIONS:
            raise ValueError("expected 4 or 8 directions")
        super().__init__(render_mode)
        self.action_names = ["stay", *DIRECTIONS[directions]]
        self.action_space = gymnasium.spaces.Discrete(len(self.action_names))
        self._moves = np.array([MOVES[name] for name in self.action_names])
        self._cell = np.zeros(2, dtype=np.int64)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Draws a point of the grid, each equally likely."""
        super().reset(seed=seed)
        self._go_to(self.np_random.integers(-CELLS, CELLS + 1, size=2))
        return self._seen(), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Moves and pays."""
        self._go_to(np.clip(self._cell + self._moves[action], -CELLS, CELLS))
        return self._after_step()

    def _go_to(self, cell: np.ndarray) -> None:
        # counted in strides, so that no rounding adds up
        self._cell = cell
        self._position = cell / CELLS


class ContinuousParticle(_InTheSquare[np.ndarray]):
    """The particle moves by 0.1 times its action, a velocity [u, v] from -1 to 1; it begins anywhere in the square.

    Observation [x, y]; a wall stops a coordinate. Reward -(x^2 + y^2) after the move.

    Known answer: each coordinate goes to 0 as fast as it can, so that J = -2 sum_k (1 - k/10)^3 / 3 = -1.35 over 50
    steps; staying has J = -50 * 2/3.
    """

    def __init__(self, render_mode: str | None = None) -> None:
        """Begins at the origin; `reset` draws the first position.

        Args:
            render_mode: `ansi` for the position.
        """
        super().__init__(render_mode)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Draws a point of the square, uniformly."""
        super().reset(seed=seed)
        self._position = self.np_random.uniform(-1.0, 1.0, size=2)
        return self._seen(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Moves and pays; a velocity out of range counts as the nearest one in it."""
        velocity = np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0)
        self._position = np.clip(self._position + STRIDE * velocity, -1.0, 1.0)
        return self._after_step()
