"""Feature maps of observations, and of observations and actions, for linear policies.

    x(s)     [N, J]       crossed with the outputs: theta is [J, outputs]
    x(s, a)  [N, A, J]    scores theta' x(s, a): theta is [J]

Pure numpy: features are computed once when an observation is read, and need no gradient. This file knows formulas,
bounds and how many features there are; it does not know parameters.

Source: Bereyhi, chapter 5, x: S x A -> R^J and linear policies; Sutton and Barto, Reinforcement Learning, section 9.5.
"""

import math
from itertools import combinations_with_replacement, product

import numpy as np
from jaxtyping import Float, Int, Shaped

from pgengine.errors import SpecError
from pgengine.spaces import (
    BoxSpace,
    DiscreteSpace,
    MultiDiscreteSpace,
    Space,
    box_bounds,
    observation_numbers,
)
from pgengine.spec import (
    FeaturesSpec,
    FourierFeaturesSpec,
    JointFeaturesSpec,
    OneHotFeaturesSpec,
    PlainFeaturesSpec,
    PolynomialFeaturesSpec,
    RbfFeaturesSpec,
    TableFeaturesSpec,
    TileFeaturesSpec,
)

__all__ = [
    "MAX_FEATURES",
    "MAX_TILES",
    "PairFeatures",
    "StateFeatures",
    "check_features",
    "fourier_features",
    "joint_features",
    "one_hot",
    "open_features",
    "polynomial_features",
    "radial_features",
    "read_feature_table",
    "scaled_to_bounds",
    "state_numbers",
    "tile_indices",
]

MAX_FEATURES = 4096
"""Most features of one observation that are computed, for all actions together if they depend on the action."""

MAX_TILES = 1_000_000
"""Most tiles in all grids, of which only one in each grid is ever looked at."""


# --- formulas ---------------------------------------------------------------------------------------------------------


def _monomials(D: int, degree: int) -> Int[np.ndarray, "J d"]:
    """Which numbers each product of exactly `degree` factors takes, in lexicographic order."""
    return np.array(list(combinations_with_replacement(range(D), degree)), dtype=np.int64)


def polynomial_features(x: Float[np.ndarray, "N D"], degree: int) -> Float[np.ndarray, "N J"]:
    """All products of up to `degree` numbers: 1; x_0, x_1, …; x_0 x_0, x_0 x_1, …; J = binomial(D + degree, degree).

    Source: Sutton and Barto, section 9.5.1.
    """
    products = [x[:, _monomials(x.shape[1], d)].prod(axis=-1) for d in range(1, degree + 1)]
    return np.concatenate([np.ones((len(x), 1)), *products], axis=1)


def joint_features(
    x: Float[np.ndarray, "N D"], actions: Shaped[np.ndarray, "A"], degree: int
) -> Float[np.ndarray, "N A J"]:
    """All products of 1 to `degree` of the numbers of [s, a], for each action; without the constant, which cancels.

    At degree 1 they are [s, a] itself. The part of the score that belongs to s is then the same for all actions, so a
    softmax ignores the state.

    Source: Bereyhi, chapter 5, x(s, a) = [x, y, a] of the moving particle.
    """
    N, A = len(x), len(actions)
    pairs = np.concatenate([np.repeat(x, A, axis=0), np.tile(actions.astype(np.float64), N)[:, None]], axis=1)
    return polynomial_features(pairs, degree)[:, 1:].reshape(N, A, -1)


def fourier_features(x: Float[np.ndarray, "N D"], order: int) -> Float[np.ndarray, "N J"]:
    """cos(pi c'x) for all c in {0, …, order}^D, the last entry of c moving fastest; J = (order + 1)^D.

    Args:
        x: Numbers scaled to [0, 1].
        order: Largest entry of c.

    Source: Konidaris et al. 2011; Sutton and Barto, section 9.5.2.
    """
    c = np.array(list(product(range(order + 1), repeat=x.shape[1])), dtype=np.float64)
    waves: np.ndarray = np.cos(np.pi * (x @ c.T))
    return waves


