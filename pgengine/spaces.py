"""What observations and actions look like: as data, as JSON Schema, and as arrays.

Discrete is an integer, Box is a nested list, MultiDiscrete and MultiBinary are lists of integers. Other spaces are
refused when the environment is described.
"""

import math
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from pgengine.errors import ObservationError, SpecError
from pgengine.spec import Spec

__all__ = [
    "BoxSpace",
    "DiscreteSpace",
    "MultiBinarySpace",
    "MultiDiscreteSpace",
    "Space",
    "SpaceSpec",
    "action_schema",
    "array_dtype",
    "array_shape",
    "box_bounds",
    "inside",
    "observation_numbers",
    "observation_schema",
    "parse_observations",
    "read_space",
]

MAX_OBSERVATION_SIZE = 65_536
MOST_VALUES = 1_000_000
MOST_COMPONENTS = 4096
LARGEST_FLOAT = float(np.finfo(np.float32).max)


class DiscreteSpace(Spec):
    """The integers start, start + 1, …, start + n - 1."""

    kind: Literal["discrete"] = "discrete"
    """Which kind of space this is."""
    n: Annotated[int, Field(ge=1, le=1_000_000)]
    """How many values there are."""
    start: int = 0
    """Smallest value."""


class BoxSpace(Spec):
    """Arrays of numbers of one shape."""

    kind: Literal["box"] = "box"
    """Which kind of space this is."""
    shape: Annotated[list[Annotated[int, Field(ge=1, le=16_777_216)]], Field(max_length=8)]
    """Lengths of the axes; [] is a single number."""
    low: list[float | None]
    """Lower bounds, flat, or one for all; null is unbounded."""
    high: list[float | None]
    """Upper bounds, flat, or one for all; null is unbounded."""
    dtype: Annotated[str, Field(pattern=r"^(float(16|32|64)|u?int(8|16|32|64))$")]
    """Number type of the environment's arrays."""

    @property
    def size(self) -> int:
        """Numbers in one array."""
        return int(np.prod(self.shape, dtype=np.int64))


class MultiDiscreteSpace(Spec):
    """Lists of integers; component i takes the values start[i], …, start[i] + nvec[i] - 1."""

    kind: Literal["multi_discrete"] = "multi_discrete"
    """Which kind of space this is."""
    nvec: Annotated[list[Annotated[int, Field(ge=1, le=1_000_000)]], Field(min_length=1, max_length=4096)]
    """How many values each component has."""
    start: Annotated[list[int], Field(max_length=4096)] = Field(default_factory=list)
    """Smallest value of each component; [] is zero for all."""

    @model_validator(mode="after")
    def _one_start_for_each(self) -> "MultiDiscreteSpace":
        if self.start and len(self.start) != len(self.nvec):
            raise ValueError(f"expected {len(self.nvec)} values of start, or none")
        if sum(self.nvec) > MOST_VALUES:
            raise ValueError(f"expected at most {MOST_VALUES} values in all components together")
        return self

    @property
    def starts(self) -> list[int]:
        """Smallest value of each component, written out."""
        return self.start or [0] * len(self.nvec)


class MultiBinarySpace(Spec):
    """Lists of zeros and ones."""

    kind: Literal["multi_binary"] = "multi_binary"
    """Which kind of space this is."""
    n: Annotated[int, Field(ge=1, le=4096)]
    """How many there are."""


Space = DiscreteSpace | BoxSpace | MultiDiscreteSpace | MultiBinarySpace
SpaceSpec = Annotated[Space, Field(discriminator="kind")]


def read_space(space: Any, what: str) -> Space:
    """A Gymnasium space as data.

    Args:
        space: A `gymnasium.Space`.
        what: "observation" or "action", for the message.

    Raises:
        SpecError: if the space is of a kind that is not supported.
    """
    from gymnasium import spaces

    if isinstance(space, spaces.Discrete) and space.n <= MOST_VALUES:
        return DiscreteSpace(n=int(space.n), start=int(space.start))
    if isinstance(space, spaces.MultiDiscrete) and _few(space.nvec):
        start = [int(v) for v in space.start]
        return MultiDiscreteSpace(nvec=[int(v) for v in space.nvec], start=start if any(start) else [])
    if isinstance(space, spaces.MultiBinary) and len(space.shape) == 1 and space.shape[0] <= MOST_COMPONENTS:
        return MultiBinarySpace(n=int(space.shape[0]))
    if isinstance(space, spaces.Box) and space.dtype is not None and space.dtype.kind in "fiu":
        box = BoxSpace(
            shape=list(space.shape), low=_bounds(space.low), high=_bounds(space.high), dtype=space.dtype.name
        )
        if box.size <= MAX_OBSERVATION_SIZE:
            return box
        smaller = ""
        if what == "observation" and len(space.shape) in (2, 3):
            smaller = (
                "; register the environment wrapped in gymnasium.wrappers.ResizeObservation or GrayscaleObservation"
            )
        raise SpecError(
            "/id",
            "unsupported_space",
            f"the {what} space has {box.size} numbers, and at most {MAX_OBSERVATION_SIZE} are supported{smaller}",
        )
    raise SpecError(
        "/id",
        "unsupported_space",
        f"the {what} space is {type(space).__name__}; supported are Discrete, Box, and MultiDiscrete and MultiBinary "
        f"of one axis with at most {MOST_COMPONENTS} components and {MOST_VALUES} values; {_wrapper_for(space, what)}",
    )


