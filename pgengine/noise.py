"""Addressed randomness: every random number of a run has an address and no state.

Policies and environments take noise, they never draw it. A matrix [episode, time] is a pure function of (seed,
domain, update, purpose, chunk of time steps), made by numpy's counter-based Philox generator, so any episode of any
run can be replayed, and a resumed run needs no generator state. Rows belong to episodes, never to lanes, and the
first rows do not depend on how many follow.

This file knows addresses; it does not know what the noise is used for.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, UInt64

__all__ = ["CHUNK", "NOISE_VERSION", "Domain", "Noise"]

NOISE_VERSION = 1
CHUNK = 64
"""Time steps for which noise is made at once."""

Domain = Literal["training", "selection", "evaluation", "mode", "acting", "checking"]
"""Which part of a run the numbers belong to; no two parts ever share one."""

Purpose = Literal["parameters", "begin", "action", "transition", "probe", "survival", "value"]

_DOMAINS: dict[str, int] = {"training": 0, "selection": 1, "evaluation": 2, "mode": 3, "acting": 4, "checking": 5}
_PURPOSES: dict[str, int] = {
    "parameters": 0,
    "begin": 1,
    "action": 2,
    "transition": 3,
    "probe": 4,
    "survival": 5,
    "value": 6,
}


@dataclass(frozen=True)
class Noise:
    """The noise of one update of one run.

    Attributes:
        seed: Seed of the run, below 2^53.
        domain: Part of the run.
        update: Number of updates that the policy has had when the noise is used.
    """

    seed: int
    domain: Domain
    update: int

    def _generator(self, purpose: Purpose, chunk: int = 0) -> np.random.Generator:
        name = NOISE_VERSION << 48 | _DOMAINS[self.domain] << 16 | _PURPOSES[purpose]
        key = np.array([self.seed, name], dtype=np.uint64)
        # the two low words count the numbers drawn; the two high words are ours
        counter = np.array([0, 0, chunk, self.update], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))

    def words(self, purpose: Purpose, episodes: int) -> UInt64[np.ndarray, "K"]:
        """One 64-bit word for each episode."""
        return self._generator(purpose).integers(0, 2**64, size=episodes, dtype=np.uint64)

    def uniform(self, purpose: Purpose, chunk: int, episodes: int) -> Float[np.ndarray, "K C"]:
        """Numbers in [0, 1) for the time steps of a chunk."""
        return self._generator(purpose, chunk).random((episodes, CHUNK))

    def uniforms(self, purpose: Purpose, chunk: int, episodes: int, width: int) -> Float[np.ndarray, "K C D"]:
        """Vectors of numbers in [0, 1) for the time steps of a chunk."""
        return self._generator(purpose, chunk).random((episodes, CHUNK, width))

    def normal(self, purpose: Purpose, chunk: int, episodes: int, width: int) -> Float[np.ndarray, "K C D"]:
        """Standard normal vectors for the time steps of a chunk."""
        return self._generator(purpose, chunk).standard_normal((episodes, CHUNK, width))

    def matrix(self, purpose: Purpose, index: int, shape: tuple[int, int]) -> Float[np.ndarray, "rows columns"]:
        """A standard normal matrix, for initial parameters."""
        return self._generator(purpose, index).standard_normal(shape)
