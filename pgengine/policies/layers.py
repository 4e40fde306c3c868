"""What networks are built from: how an observation becomes numbers, the matrix product, activations, first matrices."""

import numpy as np

from pgengine.distributions import Array, namespace
from pgengine.features import one_hot
from pgengine.noise import Noise
from pgengine.spaces import BoxSpace, DiscreteSpace, MultiDiscreteSpace, Space, observation_numbers

__all__ = ["FORWARD_VERSION", "PAD", "activate", "encoded_numbers", "orthogonal", "product", "width_of_numbers"]

PAD = 8
"""Rows of a block: numpy multiplies so many at a time."""

FORWARD_VERSION = 2
"""Version of how rows are multiplied: another one gives other last bits (docs/adr/0008-forward-passes-in-blocks.md)."""

_PAIR = 2  # rows that are multiplied at a time with a single column


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


def product(x: Array, weight: Array) -> Array:
    """Rows [..., N, K] times a matrix [K, width], as [..., N, width].

    A matrix product adds up in another order for other numbers of rows, and among many rows in another order for some
    of them than for the rest. So numpy gets eight rows at a time, or two if the matrix has a single column: then every
    kernel that was tried treats all rows alike (docs/adr/0008-forward-passes-in-blocks.md).

    Args:
        x: In numpy the rows of whole blocks: N, or N times what stands before it, is a multiple of PAD. Other rows are
            multiplied as they are, and nothing is promised of their last bits.
        weight: In numpy or torch, as x.
    """
    inputs = x.shape[-1]
    if type(weight) is not np.ndarray:
        return x @ weight if x.ndim == 2 else (x.reshape(-1, inputs) @ weight).reshape(*x.shape[:-1], -1)
    rows = PAD if weight.shape[1] > 1 else _PAIR
    if x.shape[-2] == rows or x.size % (rows * inputs):
        return x @ weight
    return (x.reshape(-1, rows, inputs) @ weight).reshape(*x.shape[:-1], -1)


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
