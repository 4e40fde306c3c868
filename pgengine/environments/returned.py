"""What `reset` and `step` of somebody else's environment return, read where its meaning is certain.

Environments are written against several versions of Gymnasium, and numbers come as arrays of one number, 0-d arrays,
lists and tensors. What can mean one thing alone is taken; everything else is refused by a sentence that names what was
returned and what is expected. This file knows shapes and types; it plays nothing.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from pgengine.spaces import BoxSpace, DiscreteSpace, Space, array_dtype, array_shape, inside

__all__ = ["Returned", "UnclearReturn"]

STEP = "(observation, reward, terminated, truncated, info)"


class UnclearReturn(Exception):
    """Something was returned whose meaning is not certain; the message names it and what is expected."""


class Returned:
    """Reads what an environment with one observation space returns."""

    def __init__(self, space: Space) -> None:
        """Keeps the shape and the number type that observations are promised to have."""
        self._space = space
        self._shape = array_shape(space)
        self._dtype = array_dtype(space)
        self._promised = _promised(space, self._shape)

    def reset(self, returned: Any) -> Any:
        """The observation among what `reset` returned: (observation, info), or the observation alone as in old Gym.

        Raises:
            UnclearReturn: if it is neither.
        """
        pair = isinstance(returned, tuple | list) and len(returned) == 2
        # (x, y) may be an observation with two numbers, or one with anything for info: the shape tells which
        if pair and (isinstance(returned[1], Mapping) or (seen := self._read(returned)) is None):
            return self._observed("reset", returned[0])
        if pair:
            return seen
        if (alone := self._read(returned)) is not None:
            return alone
        raise UnclearReturn(
            f"reset returned {_named(returned)}; expected (observation, info), the observation being {self._promised}"
        )

    def step(self, returned: Any) -> tuple[Any, float, bool, bool]:
        """Observation, reward, terminated and truncated among what `step` returned.

        Raises:
            UnclearReturn: if these are not the five values of Gymnasium's step, or one is not what it should be.
        """
        if type(returned) is not tuple or len(returned) != 5:
            returned = _five(returned)
        seen, reward, terminated, truncated, _ = returned
        # what is as it should be costs no call: this runs in every step of every environment
        if type(seen) is not np.ndarray or seen.dtype is not self._dtype or seen.shape != self._shape:
            seen = self._observed("step", seen)
        if not isinstance(reward, float):
            reward = _number(reward)
        if type(terminated) is not bool:
            terminated = _flag("terminated", terminated)
        if type(truncated) is not bool:
            truncated = _flag("truncated", truncated)
        return seen, reward, terminated, truncated

    def unreadable(self, observations: np.ndarray) -> str | None:
        """What is wrong with observations [N, …] that a policy could not read; None if it can read all of them."""
        good = inside(self._space, observations)
        if good.all():
            return None
        first = observations[int(np.flatnonzero(~good)[0])]
        if isinstance(self._space, BoxSpace):
            return "an observation with numbers that are not finite, or beyond 32-bit floats"
        shown = first.tolist() if first.size <= 16 else "numbers"
        return f"an observation outside of its space: {shown}; expected {self._promised}"

    def _observed(self, verb: str, seen: Any) -> Any:
        read = self._read(seen)
        if read is None:
            raise UnclearReturn(f"{verb} returned {_named(seen)} as observation; expected {self._promised}")
        return read

    def _read(self, seen: Any) -> np.ndarray | None:
        """What was returned as an observation of the promised shape and number type; None if it cannot be one."""
        array = _array(seen)
        if array is None:
            return None
        # axes of length 1 say nothing: [x] and x, a row and a column are the same numbers
        if array.shape != self._shape and _essential(array.shape) != _essential(self._shape):
            return None
        array = array.reshape(self._shape)
        if self._dtype.kind == "i" and array.dtype.kind == "f" and not (np.isfinite(array) & (array % 1 == 0)).all():
            return None
        with np.errstate(over="ignore", invalid="ignore"):  # what is too large becomes infinite, and is refused as that
            read: np.ndarray = array.astype(self._dtype)
        return read


def _five(returned: Any) -> Any:
    if isinstance(returned, tuple | list):
        if len(returned) == 5:
            return returned
        if len(returned) == 4:
            raise UnclearReturn(
                f"step returned 4 values, as in old Gym, whose `done` does not tell an end from a cut; expected {STEP}"
            )
        raise UnclearReturn(f"step returned {len(returned)} values; expected {STEP}")
    raise UnclearReturn(f"step returned {_named(returned)}; expected {STEP}")


def _number(reward: Any) -> float:
    array = _array(reward)
    if array is None or array.size != 1:
        raise UnclearReturn(f"step returned {_named(reward)} as reward; expected a number")
    return float(array.reshape(()))


def _flag(name: str, value: Any) -> bool:
    if isinstance(value, np.bool_):
        return bool(value)
    array = _array(value)
    if array is None or array.size != 1 or array.reshape(()) not in (0, 1):
        raise UnclearReturn(f"step returned {_named(value)} as {name}; expected true or false")
    return bool(array.reshape(()))


def _array(value: Any) -> np.ndarray | None:
    """An array of numbers, if the value is one, or a number, or nested lists of equal length."""
    if isinstance(value, str | bytes | Mapping) or value is None:
        return None
    try:
        array = np.asarray(value)
        if array.dtype.kind == "O":  # numbers of other libraries, and lists of arrays
            array = array.astype(np.float64)
    # asking a foreign object for its numbers may raise anything
    except Exception:  # noqa: BLE001
        return None
    return array if array.dtype.kind in "biuf" else None


def _essential(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(length for length in shape if length != 1)


def _promised(space: Space, shape: tuple[int, ...]) -> str:
    if isinstance(space, DiscreteSpace):
        return f"a whole number from {space.start} to {space.start + space.n - 1}"
    numbers = "numbers" if isinstance(space, BoxSpace) else "whole numbers"
    return f"an array of {numbers} of shape {shape}"


def _named(value: Any) -> str:
    """What a value is, in words; short, whatever it is."""
    if value is None:
        return "None"
    if isinstance(value, tuple | list):
        inside_ = ", ".join(_named_inside(one) for one in value[:5])
        return f"a {type(value).__name__} of {len(value)} ({inside_}{', …' if len(value) > 5 else ''})"
    return _named_inside(value)


def _named_inside(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if isinstance(value, np.ndarray | np.generic):
        return f"an array of shape {shape} of type {value.dtype}" if shape else f"{value.dtype.name} {value!s:.40}"
    if isinstance(value, bool | int | float | str):
        return f"{type(value).__name__} {str(value)[:40]!r}"
    return "None" if value is None else type(value).__name__
