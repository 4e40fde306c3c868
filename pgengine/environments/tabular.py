"""Finite Markov decision processes given as arrays: the environments whose gradients are known exactly.

Source: Sun, Policy Gradient, M = {T, r, H, mu, S, A}; Lin, MDP components p(s0), p(s'|s,a), r(s,a).
"""

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

from pgengine.environments.episodes import EnvironmentFacts, Step
from pgengine.errors import SpecError
from pgengine.spaces import DiscreteSpace
from pgengine.spec import TabularSpec

__all__ = ["TabularMDP"]

TOLERANCE = 1e-9  # how far a row of probabilities may be from 1
LONGEST_SEARCH = 10_000  # steps after which a set of states that has not come back is taken to go on for ever


class TabularMDP:
    """A finite MDP with S states, A actions and a horizon.

    Attributes:
        transitions: [S, A, S] probability of the next state; rows of terminal states are not read.
        rewards: [S, A, S] reward of a transition.
        initial: [S] probability of the first state.
        terminal: [S] whether an episode ends on entering the state.
        horizon: Episode limit in environment steps.
        features: [S, A, J] features x(s, a), or None.
    """

    def __init__(self, spec: TabularSpec) -> None:
        """Checks and keeps the arrays.

        Raises:
            SpecError: with a pointer at the cell that is wrong.
        """
        self.spec = spec
        S, A = len(spec.transitions), len(spec.transitions[0])
        self.transitions = _array(spec.transitions, (S, A, S), "/transitions")
        self.initial = _array(spec.initial, (S,), "/initial")
        self.terminal = _terminal(spec.terminal, S)
        self.rewards = _rewards(spec, S, A)
        self.features = None if spec.features is None else _features(spec.features, S, A)
        self.horizon = spec.horizon
        self._check_probabilities()
        self._initial_cdf = _cdf(self.initial)
        self._cdf = _cdf(self.transitions)
        self.facts = self._describe()
        self._states = np.zeros(0, dtype=np.int64)
        self._steps = 0

    def _check_probabilities(self) -> None:
        if abs(self.initial.sum() - 1.0) > TOLERANCE:
            raise SpecError("/initial", "probabilities_sum", f"expected a sum of 1, found {self.initial.sum():.12g}")
        for s in np.flatnonzero(self.terminal & (self.initial > 0)):
            raise SpecError(f"/initial/{s}", "initial_terminal", f"state {s} is terminal: no episode can begin in it")
        sums = self.transitions.sum(axis=2)
        wrong = (np.abs(sums - 1.0) > TOLERANCE) & ~self.terminal[:, None]
        for s, a in np.argwhere(wrong):
            raise SpecError(
                f"/transitions/{s}/{a}",
                "probabilities_sum",
                f"expected a row that sums to 1, found {sums[s, a]:.12g}",
            )

    def _describe(self) -> EnvironmentFacts:
        S, A, _ = self.transitions.shape
        fixed_steps, limit_cuts = self._lengths()
        return EnvironmentFacts(
            observation_space=DiscreteSpace(n=S),
            action_space=DiscreteSpace(n=A),
            max_episode_steps=self.horizon,
            limit_from="horizon",
            fixed_steps=fixed_steps,
            limit_cuts=limit_cuts,
        )

    def _lengths(self) -> tuple[int | None, bool]:
        """How long every episode is, if all are equally long, and whether some may reach the horizon unfinished.

        Follows the set of states in which an episode may still be going on, until it is empty or comes back.
        """
        moves: np.ndarray = np.any(self.transitions > 0, axis=1)
        live: np.ndarray = self.initial > 0
        lengths, seen = set(), set()
        for t in range(1, min(self.horizon, LONGEST_SEARCH) + 1):
            reached: np.ndarray = np.any(moves[live], axis=0)
            if np.any(reached & self.terminal):
                lengths.add(t)
            live = reached & ~self.terminal
            if not live.any():
                return (lengths.pop() if len(lengths) == 1 else None), False
            if live.tobytes() in seen:
                break
            seen.add(live.tobytes())
        return (None if lengths - {self.horizon} else self.horizon), True

    @property
    def takes_noise(self) -> bool:
        """Transitions are drawn by inverting their distribution function at the noise."""
        return True

    def begin(self, noise: UInt64[np.ndarray, "K"]) -> Int[np.ndarray, "K"]:
        """Draws the first states."""
        uniforms = (noise >> np.uint64(11)) * 2.0**-53
        self._states = _invert(self._initial_cdf[None, :], uniforms)
        self._steps = 0
        return self._states

    def step(self, actions: Int[np.ndarray, "N"], noise: Float[np.ndarray, "N"] | None) -> Step:
        """Draws the next states."""
        assert noise is not None
        before = self._states
        self._states = _invert(self._cdf[before, actions], noise)
        self._steps += 1
        terminated = self.terminal[self._states]
        truncated = ~terminated & (self._steps >= self.horizon)
        return Step(self._states, self.rewards[before, actions, self._states], terminated, truncated)

    def keep(self, mask: Bool[np.ndarray, "N"]) -> None:
        """Goes on with the lanes of the mask."""
        self._states = self._states[mask]

    def close(self) -> None:
        """Holds nothing."""


def _array(values: object, shape: tuple[int, ...], pointer: str) -> np.ndarray:
    _check_shape(values, shape, pointer, shape)
    return np.array(values, dtype=np.float64)


def _check_shape(values: object, shape: tuple[int, ...], pointer: str, whole: tuple[int, ...]) -> None:
    if not shape:
        return
    if not isinstance(values, list) or len(values) != shape[0]:
        found = len(values) if isinstance(values, list) else "no list"
        raise SpecError(pointer, "shape", f"expected shape {list(whole)}: {shape[0]} entries here, found {found}")
    for index, value in enumerate(values):
        _check_shape(value, shape[1:], f"{pointer}/{index}", whole)


def _terminal(indices: list[int], S: int) -> np.ndarray:
    terminal = np.zeros(S, dtype=bool)
    for position, index in enumerate(indices):
        if index >= S:
            raise SpecError(f"/terminal/{position}", "out_of_range", f"expected a state from 0 to {S - 1}")
        terminal[index] = True
    return terminal


def _rewards(spec: TabularSpec, S: int, A: int) -> np.ndarray:
    if (spec.rewards is None) == (spec.transition_rewards is None):
        raise SpecError("/rewards", "one_of", "expected exactly one of rewards and transition_rewards")
    if spec.rewards is not None:
        return np.repeat(_array(spec.rewards, (S, A), "/rewards")[:, :, None], S, axis=2)
    return _array(spec.transition_rewards, (S, A, S), "/transition_rewards")


def _features(values: list[list[list[float]]], S: int, A: int) -> np.ndarray:
    J = len(values[0][0]) if values and values[0] else 0
    if J == 0:
        raise SpecError("/features", "shape", "expected shape [S, A, J] with at least one feature")
    return _array(values, (S, A, J), "/features")


def _cdf(probabilities: np.ndarray) -> np.ndarray:
    """Distribution function with its last possible value at exactly 1, so that nothing impossible is drawn."""
    cdf = np.cumsum(probabilities, axis=-1)
    last = probabilities.shape[-1] - 1 - np.argmax(probabilities[..., ::-1] > 0, axis=-1)
    return np.where(np.arange(probabilities.shape[-1]) >= last[..., None], 1.0, cdf)


def _invert(cdf: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    states: np.ndarray = np.count_nonzero(cdf[..., :-1] <= uniforms[:, None], axis=-1)
    return states