def radial_features(x: Float[np.ndarray, "N D"], centres: int, width: float | None) -> Float[np.ndarray, "N J"]:
    """exp(-|x - c|^2 / (2 width^2)) for c on a grid over [0, 1]^D, and a constant 1 at the end; J = centres^D + 1.

    Args:
        x: Numbers scaled to [0, 1].
        centres: Along each axis, from 0 to 1; a single one stands at 1/2.
        width: Standard deviation of a bump; None takes the distance of two centres, 1 if there is one alone.

    Source: Sutton and Barto, section 9.5.5.
    """
    axis = np.linspace(0.0, 1.0, centres) if centres > 1 else np.array([0.5])
    deviation = width or (1.0 / (centres - 1) if centres > 1 else 1.0)
    bumps = np.ones((len(x), 1))
    for d in range(x.shape[1]):  # a bump is the product of one bump on each axis
        along = np.exp(-0.5 * ((x[:, d : d + 1] - axis) / deviation) ** 2)
        bumps = (bumps[:, :, None] * along[:, None, :]).reshape(len(x), -1)
    return np.concatenate([bumps, np.ones((len(x), 1))], axis=1)


def tile_indices(x: Float[np.ndarray, "N D"], tilings: int, tiles: int) -> Int[np.ndarray, "N tilings"]:
    """The active tile of each grid, as an index into all tilings * (tiles + 1)^D of them.

    Grid i is shifted by i (1, 3, 5, …) / tilings of a tile along the axes, modulo one tile; the uneven shifts avoid
    diagonal artefacts. With a power of two no axis is left unshifted. A shifted grid has one tile more along each axis.

    Args:
        x: Numbers scaled to [0, 1].
        tilings: How many grids.
        tiles: Tiles along each axis of the first grid.

    Source: Sutton and Barto, section 9.5.4.
    """
    D = x.shape[1]
    steps = np.arange(tilings)[:, None] * (2 * np.arange(D) + 1) % tilings  # [tilings, D]
    cells = np.floor(x[:, None, :] * tiles + steps / tilings).astype(np.int64)  # [N, tilings, D]
    indices = np.broadcast_to(np.arange(tilings), cells.shape[:2])
    for d in range(D):
        indices = indices * (tiles + 1) + cells[:, :, d]
    return indices


def scaled_to_bounds(
    x: Float[np.ndarray, "N D"], low: Float[np.ndarray, "D"], high: Float[np.ndarray, "D"]
) -> Float[np.ndarray, "N D"]:
    """Numbers brought from [low, high] to [0, 1]; what lies outside is taken to the nearer bound."""
    inside: np.ndarray = np.clip((x - low) / (high - low), 0.0, 1.0)
    return inside


def one_hot(space: DiscreteSpace | MultiDiscreteSpace, observations: Shaped[np.ndarray, "N ..."]) -> np.ndarray:
    """One feature for each value of a discrete observation, of each component one after the other; float32 [N, J]."""
    if isinstance(space, DiscreteSpace):
        hot: np.ndarray = observations[:, None] - space.start == np.arange(space.n)
        return np.asarray(hot, dtype=np.float32)
    first = np.cumsum([0, *space.nvec[:-1]])
    features = np.zeros((len(observations), sum(space.nvec)), dtype=np.float32)
    np.put_along_axis(features, observations - np.array(space.starts) + first, 1.0, axis=1)
    return features


def state_numbers(observations: Shaped[np.ndarray, "N ..."]) -> Float[np.ndarray, "N D"]:
    """The observation's own numbers, flat, float64; an integer is one number."""
    return np.asarray(observations.reshape(len(observations), -1), dtype=np.float64)


# --- from a spec to features ------------------------------------------------------------------------------------------

_BOUNDED = (FourierFeaturesSpec, RbfFeaturesSpec, TileFeaturesSpec)


class StateFeatures:
    """x(s) of a spec.

    Attributes:
        count: J.
        active: How many of them are not zero, if the encoding is their indices [N, active]; None if it is [N, J].
    """

    def __init__(self, spec: FeaturesSpec, space: Space, table: np.ndarray | None = None) -> None:
        """Checks that the features fit.

        Args:
            spec: Any but joint features.
            space: Of the observations.
            table: [O, 1, J] for a table.

        Raises:
            SpecError: with a pointer from the root of a policy's spec.
        """
        self._spec, self._space, self._table = spec, space, table
        self.count = _count(spec, space, table)
        self.active = spec.tilings if isinstance(spec, TileFeaturesSpec) else None
        if isinstance(spec, _BOUNDED):
            self._low, self._high = _bounds(spec, space)

    def encode(self, observations: Shaped[np.ndarray, "N ..."]) -> np.ndarray:
        """Features [N, J] as float32, or the indices of the active ones, [N, active]."""
        spec = self._spec
        if isinstance(spec, OneHotFeaturesSpec):
            assert isinstance(self._space, DiscreteSpace | MultiDiscreteSpace)
            return one_hot(self._space, observations)
        if isinstance(spec, TableFeaturesSpec):
            assert isinstance(self._space, DiscreteSpace)
            assert self._table is not None
            rows: np.ndarray = self._table[observations - self._space.start, 0]
            return rows
        x = state_numbers(observations)
        if isinstance(spec, TileFeaturesSpec):
            return tile_indices(scaled_to_bounds(x, self._low, self._high), spec.tilings, spec.tiles)
        if isinstance(spec, FourierFeaturesSpec):
            features = fourier_features(scaled_to_bounds(x, self._low, self._high), spec.order)
        elif isinstance(spec, RbfFeaturesSpec):
            features = radial_features(scaled_to_bounds(x, self._low, self._high), spec.centres, spec.width)
        elif isinstance(spec, PolynomialFeaturesSpec):
            features = polynomial_features(x, spec.degree)
        else:
            features = np.concatenate([x, np.ones((len(x), 1))], axis=1)
        with np.errstate(over="ignore"):  # whoever acts checks that the outputs are finite
            return features.astype(np.float32)


