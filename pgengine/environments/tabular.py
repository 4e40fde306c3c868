"""Finite Markov decision processes given as arrays: the environments whose gradients are known exactly.

Source: Sun, Policy Gradient, M = {T, r, H, mu, S, A}; Lin, MDP components p(s0), p(s'|s,a), r(s,a); Bereyhi, chapter 5,
random rewards p(s', r|s, a).
"""

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

from pgengine.environments.arrays import array_of, check_each, probabilities_of
from pgengine.environments.draws import cumulated, index_at, normals, uniform_of_word
from pgengine.environments.episodes import EnvironmentFacts, Step
from pgengine.environments.ranges import Moves, range_of_moves
from pgengine.errors import EnvironmentFailure, SpecError
from pgengine.spaces import DiscreteSpace
from pgengine.spec import TabularSpec

__all__ = ["LONGEST_EPISODE", "TabularMDP"]

LONGEST_EPISODE = 1_000_000
"""Steps in which an episode has to end where nothing limits it: it is never cut, but fails."""


class TabularMDP:
    """A finite MDP with S states and A actions, of which a policy sees one of O observations.

    Attributes:
        spec: What it was made from.
        transitions: [S, A, S] probability of the next state; rows of terminal states are not read.
        rewards: [S, A, S] expected reward of a transition.
        reward_values: [S, A, R] values that a random reward can take, or None where rewards are not drawn from a list.
        reward_probabilities: [S, A, R] their probabilities, independent of the next state, or None.
        reward_deviation: [S, A] standard deviation of Gaussian noise on the reward, or None where there is none.
        initial: [S] probability of the first state.
        terminal: [S] whether an episode ends on entering the state.
        horizon: Episode limit in environment steps, or None.
        observations: [S] what a policy sees of each state, from 0 to O - 1; the state itself if nothing else is said.
        features: [O, A, J] features x(s, a), or None.
        facts: What is known before an episode is played.
    """

    def __init__(
        self,
        spec: TabularSpec,
        *,
        limit_from: Literal["id", "declared", "horizon"] = "horizon",
        reward_threshold: float | None = None,
    ) -> None:
        """Checks and keeps the arrays.

        Args:
            spec: The arrays.
            limit_from: Who set the horizon, if there is one.
            reward_threshold: Mean return at which the environment counts as solved, if it is a registered one.

        Raises:
            SpecError: with a pointer at the cell that is wrong.
        """
        self.spec = spec
        S, A = len(spec.transitions), len(spec.transitions[0])
        self.terminal = _terminal(spec.terminal, S)
        self.transitions = probabilities_of(spec.transitions, (S, A, S), "/transitions", ~self.terminal[:, None])
        self.initial = _initial(spec.initial, self.terminal)
        self.reward_values: Float[np.ndarray, "S A R"] | None = None
        self.reward_probabilities: Float[np.ndarray, "S A R"] | None = None
        if _reward_kind(spec) == "drawn":
            self.reward_values, self.reward_probabilities = _drawn_rewards(spec, S, A, ~self.terminal[:, None])
            means = (self.reward_values * self.reward_probabilities).sum(axis=2)
            self.rewards = np.repeat(means[:, :, None], S, axis=2)
            self._reward_cdf = cumulated(self.reward_probabilities)
        else:
            self.rewards = _rewards(spec, S, A)
        self.reward_deviation = _deviation(spec, S, A)
        self.observations = _observations(spec, S)
        kinds = int(self.observations.max()) + 1  # O
        self.features = None if spec.features is None else _features(spec.features, kinds, A)
        self.horizon = spec.horizon
        self._limit = LONGEST_EPISODE if spec.horizon is None else spec.horizon
        self._initial_cdf = cumulated(self.initial)
        self._cdf = cumulated(self.transitions)
        self._sees_states = bool((self.observations == np.arange(S)).all())
        fixed_steps, limit_cuts = self._lengths()
        moves = self._moves()
        self.facts = EnvironmentFacts(
            observation_space=DiscreteSpace(n=kinds),
            action_space=DiscreteSpace(n=A),
            max_episode_steps=self._limit,
            limit_from="none" if spec.horizon is None else limit_from,
            fixed_steps=fixed_steps,
            limit_cuts=limit_cuts,
            ends_for_certain=spec.horizon is not None or self._ends(),
            reward_threshold=reward_threshold,
            return_range=None if moves is None else range_of_moves(moves, spec.horizon, may_end=False),
            cut_return_range=None if moves is None else range_of_moves(moves, spec.horizon, may_end=True),
            exact="finite_mdp",
            states=S,
            state_names=_observation_names(spec, self.observations, kinds),
            action_names=_names(spec.action_names, A, "/action_names"),
        )
        self._states = np.zeros(0, dtype=np.int64)
        self._steps = 0

    def _moves(self) -> Moves | None:
        """All moves that have a probability; None if a reward has Gaussian noise, which knows no bounds."""
        if self.reward_deviation is not None and np.any(self.reward_deviation[~self.terminal] > 0.0):
            return None
        before, actions, after = np.nonzero(self.transitions * ~self.terminal[:, None, None])
        rewards = self.rewards[before, actions, after]
        if self.reward_values is not None and self.reward_probabilities is not None:
            move, drawn = np.nonzero(self.reward_probabilities[before, actions] > 0.0)
            rewards = self.reward_values[before[move], actions[move], drawn]
            before, after = before[move], after[move]
        return Moves(before, after, rewards, self.initial > 0.0)

    def _lengths(self) -> tuple[int | None, bool]:
        """How long every episode is, if all are equally long, and whether some may reach the limit unfinished.

        Follows the set of states in which an episode may still be going on, until it is empty or comes back. S steps
        are enough: a path as long as that goes in a circle, and any end that can be reached is reached sooner.
        """
        moves: np.ndarray = np.any(self.transitions > 0, axis=1)
        live: np.ndarray = self.initial > 0
        lengths, seen = set(), set()
        for t in range(1, min(self._limit, len(live)) + 1):
            reached: np.ndarray = np.any(moves[live], axis=0)
            if np.any(reached & self.terminal):
                lengths.add(t)
            live = reached & ~self.terminal
            if not live.any():
                return (lengths.pop() if len(lengths) == 1 else None), False
            if live.tobytes() in seen:
                break
            seen.add(live.tobytes())
        if self.horizon is None:
            return None, False
        return (None if lengths - {self.horizon} else self.horizon), True

    def _ends(self) -> bool:
        """Whether every episode ends with probability 1, whoever acts.

        It does unless a policy can stay for ever within some set of live states that an episode can reach: each state
        of such a set has an action all of whose next states belong to it. The largest one is found by taking out what
        cannot stay, until nothing changes.
        """
        support = self.transitions > 0
        moves: np.ndarray = np.any(support, axis=1) & ~self.terminal
        staying: np.ndarray = self.initial > 0
        while True:
            grown = staying | np.any(moves[staying], axis=0)
            if (grown == staying).all():
                break
            staying = grown
        weights = support.astype(np.float32)
        while staying.any():
            leaves: np.ndarray = weights @ (~staying).astype(np.float32) > 0
            kept = staying & ~leaves.all(axis=1)
            if (kept == staying).all():
                return False
            staying = kept
        return True

    @property
    def uniforms(self) -> int:
        """One number for the transition, one more where rewards are drawn from a list, two more for Gaussian noise."""
        return 1 + (self.reward_values is not None) + 2 * (self.reward_deviation is not None)

    def begin(self, noise: UInt64[np.ndarray, "K"]) -> Int[np.ndarray, "K"]:
        """Draws the first states."""
        self._states = index_at(self._initial_cdf[None, :], uniform_of_word(noise))
        self._steps = 0
        return self._seen()

    def step(self, actions: Int[np.ndarray, "N"], noise: Float[np.ndarray, "N U"] | None) -> Step:
        """Draws the next states, and the rewards where they are random.

        Raises:
            EnvironmentFailure: if an episode without a horizon has not ended in 1,000,000 steps. To cut it there would
                change the objective without a word.
        """
        assert noise is not None
        before = self._states
        self._states = index_at(self._cdf[before, actions], noise[:, 0])
        rewards = self.rewards[before, actions, self._states]
        if self.reward_values is not None:
            drawn = index_at(self._reward_cdf[before, actions], noise[:, 1])
            rewards = self.reward_values[before, actions, drawn]
        if self.reward_deviation is not None:
            rewards = rewards + self.reward_deviation[before, actions] * normals(noise[:, -2:], 1)[:, 0]
        self._steps += 1
        terminated = self.terminal[self._states]
        truncated = ~terminated & (self._steps >= self._limit)
        if self.horizon is None and truncated.any():
            raise EnvironmentFailure(f"no end within {LONGEST_EPISODE:,} steps; declare a horizon")
        return Step(self._seen(), rewards, terminated, truncated)

    def _seen(self) -> np.ndarray:
        return self._states if self._sees_states else self.observations[self._states]

    def keep(self, mask: Bool[np.ndarray, "N"]) -> None:
        """Goes on with the lanes of the mask."""
        self._states = self._states[mask]

    def close(self) -> None:
        """Holds nothing."""