def _wrapper_for(space: Any, what: str) -> str:
    """Which wrapper makes an environment with a space that is not supported one that is."""
    from gymnasium import spaces

    if what == "action":
        return (
            "register the environment in a gymnasium.ActionWrapper that takes one of these and makes the action of it"
        )
    try:
        flat = spaces.flatten_space(space)
    except (NotImplementedError, ValueError, TypeError):
        flat = None
    if isinstance(flat, spaces.Box) and 1 <= math.prod(flat.shape) <= MAX_OBSERVATION_SIZE:
        return (
            "register the environment wrapped in gymnasium.wrappers.FlattenObservation, which makes it a Box of "
            f"{math.prod(flat.shape)} numbers"
        )
    return "register the environment in a gymnasium.ObservationWrapper that makes one of these of the observation"


def _few(nvec: np.ndarray) -> bool:
    return nvec.ndim == 1 and 1 <= len(nvec) <= MOST_COMPONENTS and int(nvec.sum()) <= MOST_VALUES


def _bounds(values: np.ndarray) -> list[float | None]:
    flat: list[float | None] = [float(v) if np.isfinite(v) else None for v in values.ravel()]
    return flat[:1] if len(set(flat)) == 1 else flat


def box_bounds(space: BoxSpace) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bounds of a box as flat float64 arrays, infinite where there is none."""
    low = np.array([-np.inf if v is None else v for v in space.low], dtype=np.float64)
    high = np.array([np.inf if v is None else v for v in space.high], dtype=np.float64)
    return np.broadcast_to(low, (space.size,)), np.broadcast_to(high, (space.size,))


def array_shape(space: Space) -> tuple[int, ...]:
    """Shape of one element as an array."""
    if isinstance(space, DiscreteSpace):
        return ()
    if isinstance(space, BoxSpace):
        return tuple(space.shape)
    return (len(space.nvec),) if isinstance(space, MultiDiscreteSpace) else (space.n,)


def array_dtype(space: Space) -> np.dtype[Any]:
    """Number type in which observations of a space are kept: float32 of a box, int64 of all others."""
    return np.dtype(np.float32 if isinstance(space, BoxSpace) else np.int64)


def inside(space: Space, rows: np.ndarray) -> np.ndarray:
    """Which of the rows [N, …] a policy can read: finite numbers of a box, existing values of the others; [N]."""
    if isinstance(space, BoxSpace):
        good = np.isfinite(rows)
    elif isinstance(space, DiscreteSpace):
        good = (rows >= space.start) & (rows < space.start + space.n)
    elif isinstance(space, MultiDiscreteSpace):
        start = np.array(space.starts)
        good = (rows >= start) & (rows < start + np.array(space.nvec))
    else:
        good = (rows == 0) | (rows == 1)
    answer: np.ndarray = good.reshape(len(rows), -1).all(axis=1)
    return answer


def observation_numbers(space: Space) -> int:
    """How many numbers one element consists of; an integer of a discrete space is one."""
    return math.prod(array_shape(space))


# --- JSON Schema ------------------------------------------------------------------------------------------------------


def observation_schema(space: Space) -> dict[str, Any]:
    """JSON Schema of one observation. Bounds are left out: a policy reads numbers outside of them, too."""
    return _schema(space, bounds=False)


def action_schema(space: Space) -> dict[str, Any]:
    """JSON Schema of one action."""
    return _schema(space, bounds=True)


def _schema(space: Space, *, bounds: bool) -> dict[str, Any]:
    if isinstance(space, DiscreteSpace):
        return _integer(space.start, space.n)
    if isinstance(space, MultiDiscreteSpace):
        each = [_integer(start, n) for start, n in zip(space.starts, space.nvec, strict=True)]
        return {"type": "array", "prefixItems": each, "items": False, "minItems": len(each), "maxItems": len(each)}
    if isinstance(space, MultiBinarySpace):
        return {"type": "array", "items": _integer(0, 2), "minItems": space.n, "maxItems": space.n}
    number: dict[str, Any] = {"type": "number"}
    if bounds and len(space.low) == 1 and space.low[0] is not None:
        number["minimum"] = space.low[0]
    if bounds and len(space.high) == 1 and space.high[0] is not None:
        number["maximum"] = space.high[0]
    for length in reversed(space.shape):
        number = {"type": "array", "items": number, "minItems": length, "maxItems": length}
    return number


def _integer(start: int, n: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": start, "maximum": start + n - 1}


# --- JSON to arrays ---------------------------------------------------------------------------------------------------


def parse_observations(space: Space, values: list[Any]) -> np.ndarray:
    """A list of observations, as JSON gives them, as one array.

    Args:
        space: What each observation must look like.
        values: N observations.

    Returns:
        int64 [N] for a discrete space, float32 [N, *shape] for a box, int64 [N, components] for the others.

    Raises:
        ObservationError: with a pointer from the root of the list.
    """
    if isinstance(space, DiscreteSpace):
        last = space.start + space.n - 1
        for row, value in enumerate(values):
            if type(value) is not int or not space.start <= value <= last:
                raise ObservationError(
                    f"/{row}", "observation_kind", f"expected an integer from {space.start} to {last}"
                )
        return np.array(values, dtype=np.int64)
    if not isinstance(space, BoxSpace):
        return _parse_components(space, values)
    shape = tuple(space.shape)
    for row, value in enumerate(values):
        _check_numbers(value, shape, f"/{row}", shape)
    if len(values) == 1 and len(shape) == 1:  # the common case; what follows takes longer than all else
        numbers = values[0]
        # a sum is NaN if a number is, which least and largest do not tell
        if min(numbers) >= -LARGEST_FLOAT and max(numbers) <= LARGEST_FLOAT and not math.isnan(sum(numbers)):
            return np.array(values, dtype=np.float32)
    try:
        with np.errstate(over="ignore"):
            array = np.array(values, dtype=np.float32)
        finite = np.isfinite(array)
    except OverflowError:  # an integer beyond float64
        finite = np.zeros((len(values),), dtype=bool)
    if not finite.all():
        row = int(np.flatnonzero(~finite.reshape(len(values), -1).all(axis=1))[0])
        raise ObservationError(
            f"/{row}", "observation_not_finite", "expected finite numbers that fit into 32-bit floats"
        )
    return array


def _parse_components(space: MultiDiscreteSpace | MultiBinarySpace, values: list[Any]) -> np.ndarray:
    bounds = _component_bounds(space)
    for row, value in enumerate(values):
        if type(value) is not list or len(value) != len(bounds):
            raise ObservationError(f"/{row}", "observation_shape", f"expected a list of {len(bounds)} integers")
        for component, (number, (low, high)) in enumerate(zip(value, bounds, strict=True)):
            if type(number) is not int or not low <= number <= high:
                raise ObservationError(
                    f"/{row}/{component}", "observation_kind", f"expected an integer from {low} to {high}"
                )
    return np.array(values, dtype=np.int64)


def _component_bounds(space: MultiDiscreteSpace | MultiBinarySpace) -> list[tuple[int, int]]:
    if isinstance(space, MultiBinarySpace):
        return [(0, 1)] * space.n
    return [(start, start + n - 1) for start, n in zip(space.starts, space.nvec, strict=True)]


_NUMBERS = ({int}, {float}, {int, float})


def _check_numbers(value: Any, shape: tuple[int, ...], pointer: str, whole: tuple[int, ...]) -> None:
    if not shape:
        if type(value) not in (int, float):
            raise ObservationError(pointer, "observation_kind", "expected a number")
        return
    if type(value) is not list or len(value) != shape[0]:
        found = f"{len(value)} long" if type(value) is list else "no list"
        raise ObservationError(
            pointer, "observation_shape", f"expected shape {list(whole)}: a list of {shape[0]} here, it is {found}"
        )
    if len(shape) == 1:
        if set(map(type, value)) not in _NUMBERS:
            wrong = next(i for i, v in enumerate(value) if type(v) not in (int, float))
            raise ObservationError(f"{pointer}/{wrong}", "observation_kind", "expected a number")
        return
    for index, part in enumerate(value):
        _check_numbers(part, shape[1:], f"{pointer}/{index}", whole)
