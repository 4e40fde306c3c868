"""Brings boxes of observations to mean 0 and deviation 1 by figures that belong to the policy.

The figures are buffers: count, mean and sum of squared deviations of all observations so far, in float64. They move
only between updates, so every step of a batch is taken by one and the same policy, and the gradient is of that one.
"""

import numpy as np
from jaxtyping import Float, Shaped

from pgengine.spaces import BoxSpace

__all__ = ["BOUND", "COUNT", "MEAN", "SQUARES", "buffer_shapes", "merged", "new_buffers", "normalised"]

BOUND = 10.0
"""Largest size of a normalised number; larger ones are cut to it."""

VARIANCE_FLOOR = 1e-8
"""Added to the variance, so that a number that never varies becomes 0 and no noise of rounding is blown up."""

RELATIVE_FLOOR = 1e-12
"""The same as a share of the mean: a deviation below it is rounding, however large the number."""

COUNT, MEAN, SQUARES = "observation_count", "observation_mean", "observation_squares"


def buffer_shapes(space: BoxSpace) -> dict[str, tuple[int, ...]]:
    """Shapes of the buffers by name."""
    return {COUNT: (), MEAN: tuple(space.shape), SQUARES: tuple(space.shape)}


def new_buffers(space: BoxSpace) -> dict[str, np.ndarray]:
    """Buffers before the first observation."""
    return {name: np.zeros(shape, dtype=np.float64) for name, shape in buffer_shapes(space).items()}


def merged(buffers: dict[str, np.ndarray], observations: Shaped[np.ndarray, "B ..."]) -> dict[str, np.ndarray]:
    """Buffers with more observations in them, by merging two groups' means and squares (Chan et al. 1979).

    Args:
        buffers: As they are; they are left alone.
        observations: At least one row.
    """
    values = observations.astype(np.float64)
    new, old = float(len(values)), float(buffers[COUNT])
    mean = values.mean(axis=0)
    difference = mean - buffers[MEAN]
    total = old + new
    squares = buffers[SQUARES] + ((values - mean) ** 2).sum(axis=0) + difference**2 * (old * new / total)
    return {
        COUNT: np.array(total, dtype=np.float64),
        MEAN: np.asarray(buffers[MEAN] + difference * (new / total), dtype=np.float64),
        SQUARES: np.asarray(squares, dtype=np.float64),
    }


def normalised(buffers: dict[str, np.ndarray], observations: Shaped[np.ndarray, "N ..."]) -> Float[np.ndarray, "N ..."]:
    """(x - mean) / deviation, cut to ±BOUND, float32; only cut before the first observation. NaN stays NaN."""
    count = float(buffers[COUNT])
    values = observations.astype(np.float64)
    if count:
        floor = np.maximum(VARIANCE_FLOOR, np.square(RELATIVE_FLOOR * buffers[MEAN]))
        values = (values - buffers[MEAN]) / np.sqrt(buffers[SQUARES] / count + floor)
    return np.clip(values, -BOUND, BOUND).astype(np.float32)
