"""Gymnasium environments that publish their own transition table, read into finite MDPs.

Such a class keeps `P[s][a]`, a list of (probability, next state, reward, terminated), and `initial_state_distrib`, and
its `step` does nothing but draw from them. An episode of the finite MDP that is read is distributed as one of the
environment, and uses other random numbers. A class of one's own says so with `steps_by_table = True`, and may say with
`observed_as`, `state_names` and `action_names` what is seen of each state and what people call them.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from pgengine.environments.gymnasium import GymnasiumEpisodes
from pgengine.spec import GymnasiumSpec, TabularSpec

__all__ = ["published_table", "read_table"]

TOLERANCE = 1e-9  # how far a row of probabilities may be from 1

# classes whose step was read and does nothing but draw from P, with what people call their actions
_TOY_TEXT: dict[str, list[str]] = {
    "gymnasium.envs.toy_text.cliffwalking.CliffWalkingEnv": ["up", "right", "down", "left"],
    "gymnasium.envs.toy_text.frozen_lake.FrozenLakeEnv": ["left", "down", "right", "up"],
    "gymnasium.envs.toy_text.taxi.TaxiEnv": ["south", "north", "east", "west", "pick up", "drop off"],
}

_Outcome = tuple[float, int, float, bool]  # probability, next state, reward, terminated
_Arrival = tuple[int, bool, int]  # state, whether the episode ends there, rank among rewards of one and the same move


def read_table(spec: GymnasiumSpec) -> TabularSpec | None:
    """The finite MDP that a registered environment is, with its arguments and its episode limit.

    Returns:
        None if the environment publishes no table, or if its `step` does more than the table says.

    Raises:
        SpecError: if the environment cannot be had, or has no episode limit.
    """
    episodes = GymnasiumEpisodes(spec)
    try:
        return published_table(episodes)
    finally:
        episodes.close()


def published_table(episodes: GymnasiumEpisodes) -> TabularSpec | None:
    """The finite MDP that an opened environment publishes; see `read_table`."""
    environment = episodes.instance
    # a wrapper may change what the table says
    if environment is not environment.unwrapped or not _is_played_by_table(environment, episodes.spec):
        return None
    table = _Table(environment)
    return table.spec(episodes.facts.max_episode_steps) if table.is_sound() else None


def _is_played_by_table(environment: Any, spec: GymnasiumSpec) -> bool:
    if not hasattr(environment, "P") or not hasattr(environment, "initial_state_distrib"):
        return False
    if getattr(environment, "steps_by_table", False):
        return True
    if _class_name(environment) not in _TOY_TEXT:
        return False
    # a fickle passenger changes the destination beside the table; a lake without a name is another one each time
    return not getattr(environment, "fickle_passenger", False) and spec.arguments.get("map_name", "") is not None


def _class_name(environment: Any) -> str:
    return f"{type(environment).__module__}.{type(environment).__qualname__}"


class _Table:
    """P with a state for each way of arriving that a finite MDP has to tell apart.

    In a finite MDP it depends on the state alone whether an episode ends in it, and the reward on (s, a, s'). P is
    freer: a state may be entered both at the end of an episode and in its middle, and one move may lead to one state
    with several rewards (a slip off the cliff and a step on the spot both lead to the start). Such a state becomes
    several, which go on alike and look alike, so that nothing changes for a policy.
    """

    def __init__(self, environment: Any) -> None:
        self.environment = environment
        self.S, self.A = len(environment.P), int(environment.action_space.n)
        self.initial = np.asarray(environment.initial_state_distrib, dtype=np.float64)
        self.seen = [int(o) for o in getattr(environment, "observed_as", range(self.S))]

    def outcomes(self, s: int, a: int) -> Iterator[_Outcome]:
        """What may follow, the impossible left out."""
        for p, after, reward, terminated in self.environment.P[s][a]:
            if p:
                yield float(p), int(after), float(reward), bool(terminated)

    def is_sound(self) -> bool:
        """Whether the table is one of a finite MDP; arguments such as a probability of 1.5 make it something else."""
        space = self.environment.observation_space
        return (
            self.initial.shape == (self.S,)
            and bool((self.initial >= 0).all())
            and abs(self.initial.sum() - 1.0) <= TOLERANCE
            and (int(space.n), int(space.start)) == (max(self.seen) + 1, 0)
            and int(self.environment.action_space.start) == 0
            and all(self._is_sound_row(list(self.outcomes(s, a))) for s in range(self.S) for a in range(self.A))
        )

    def _is_sound_row(self, outcomes: list[_Outcome]) -> bool:
        return (
            abs(sum(p for p, *_ in outcomes) - 1.0) <= TOLERANCE
            and all(p > 0 and 0 <= after < self.S for p, after, _, _ in outcomes)
            and bool(np.isfinite([reward for _, _, reward, _ in outcomes]).all())
        )

    def reached(self) -> list[int]:
        """States in which an episode may be going on."""
        found = set(np.flatnonzero(self.initial).tolist())
        stack = list(found)
        while stack:
            s = stack.pop()
            for a in range(self.A):
                for _, after, _, terminated in self.outcomes(s, a):
                    if not terminated and after not in found:
                        found.add(after)
                        stack.append(after)
        return sorted(found)

    def arrivals(self, s: int, a: int) -> dict[_Arrival, tuple[float, float]]:
        """Probability and reward of each arrival."""
        merged: dict[tuple[int, bool], dict[float, float]] = {}
        for p, after, reward, terminated in self.outcomes(s, a):
            rewards = merged.setdefault((after, terminated), {})
            rewards[reward] = rewards.get(reward, 0.0) + p
        return {
            (after, terminated, rank): (p, reward)
            for (after, terminated), rewards in merged.items()
            for rank, (reward, p) in enumerate(sorted(rewards.items()))
        }

    def spec(self, horizon: int) -> TabularSpec:
        """The finite MDP."""
        home = self._homes()
        origin = list(range(self.S)) + [0] * (max(home.values()) + 1 - self.S)  # state of P that each one is
        for (s, _, _), node in home.items():
            origin[node] = s
        transitions = [[[0.0] * len(origin) for _ in range(self.A)] for _ in origin]
        rewards = [[[0.0] * len(origin) for _ in range(self.A)] for _ in origin]
        paid: list[list[set[float]]] = [[set() for _ in range(self.A)] for _ in origin]
        for node, s in enumerate(origin):
            for a in range(self.A):
                for arrival, (p, reward) in self.arrivals(s, a).items():
                    # a state that no episode reaches may arrive in a way that none does
                    after = home.get(arrival, home.get((arrival[0], not arrival[1], 0), arrival[0]))
                    transitions[node][a][after] += p
                    rewards[node][a][after] = reward
                    paid[node][a].add(reward)
        one_each = all(len(values) == 1 for row in paid for values in row)
        return TabularSpec(
            transitions=transitions,
            rewards=[[min(values) for values in row] for row in paid] if one_each else None,
            transition_rewards=None if one_each else rewards,
            initial=self.initial.tolist() + [0.0] * (len(origin) - self.S),
            terminal=sorted({node for (_, terminated, _), node in home.items() if terminated}),
            horizon=horizon,
            observations=self._observations(origin),
            state_names=self._state_names(origin),
            action_names=self._action_names(),
        )

    def _homes(self) -> dict[_Arrival, int]:
        """The state of the finite MDP for each way of arriving; the first one of a state keeps its number."""
        live = self.reached()
        needed: dict[_Arrival, None] = {(s, False, 0): None for s in live}
        for s in live:
            for a in range(self.A):
                needed.update(dict.fromkeys(self.arrivals(s, a)))
        home: dict[_Arrival, int] = {}
        taken: set[int] = set()
        count = self.S
        for arrival in sorted(needed):
            s = arrival[0]
            if s in taken:
                home[arrival] = count
                count += 1
            else:
                home[arrival] = s
                taken.add(s)
        return home

    def _observations(self, origin: list[int]) -> list[int] | None:
        observations = [self.seen[s] for s in origin]
        return None if observations == list(range(len(origin))) else observations

    def _state_names(self, origin: list[int]) -> list[str] | None:
        names = getattr(self.environment, "state_names", None)
        return None if names is None else [names[s] for s in origin]

    def _action_names(self) -> list[str] | None:
        names: list[str] | None = getattr(self.environment, "action_names", None)
        return _TOY_TEXT.get(_class_name(self.environment)) if names is None else list(names)