def _terminal(indices: list[int], S: int) -> np.ndarray:
    terminal = np.zeros(S, dtype=bool)
    for position, index in enumerate(indices):
        if index >= S:
            raise SpecError(f"/terminal/{position}", "out_of_range", f"expected a state from 0 to {S - 1}")
        terminal[index] = True
    return terminal


def _initial(values: list[float], terminal: np.ndarray) -> np.ndarray:
    initial = probabilities_of(values, terminal.shape, "/initial")
    expected = "0: no episode can begin in a terminal state"
    check_each((initial == 0) | ~terminal, "/initial", "initial_terminal", expected)
    return initial


def _reward_kind(spec: TabularSpec) -> Literal["known", "drawn"]:
    drawn = spec.reward_values is not None or spec.reward_probabilities is not None
    if (spec.rewards is not None) + (spec.transition_rewards is not None) + drawn != 1:
        raise SpecError(
            "/rewards",
            "one_of",
            "expected exactly one of rewards, transition_rewards, and reward_values with reward_probabilities",
        )
    for name in ("reward_values", "reward_probabilities"):
        if drawn and getattr(spec, name) is None:
            raise SpecError(f"/{name}", "missing", "reward_values and reward_probabilities belong together")
    return "drawn" if drawn else "known"


def _rewards(spec: TabularSpec, S: int, A: int) -> np.ndarray:
    if spec.rewards is not None:
        return np.repeat(array_of(spec.rewards, (S, A), "/rewards")[:, :, None], S, axis=2)
    return array_of(spec.transition_rewards, (S, A, S), "/transition_rewards")


