"""A linear system with quadratic costs: the environment in which Gaussian policies have exact answers.

Source: Sun, Policy Gradient, LQR as the case in which the optimum is known.
"""

import numpy as np
from jaxtyping import Bool, Float, UInt64

from pgengine.environments.arrays import array_of, check_each
from pgengine.environments.draws import normals, uniforms_of_words
from pgengine.environments.episodes import EnvironmentFacts, Step
from pgengine.errors import EnvironmentFailure, SpecError
from pgengine.spaces import BoxSpace
from pgengine.spec import LqrSpec

__all__ = ["Lqr"]

SYMMETRY = 1e-9  # how far a cost may be from symmetric or semidefinite, as a share of its largest entry
LARGEST = float(np.finfo(np.float32).max)


class Lqr:
    """x' = A x + B u + w with w ~ N(0, diag(noise_deviation^2)); reward -(x' Q x + u' R u), taken before the step.

    The state is kept in 64 bits; a policy sees it in 32, which moves exact answers by about 1e-7 of their size.

    Attributes:
        spec: What it was made from.
        A: [n, n] how the state goes on.
        B: [n, m] what an action adds.
        Q: [n, n] cost of the state.
        R: [m, m] cost of the action.
        noise_deviation: [n] standard deviation of each number's noise.
        initial_mean: [n] mean of the first state.
        initial_deviation: [n] standard deviation of each number of the first state.
        horizon: Steps of every episode.
        facts: What is known before an episode is played.
    """

    def __init__(self, spec: LqrSpec) -> None:
        """Checks and keeps the arrays.

        Raises:
            SpecError: if shapes do not fit, a cost is not symmetric or not definite as it must be, or a standard
                deviation is below 0; with a pointer at the cell where there is one.
        """
        self.spec = spec
        n, m = len(spec.dynamics), len(spec.control[0])
        if m == 0:
            raise SpecError("/control/0", "shape", f"expected shape [{n}, m] with at least one number of action")
        self.A = array_of(spec.dynamics, (n, n), "/dynamics")
        self.B = array_of(spec.control, (n, m), "/control")
        self.Q = _cost(spec.state_cost, n, "/state_cost")
        self.R = _cost(spec.action_cost, m, "/action_cost")
        if not np.linalg.eigvalsh(self.Q)[0] >= -SYMMETRY * np.abs(self.Q).max():
            raise SpecError("/state_cost", "not_semidefinite", "expected a matrix without negative eigenvalues")
        if not np.linalg.eigvalsh(self.R)[0] > SYMMETRY * np.abs(self.R).max():
            raise SpecError("/action_cost", "not_definite", "expected a matrix with positive eigenvalues alone")
        self.noise_deviation = _deviation(spec.noise_deviation, 0.0, n, "/noise_deviation")
        self.initial_mean = _numbers(spec.initial_mean, 0.0, n, "/initial_mean")
        self.initial_deviation = _deviation(spec.initial_deviation, 1.0, n, "/initial_deviation")
        self.horizon = spec.horizon
        self.facts = EnvironmentFacts(
            observation_space=BoxSpace(shape=[n], low=[None], high=[None], dtype="float32"),
            action_space=BoxSpace(shape=[m], low=[None], high=[None], dtype="float32"),
            max_episode_steps=spec.horizon,
            limit_from="horizon",
            fixed_steps=spec.horizon,
            exact="lqr",
        )
        self._states = np.zeros((0, n))
        self._steps = 0

    @property
    def uniforms(self) -> int:
        """One number for each of the state, rounded up to a pair; 0 without noise."""
        return _pairs(len(self.A)) if self.noise_deviation.any() else 0

    def begin(self, noise: UInt64[np.ndarray, "K"]) -> Float[np.ndarray, "K n"]:
        """Draws the first states."""
        n = len(self.A)
        drawn = normals(uniforms_of_words(noise, _pairs(n)), n)
        self._states = self.initial_mean + self.initial_deviation * drawn
        self._steps = 0
        return self._seen()

    def step(self, actions: Float[np.ndarray, "N m"], noise: Float[np.ndarray, "N U"] | None) -> Step:
        """Pays for the states and the actions, then moves the states on.

        Raises:
            EnvironmentFailure: if a state or a reward has grown beyond what can be represented.
        """
        x, u = self._states, np.asarray(actions, dtype=np.float64)
        with np.errstate(over="ignore", invalid="ignore"):  # looked for below
            rewards = -(_quadratic(x, self.Q) + _quadratic(u, self.R))
            self._states = _times(x, self.A) + _times(u, self.B)
            if noise is not None:
                self._states = self._states + self.noise_deviation * normals(noise, len(self.A))
        self._steps += 1
        if not (np.isfinite(rewards).all() and (np.abs(self._states) <= LARGEST).all()):
            raise EnvironmentFailure(
                f"the linear system's state or cost has grown beyond 32-bit floats in step {self._steps}: "
                "the policy does not hold it"
            )
        ended = np.full(len(u), self._steps >= self.horizon)
        return Step(self._seen(), rewards, np.zeros(len(u), dtype=bool), ended)

    def _seen(self) -> np.ndarray:
        return self._states.astype(np.float32)

    def keep(self, mask: Bool[np.ndarray, "N"]) -> None:
        """Goes on with the lanes of the mask."""
        self._states = self._states[mask]

    def close(self) -> None:
        """Holds nothing."""


def _pairs(n: int) -> int:
    return n + n % 2


def _times(rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Matrix times each row; unlike `@` it adds up each row alike however many there are."""
    product: np.ndarray = (rows[:, None, :] * matrix).sum(axis=2)
    return product


def _quadratic(rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    cost: np.ndarray = (rows * _times(rows, matrix)).sum(axis=1)
    return cost


def _numbers(values: list[float] | None, otherwise: float, n: int, pointer: str) -> np.ndarray:
    return np.full(n, otherwise) if values is None else array_of(values, (n,), pointer)


def _deviation(values: list[float] | None, otherwise: float, n: int, pointer: str) -> np.ndarray:
    deviation = _numbers(values, otherwise, n, pointer)
    check_each(deviation >= 0, pointer, "negative_deviation", "a standard deviation, 0 or above")
    return deviation


def _cost(values: list[list[float]], size: int, pointer: str) -> np.ndarray:
    matrix = array_of(values, (size, size), pointer)
    apart = np.abs(matrix - matrix.T) <= SYMMETRY * np.abs(matrix).max()
    check_each(apart, pointer, "not_symmetric", "the number that stands at the mirrored place")
    symmetric: np.ndarray = (matrix + matrix.T) / 2.0
    return symmetric