class PairFeatures:
    """x(s, a) of a spec, for a finite set of actions.

    Attributes:
        count: J.
        actions: A.
    """

    def __init__(
        self, spec: FeaturesSpec, space: Space, actions: DiscreteSpace, table: np.ndarray | None = None
    ) -> None:
        """Checks that the features fit.

        Args:
            spec: Joint features, or a table.
            space: Of the observations.
            actions: What x(s, a) is computed for.
            table: [O, A, J] for a table.

        Raises:
            SpecError: with a pointer from the root of a policy's spec.
        """
        self._spec, self._space, self._table = spec, space, table
        self._actions = actions.start + np.arange(actions.n)
        self.actions = actions.n
        self.count = _count(spec, space, table)

    def encode(self, observations: Shaped[np.ndarray, "N ..."]) -> Float[np.ndarray, "N A J"]:
        """x(s, ·), float32."""
        if isinstance(self._spec, JointFeaturesSpec):
            features = joint_features(state_numbers(observations), self._actions, self._spec.degree)
            with np.errstate(over="ignore"):
                return features.astype(np.float32)
        assert isinstance(self._space, DiscreteSpace)
        assert self._table is not None
        rows: np.ndarray = self._table[observations - self._space.start]
        return rows


def open_features(
    spec: FeaturesSpec, space: Space, actions: Space, table: np.ndarray | None
) -> StateFeatures | PairFeatures:
    """The features that a spec describes.

    Args:
        spec: Which.
        space: Of the observations.
        actions: Of the actions.
        table: [O, A, J], or [O, 1, J] for features of the observation alone; for a table.

    Raises:
        SpecError: with a pointer from the root of a policy's spec, if they do not fit the spaces.
    """
    check_features(spec, space, actions)
    if isinstance(spec, JointFeaturesSpec):
        assert isinstance(actions, DiscreteSpace)
        return PairFeatures(spec, space, actions, table)
    if isinstance(spec, TableFeaturesSpec):
        if table is None:
            raise SpecError(
                "/features/values", "features_missing", "this environment has no table of features; give values"
            )
        _check_table(table.shape, space, actions)
        if isinstance(actions, DiscreteSpace) and table.shape[1] == actions.n:
            return PairFeatures(spec, space, actions, table)
    return StateFeatures(spec, space, table)


def check_features(spec: FeaturesSpec, space: Space, actions: Space) -> None:
    """Whether features fit the spaces, and are not too many.

    Raises:
        SpecError: with a pointer from the root of a policy's spec.
    """
    discrete = isinstance(space, DiscreteSpace)
    if isinstance(spec, TableFeaturesSpec):
        if not discrete:
            raise _misfit("a table of features needs discrete observations")
        if spec.values is not None:
            read_feature_table(spec.values, space, actions)
    elif isinstance(spec, OneHotFeaturesSpec) and not isinstance(space, DiscreteSpace | MultiDiscreteSpace):
        raise _misfit("one_hot needs discrete observations; take plain, polynomial, fourier, rbf or tile")
    elif isinstance(spec, JointFeaturesSpec) and not isinstance(actions, DiscreteSpace):
        raise _misfit("joint features need discrete actions; take polynomial")
    if isinstance(spec, _BOUNDED):
        _bounds(spec, space)
    if not isinstance(spec, TableFeaturesSpec):
        A = actions.n if isinstance(spec, JointFeaturesSpec) and isinstance(actions, DiscreteSpace) else 1
        _count(spec, space, None, A)


