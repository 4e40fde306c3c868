"""What networks are built from: how an observation becomes numbers, activations, matrices to start from."""

import numpy as np

from pgengine.distributions import Array, namespace
from pgengine.features import one_hot
from pgengine.noise import Noise
from pgengine.spaces import BoxSpace, DiscreteSpace, MultiDiscreteSpace, Space, observation_numbers

__all__ = ["activate", "encoded_numbers", "orthogonal", "width_of_numbers"]


def encoded_numbers(space: Space, observations: np.ndarray) -> np.ndarray:
    """What a fully connected layer reads: flat numbers of a box, one-hot vectors of discrete values; float32 [N, D]."""
    if isinstance(space, DiscreteSpace | MultiDiscreteSpace):
        return one_hot(space, observations)
    flat: np.ndarray = observations.reshape(len(observations), -1)
    return flat if isinstance(space, BoxSpace) else flat.astype(np.float32)


def width_of_numbers(space: Space) -> int:
    """D of `encoded_numbers`."""
    if isinstance(space, DiscreteSpace):
        return space.n
    return sum(space.nvec) if isinstance(space, MultiDiscreteSpace) else observation_numbers(space)


def activate(name: str, x: Array) -> Array:
    """The tanh or relu of an array; NaN stays NaN."""
    xp = namespace(x)
    if name == "tanh":
        return xp.tanh(x)
    return xp.where(x <= 0, xp.zeros_like(x), x)


def orthogonal(noise: Noise, index: int, shape: tuple[int, int], gain: float) -> np.ndarray:
    """A matrix with orthogonal rows or columns of length `gain`, drawn at an index (Saxe et al. 2014); float32."""
    rows, columns = shape
    matrix = noise.matrix("parameters", index, (max(rows, columns), min(rows, columns)))
    q, r = np.linalg.qr(matrix)
    q = q * np.sign(np.diag(r))
    return np.ascontiguousarray(gain * (q if rows >= columns else q.T), dtype=np.float32)
