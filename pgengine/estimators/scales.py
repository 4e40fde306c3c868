"""What weights are divided by when they are standardised."""

import numpy as np
from jaxtyping import Float

__all__ = ["deviation_of_others", "whitened"]

RELATIVE_ZERO = 1e-12  # a deviation below this share of the largest value is rounding, not variation


def deviation_of_others(returns: Float[np.ndarray, "*batch K"]) -> Float[np.ndarray, "*batch K"]:
    """Standard deviation (ddof 1) of the other trajectories' returns; infinite where they are all alike.

    What is divided by it is then zero. It is independent of the own trajectory, so it multiplies the expected estimate
    by a positive factor.

    Args:
        returns: One for each of K >= 3 trajectories.
    """
    deviations = np.empty_like(returns)
    for i in range(returns.shape[-1]):  # one at a time: differences of sums of squares would lose all digits
        deviations[..., i : i + 1] = _deviation(np.delete(returns, i, axis=-1), ddof=1)
    return deviations


def whitened(values: Float[np.ndarray, "*batch B"]) -> Float[np.ndarray, "*batch B"]:
    """The values of all steps, shifted to mean 0 and scaled to deviation 1 (ddof 0); zeros where they are all alike.

    Mean and deviation have the own step in them: the estimate is biased.

    Args:
        values: One for each of the batch's steps.
    """
    white: np.ndarray = (values - values.mean(axis=-1, keepdims=True)) / _deviation(values, ddof=0)
    return white


def _deviation(values: np.ndarray, *, ddof: int) -> np.ndarray:
    """Over the last axis, which stays with length 1; infinite where it is no more than rounding."""
    deviation = values.std(axis=-1, ddof=ddof, keepdims=True)
    size = np.abs(values).max(axis=-1, keepdims=True)
    return np.where(deviation > RELATIVE_ZERO * size, deviation, np.inf)
