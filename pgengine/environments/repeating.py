"""Whether the same episodes can be had twice.

An environment that draws from `random` or `numpy.random`, looks at the clock, draws something for good when it is made,
or keeps something from one episode to the next gives other episodes for the same seeds and actions. It can be learned
in, but a run of it cannot be repeated, and nothing else would say so.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from time import monotonic
from typing import Any

import numpy as np

from pgengine.environments.episodes import EpisodeEnvironment
from pgengine.errors import EnvironmentFailure, SpecError
from pgengine.spaces import BoxSpace, DiscreteSpace, MultiBinarySpace, Space, box_bounds

__all__ = ["is_repeatable"]

STEPS = 32
EPISODES = 2  # side by side
SECONDS = 2.0  # a slow simulator is looked at for a few steps less


def is_repeatable(environment: EpisodeEnvironment, make: Callable[[], EpisodeEnvironment]) -> bool:
    """Whether episodes of a few steps, with the same seeds and actions, are the same when they are played again.

    They are played again in the same environment, and in one that is made anew, as every run does it. A difference that
    shows later, or seldom, is not found. An environment that fails is not judged: playing it will say what is wrong.

    Args:
        environment: Open.
        make: Makes another one from the same spec.
    """
    try:
        first = list(islice(_played(environment), STEPS + 1))
        if not _plays(environment, first):
            return False
        another = make()
        try:
            return _plays(another, first)
        finally:
            another.close()
    except (EnvironmentFailure, SpecError):
        return True


def _plays(environment: EpisodeEnvironment, seen: list[list[np.ndarray]]) -> bool:
    """Whether it shows what was seen, as far as it gets in the time that there is."""
    return all(_same(one, other) for one, other in zip(seen, _played(environment), strict=False))


def _played(environment: EpisodeEnvironment) -> Iterator[list[np.ndarray]]:
    """What is seen at the beginnings of episodes and in each step; new ones begin when all have ended."""
    draws = np.random.default_rng(0)
    until = monotonic() + SECONDS
    live = 0
    while monotonic() < until:
        if not live:
            live = EPISODES
            yield [environment.begin(draws.integers(0, 2**64, size=EPISODES, dtype=np.uint64))]
        step = environment.step(_some_actions(environment.facts.action_space, EPISODES, draws)[:live], None)
        ended = step.terminated | step.truncated
        environment.keep(~ended)
        live -= int(ended.sum())
        yield [step.observations, step.rewards, step.terminated, step.truncated]


def _same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def _some_actions(space: Space, N: int, draws: np.random.Generator) -> np.ndarray:
    """Actions [N, …] that the space allows."""
    actions: np.ndarray
    if isinstance(space, DiscreteSpace):
        return draws.integers(space.start, space.start + space.n, size=N)
    if isinstance(space, MultiBinarySpace):
        return draws.integers(0, 2, size=(N, space.n), dtype=np.int8)
    if isinstance(space, BoxSpace):
        low, high = (np.clip(bound, -(2.0**53), 2.0**53) for bound in box_bounds(space))  # as far as floats are whole
        far = high - low > 1e6  # as good as unbounded: small actions do
        near = np.clip(np.where(far, draws.uniform(-1.0, 1.0, (N, space.size)), 0.0), low, high)
        drawn = np.where(far, near, low + draws.random((N, space.size)) * (high - low))
        dtype: np.dtype[Any] = np.dtype(space.dtype)
        actions = (np.rint(drawn) if dtype.kind in "iu" else drawn).astype(dtype).reshape(N, *space.shape)
        return actions
    actions = np.array(space.starts) + draws.integers(0, np.array(space.nvec), size=(N, len(space.nvec)))
    return actions