def _drawn_rewards(spec: TabularSpec, S: int, A: int, used: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    assert spec.reward_values is not None
    shape = (S, A, len(spec.reward_values))
    values = np.tile(np.array(spec.reward_values, dtype=np.float64), (S, A, 1))
    return values, probabilities_of(spec.reward_probabilities, shape, "/reward_probabilities", used)


def _deviation(spec: TabularSpec, S: int, A: int) -> np.ndarray | None:
    if spec.reward_deviation is None:
        return None
    deviation = array_of(spec.reward_deviation, (S, A), "/reward_deviation")
    check_each(deviation >= 0, "/reward_deviation", "negative_deviation", "a standard deviation, 0 or above")
    return deviation if deviation.any() else None


def _observations(spec: TabularSpec, S: int) -> np.ndarray:
    if spec.observations is None:
        return np.arange(S)
    return array_of(spec.observations, (S,), "/observations").astype(np.int64)


def _features(values: list[list[list[float]]], kinds: int, A: int) -> np.ndarray:
    J = len(values[0][0]) if values and values[0] else 0
    if J == 0:
        raise SpecError("/features", "shape", f"expected shape [{kinds}, {A}, J] with at least one feature")
    return array_of(values, (kinds, A, J), "/features")


def _names(names: list[str] | None, count: int, pointer: str) -> list[str] | None:
    if names is not None and len(names) != count:
        raise SpecError(pointer, "shape", f"expected {count} names, found {len(names)}")
    return names


def _observation_names(spec: TabularSpec, observations: np.ndarray, kinds: int) -> list[str] | None:
    """States that look alike share a name made of theirs."""
    names = _names(spec.state_names, len(observations), "/state_names")
    if names is None:
        return None
    alike: list[dict[str, None]] = [{} for _ in range(kinds)]
    for name, o in zip(names, observations.tolist(), strict=True):
        alike[o][name] = None
    return [" | ".join(shared) if shared else str(o) for o, shared in enumerate(alike)]
