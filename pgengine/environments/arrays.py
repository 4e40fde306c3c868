"""Nested lists of a spec as arrays of an expected shape; errors point at the list that is wrong."""

from typing import Any

import numpy as np

from pgengine.errors import SpecError

__all__ = ["array_of", "check_each", "probabilities_of"]

TOLERANCE = 1e-9  # how far a row of probabilities may be from 1


def array_of(values: object, shape: tuple[int, ...], pointer: str) -> np.ndarray:
    """The values as float64.

    Raises:
        SpecError: if a list has another length than the shape says.
    """
    _check_shape(values, shape, pointer, shape)
    return np.array(values, dtype=np.float64).reshape(shape)


def _check_shape(values: Any, shape: tuple[int, ...], pointer: str, whole: tuple[int, ...]) -> None:
    if len(values) != shape[0]:
        raise SpecError(pointer, "shape", f"expected shape {list(whole)}: {shape[0]} entries here, found {len(values)}")
    if len(shape) > 1:
        for index, value in enumerate(values):
            _check_shape(value, shape[1:], f"{pointer}/{index}", whole)


def check_each(good: np.ndarray, pointer: str, code: str, expected: str) -> None:
    """Refuses the first cell that is not good.

    Raises:
        SpecError: with a pointer at it.
    """
    for index in np.argwhere(~good)[:1]:
        raise SpecError(pointer + "".join(f"/{i}" for i in index), code, f"expected {expected}")


def probabilities_of(
    values: object, shape: tuple[int, ...], pointer: str, used: np.ndarray | bool = True
) -> np.ndarray:
    """Rows of probabilities.

    Args:
        values: Nested lists.
        shape: Their shape; the last axis sums to 1.
        pointer: Where they stand.
        used: Which rows are read; the others may sum to anything.

    Raises:
        SpecError: if the shape is another, a value is below 0 or above 1, or a row does not sum to 1.
    """
    array = array_of(values, shape, pointer)
    check_each((array >= 0.0) & (array <= 1.0), pointer, "probability_range", "a probability from 0 to 1")
    sums = array.sum(axis=-1)
    for index in np.argwhere((np.abs(sums - 1.0) > TOLERANCE) & used)[:1]:
        cell = pointer + "".join(f"/{i}" for i in index)
        raise SpecError(cell, "probabilities_sum", f"expected a row that sums to 1, found {sums[tuple(index)]:.12g}")
    return array
