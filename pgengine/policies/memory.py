"""Windows over the last k observations, for policies that remember them.

A window is [k, …], oldest first, the newest observation last. Places before the beginning of the episode are marked:
NaN in a box, one below the smallest value in spaces of integers. Pure functions of numpy arrays.
"""

import numpy as np
from jaxtyping import Bool, Int, Shaped

from pgengine.spaces import BoxSpace, DiscreteSpace, MultiDiscreteSpace, Space

__all__ = ["first_windows", "mark", "present", "shifted_windows", "windows_of_rows"]


def mark(space: Space) -> np.ndarray:
    """What stands where there is no observation, in the shape of one, or broadcastable to it."""
    if isinstance(space, BoxSpace):
        return np.array(np.nan, dtype=np.float32)
    if isinstance(space, DiscreteSpace):
        return np.array(space.start - 1, dtype=np.int64)
    start = space.starts if isinstance(space, MultiDiscreteSpace) else [0] * space.n
    return np.array(start, dtype=np.int64) - 1


def present(space: Space, seen: Shaped[np.ndarray, "N k ..."]) -> Bool[np.ndarray, "N k"]:
    """Where in the windows there is an observation."""
    first = seen.reshape(*seen.shape[:2], -1)[:, :, 0]
    if isinstance(space, BoxSpace):
        found: np.ndarray = ~np.isnan(first)
    else:
        found = first > mark(space).ravel()[0]
    return found


def first_windows(space: Space, observations: Shaped[np.ndarray, "N ..."], k: int) -> Shaped[np.ndarray, "N k ..."]:
    """Windows at the beginning of episodes: nothing but the first observation."""
    seen = np.empty((len(observations), k, *observations.shape[1:]), dtype=observations.dtype)
    seen[:] = mark(space)
    seen[:, -1] = observations
    return seen


def shifted_windows(
    seen: Shaped[np.ndarray, "N k ..."], observations: Shaped[np.ndarray, "N ..."]
) -> Shaped[np.ndarray, "N k ..."]:
    """Windows one step later: the oldest observation falls out, the new one comes in."""
    return np.concatenate([seen[:, 1:], observations[:, None]], axis=1)


def windows_of_rows(
    space: Space,
    observations: Shaped[np.ndarray, "B ..."],
    offsets: Int[np.ndarray, "K1"],
    k: int,
    rows: Int[np.ndarray, "N"] | None = None,
) -> Shaped[np.ndarray, "N k ..."]:
    """The windows before rows of K episodes laid out flat, before each of them if none is named.

    None reaches into the episode before its own.
    """
    rows = np.arange(len(observations)) if rows is None else rows
    begin = offsets[np.searchsorted(offsets, rows, side="right") - 1]
    places = rows[:, None] + np.arange(1 - k, 1)  # [N, k]
    inside = places >= begin[:, None]
    seen: np.ndarray = observations[np.where(inside, places, 0)]
    seen[~inside] = mark(space)
    return seen
