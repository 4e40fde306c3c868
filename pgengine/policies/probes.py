"""Observations that are made up to try a policy with: the same for every policy of a space."""

import numpy as np
from jaxtyping import Shaped

from pgengine.noise import Noise
from pgengine.policies.memory import mark
from pgengine.spaces import BoxSpace, DiscreteSpace, MultiDiscreteSpace, Space

__all__ = ["PROBES", "probes"]

PROBES = 8
"""Observations whose outputs are kept beside the weights and checked at load."""


def probes(space: Space, memory: int, N: int = PROBES) -> Shaped[np.ndarray, "N ..."]:
    """What a policy sees: observations [N, …], or windows [N, k, …] of one with a memory of k."""
    if memory == 1:
        return _rows(space, N)
    rows = _rows(space, N * memory)
    # windows that are full, and windows that have only begun
    begun = np.arange(memory) < memory - 1 - np.arange(N)[:, None] % memory
    seen = rows.reshape(N, memory, *rows.shape[1:])
    seen[begun] = mark(space)
    return seen


def _rows(space: Space, N: int) -> np.ndarray:
    if isinstance(space, DiscreteSpace):
        return space.start + np.arange(N) % space.n
    if isinstance(space, BoxSpace):
        flat: np.ndarray = Noise(0, "acting", 0).matrix("probe", 0, (N, space.size))
        return flat.astype(np.float32).reshape(N, *space.shape)
    n = np.array(space.nvec) if isinstance(space, MultiDiscreteSpace) else np.full(space.n, 2)
    start = np.array(space.starts) if isinstance(space, MultiDiscreteSpace) else np.zeros(space.n, dtype=np.int64)
    rows: np.ndarray = start + (np.arange(N)[:, None] + np.arange(len(n))) % n
    return rows
