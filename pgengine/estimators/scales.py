"""What weights are divided by when they are standardised, and which differences are more than rounding."""

import numpy as np
from jaxtyping import Float

__all__ = ["deviation_of_others", "significant", "whitened"]

RELATIVE_ZERO = 1e-12  # a difference below this share of what was added up is rounding, not variation


def significant(
    differences: Float[np.ndarray, "*batch B"], sizes: Float[np.ndarray, "*batch B"]
) -> Float[np.ndarray, "*batch B"]:
    """The differences, with zeros where they are no more than the rounding of numbers of these sizes.

    What is left of a credit when an equal baseline is taken away must be zero: optimizers that divide by the size of
    the gradient would make whole steps of rounding.

    Args:
        differences: Of two numbers each.
        sizes: The larger of the two, or the sum of the sizes of what was added up in it.
    """
    # infinite ones stay what they are, and whoever makes the step sees it
    return np.where(np.abs(differences) < RELATIVE_ZERO * sizes, 0.0, differences)


def deviation_of_others(
    returns: Float[np.ndarray, "*batch K"], sizes: Float[np.ndarray, "*batch K"]
) -> Float[np.ndarray, "*batch K"]:
    """Standard deviation (ddof 1) of the other trajectories' returns; infinite where they are all alike.

    What is divided by it is then zero. It is independent of the own trajectory, so it multiplies the expected estimate
    by a factor that is never negative, and zero only where the others' returns never differ.

    Args:
        returns: One for each of K >= 3 trajectories.
        sizes: Sum of the sizes of the rewards in each.
    """
    deviations = np.empty_like(returns)
    for i in range(returns.shape[-1]):  # one at a time: differences of sums of squares would lose all digits
        others, theirs = np.delete(returns, i, axis=-1), np.delete(sizes, i, axis=-1)
        deviations[..., i : i + 1] = _deviation(others, theirs, ddof=1)
    return deviations


def whitened(
    values: Float[np.ndarray, "*batch B"], sizes: Float[np.ndarray, "*batch B"]
) -> Float[np.ndarray, "*batch B"]:
    """The values of all steps, shifted to mean 0 and scaled to deviation 1 (ddof 0); zeros where they are all alike.

    Mean and deviation have the own step in them: the estimate is biased.

    Args:
        values: One for each of the batch's steps.
        sizes: Of the numbers whose differences they are.
    """
    white: np.ndarray = (values - values.mean(axis=-1, keepdims=True)) / _deviation(values, sizes, ddof=0)
    return white


def _deviation(values: np.ndarray, sizes: np.ndarray, *, ddof: int) -> np.ndarray:
    """Over the last axis, which stays with length 1; infinite where it is no more than rounding."""
    deviation = values.std(axis=-1, ddof=ddof, keepdims=True)
    return np.where(deviation > RELATIVE_ZERO * sizes.max(axis=-1, keepdims=True), deviation, np.inf)