def read_feature_table(values: list[list[list[float]]], space: Space, actions: Space) -> np.ndarray:
    """The table of a spec as an array [O, A, J], or [O, 1, J] for features of the observation alone.

    Raises:
        SpecError: with a pointer at the row that is wrong.
    """
    A = len(values[0]) if values else 0
    J = len(values[0][0]) if A else 0
    for o, row in enumerate(values):
        if len(row) != A:
            raise SpecError(f"/features/values/{o}", "shape", f"expected {A} entries as in row 0, found {len(row)}")
        for a, features in enumerate(row):
            if len(features) != J:
                message = f"expected {J} features as in row 0, found {len(features)}"
                raise SpecError(f"/features/values/{o}/{a}", "shape", message)
    _check_table((len(values), A, J), space, actions)
    return np.array(values, dtype=np.float32)


def _check_table(shape: tuple[int, ...], space: Space, actions: Space) -> None:
    O = space.n if isinstance(space, DiscreteSpace) else 0  # noqa: E741 - the number of observations, as in TabularSpec
    widths = {1, actions.n} if isinstance(actions, DiscreteSpace) else {1}
    if len(shape) != 3 or shape[0] != O or shape[1] not in widths or shape[2] < 1:
        expected = " or ".join(f"[{O}, {A}, J]" for A in sorted(widths, reverse=True))
        raise SpecError("/features/values", "shape", f"expected shape {expected}, found {list(shape)}")


def _misfit(message: str) -> SpecError:
    return SpecError("/features/kind", "features_do_not_fit", message)


def _count(spec: FeaturesSpec, space: Space, table: np.ndarray | None, A: int = 1) -> int:
    """J, found before anything of that size is made."""
    D = observation_numbers(space)
    most = MAX_FEATURES
    if isinstance(spec, TableFeaturesSpec):
        return 0 if table is None else int(table.shape[2])
    if isinstance(spec, OneHotFeaturesSpec):
        # as wide as the space, whose size is bounded already
        return space.n if isinstance(space, DiscreteSpace) else sum(getattr(space, "nvec", []))
    if isinstance(spec, PlainFeaturesSpec):
        return D + 1
    if isinstance(spec, PolynomialFeaturesSpec):
        count = math.comb(D + spec.degree, spec.degree)
    elif isinstance(spec, JointFeaturesSpec):
        count = math.comb(D + 1 + spec.degree, spec.degree) - 1
    elif isinstance(spec, FourierFeaturesSpec):
        count = _power(spec.order + 1, D)
    elif isinstance(spec, RbfFeaturesSpec):
        count = _power(spec.centres, D) + 1
    else:
        count, most = spec.tilings * _power(spec.tiles + 1, D), MAX_TILES
    if count * A > most:
        raise SpecError(
            "/features",
            "too_many_features",
            f"expected at most {most} features; observations of {D} numbers would give {_written(count * A)}",
        )
    return count


def _power(base: int, exponent: int) -> int:
    return 1 if base == 1 else int(base ** min(exponent, 64))  # what is beyond is refused all the same


def _written(count: int) -> str:
    return str(count) if count < 10**9 else "more than a thousand million"


def _bounds(
    spec: FourierFeaturesSpec | RbfFeaturesSpec | TileFeaturesSpec, space: Space
) -> tuple[np.ndarray, np.ndarray]:
    """What is scaled to 0 and to 1: given, or the bounds of the space; float64 [D]."""
    D = observation_numbers(space)
    found = []
    for name, given, own in zip(("low", "high"), (spec.low, spec.high), _space_bounds(space), strict=True):
        values = own if given is None else np.array(given, dtype=np.float64)
        if values.shape != (D,):
            raise SpecError(f"/features/{name}", "shape", f"expected {D} numbers, found {len(values)}")
        if not np.isfinite(values).all():
            index = int(np.flatnonzero(~np.isfinite(values))[0])
            raise SpecError(
                f"/features/{name}",
                "bounds_missing",
                f"number {index} of the observation has no bound of its own; give low and high for all {D}",
            )
        found.append(values)
    low, high = found
    if not (low < high).all():
        index = int(np.flatnonzero(low >= high)[0])
        raise SpecError("/features/high", "bounds_order", f"expected high above low; not so for number {index}")
    return low, high


def _space_bounds(space: Space) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(space, BoxSpace):
        return box_bounds(space)
    if isinstance(space, DiscreteSpace):
        low, n = np.array([space.start]), np.array([space.n])
    elif isinstance(space, MultiDiscreteSpace):
        low, n = np.array(space.starts), np.array(space.nvec)
    else:
        low, n = np.zeros(space.n, dtype=np.int64), np.full(space.n, 2)
    # a component with a single value is brought to 0
    return low.astype(np.float64), (low + np.maximum(n - 1, 1)).astype(np.float64)
