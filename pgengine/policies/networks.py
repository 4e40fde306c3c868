"""From observations to the outputs that a distribution reads: linear functions and fully connected networks.

Pure functions of (parameters, encoded observations), written once for numpy and torch. This file knows shapes and
initial values; it does not know which distribution reads the outputs.
"""

import math
from typing import Protocol, runtime_checkable

import numpy as np

from pgengine.distributions import Array, namespace
from pgengine.errors import SpecError
from pgengine.noise import Noise
from pgengine.spaces import BoxSpace, DiscreteSpace
from pgengine.spec import LinearPolicySpec, MlpPolicySpec

__all__ = [
    "PAD",
    "FeatureScores",
    "Linear",
    "Mlp",
    "Network",
    "Table",
    "open_network",
    "padded",
    "rows_are_independent",
]

MAX_PARAMETERS = 16_777_216
PAD = 8
"""With a multiple of this many rows, a matrix product gives a row the same bits whatever its neighbours are."""


def padded(rows: np.ndarray) -> np.ndarray:
    """The rows, followed by zeros up to a multiple of PAD."""
    missing = -len(rows) % PAD
    if not missing:
        return rows
    room = np.zeros((len(rows) + missing, *rows.shape[1:]), dtype=rows.dtype)
    room[: len(rows)] = rows
    return room


def rows_are_independent() -> bool:
    """Self-test of PAD on this machine: whether a row's bits are the same in products with 8, 16, … rows.

    Where it fails, an episode can only be replayed together with its whole batch.
    """
    noise = Noise(0, "acting", 0)
    for inputs, outputs in ((4, 64), (64, 64), (64, 1), (17, 3)):
        weight = noise.matrix("probe", 0, (inputs, outputs)).astype(np.float32)
        rows = noise.matrix("probe", 1, (256, inputs)).astype(np.float32)
        product = rows @ weight
        if any(not np.array_equal(rows[:n] @ weight, product[:n]) for n in range(PAD, 256, PAD)):
            return False
    return True


@runtime_checkable
class Network(Protocol):
    """What a policy needs of its network."""

    def initial(self, noise: Noise) -> dict[str, np.ndarray]:
        """Parameters to start from."""
        ...

    def encode(self, observations: np.ndarray) -> np.ndarray:
        """Observations [N, …] as what `outputs` reads, in numpy."""
        ...

    def outputs(self, parameters: dict[str, Array], encoded: Array) -> Array:
        """Outputs [N, width]."""
        ...


def open_network(
    spec: LinearPolicySpec | MlpPolicySpec, space: DiscreteSpace | BoxSpace, width: int, features: np.ndarray | None
) -> Network:
    """The network that a spec describes.

    Args:
        spec: Which network.
        space: What it reads.
        width: How many outputs it gives.
        features: [S, A, J] features of state and action, if the environment has them.

    Raises:
        SpecError: if the network would be too large.
    """
    if isinstance(spec, MlpPolicySpec):
        return Mlp(spec, space, width)
    if features is not None:
        return FeatureScores(features)
    return Table(space, width) if isinstance(space, DiscreteSpace) else Linear(space, width)


class FeatureScores:
    """f(s, a) = theta' x(s, a) with explicit features. Source: Bereyhi, chapter 5, linear softmax."""

    def __init__(self, features: np.ndarray) -> None:
        self._features = features.astype(np.float32)

    def initial(self, noise: Noise) -> dict[str, np.ndarray]:
        """Theta [J] = 0: all actions equally likely."""
        return {"theta": np.zeros(self._features.shape[2], dtype=np.float32)}

    def encode(self, observations: np.ndarray) -> np.ndarray:
        """x(s, ·), [N, A, J]."""
        encoded: np.ndarray = self._features[observations]
        return encoded

    def outputs(self, parameters: dict[str, Array], encoded: Array) -> Array:
        """Scores [N, A]."""
        return encoded @ parameters["theta"]


class Table:
    """One number for each state and output: linear in one-hot features of the pair."""

    def __init__(self, space: DiscreteSpace, width: int) -> None:
        self._shape = (space.n, width)
        self._start = space.start

    def initial(self, noise: Noise) -> dict[str, np.ndarray]:
        """Theta [S, width] = 0."""
        return {"theta": np.zeros(self._shape, dtype=np.float32)}

    def encode(self, observations: np.ndarray) -> np.ndarray:
        """Indices of states [N]."""
        return observations - self._start

    def outputs(self, parameters: dict[str, Array], encoded: Array) -> Array:
        """Rows of the table, [N, width]."""
        return namespace(parameters["theta"]).take(parameters["theta"], encoded, axis=0)


class Linear:
    """theta' [x(s), 1], crossed with the outputs. Source: Bereyhi, chapter 5, theta' x(s)."""

    def __init__(self, space: BoxSpace, width: int) -> None:
        self._shape = (space.size + 1, width)

    def initial(self, noise: Noise) -> dict[str, np.ndarray]:
        """Theta [D + 1, width] = 0; the last row belongs to the constant feature."""
        return {"theta": np.zeros(self._shape, dtype=np.float32)}

    def encode(self, observations: np.ndarray) -> np.ndarray:
        """Flat observations [N, D]."""
        return observations.reshape(len(observations), -1)

    def outputs(self, parameters: dict[str, Array], encoded: Array) -> Array:
        """Linear outputs [N, width]."""
        theta = parameters["theta"]
        return encoded @ theta[:-1, :] + theta[-1, :]


class Mlp:
    """A fully connected network. Source: Bereyhi, chapter 5, deep policy network; Sun, MLP."""

    def __init__(self, spec: MlpPolicySpec, space: DiscreteSpace | BoxSpace, width: int) -> None:
        self._one_hot = space if isinstance(space, DiscreteSpace) else None
        inputs = space.n if isinstance(space, DiscreteSpace) else space.size
        self._sizes = [inputs, *spec.hidden, width]
        self._activation = spec.activation
        if (size := sum(a * b + b for a, b in zip(self._sizes[:-1], self._sizes[1:], strict=True))) > MAX_PARAMETERS:
            raise SpecError(
                "/hidden", "policy_too_large", f"expected at most {MAX_PARAMETERS} parameters, these are {size}"
            )

    def initial(self, noise: Noise) -> dict[str, np.ndarray]:
        """Orthogonal matrices (Saxe et al. 2014), the last one small: all actions start about equally likely."""
        parameters: dict[str, np.ndarray] = {}
        last = len(self._sizes) - 2
        for layer, (rows, columns) in enumerate(zip(self._sizes[:-1], self._sizes[1:], strict=True)):
            gain = 0.01 if layer == last else (5.0 / 3.0 if self._activation == "tanh" else math.sqrt(2.0))
            matrix = noise.matrix("parameters", layer, (max(rows, columns), min(rows, columns)))
            q, r = np.linalg.qr(matrix)
            q = q * np.sign(np.diag(r))
            weight = q if rows >= columns else q.T
            parameters[f"layers.{layer}.weight"] = np.ascontiguousarray(gain * weight, dtype=np.float32)
            parameters[f"layers.{layer}.bias"] = np.zeros(columns, dtype=np.float32)
        return parameters

    def encode(self, observations: np.ndarray) -> np.ndarray:
        """Flat observations, or one-hot vectors of a discrete one, [N, D]."""
        if self._one_hot is None:
            return observations.reshape(len(observations), -1)
        hot: np.ndarray = observations[:, None] - self._one_hot.start == np.arange(self._one_hot.n)
        return hot.astype(np.float32)

    def outputs(self, parameters: dict[str, Array], encoded: Array) -> Array:
        """Outputs of the last layer, [N, width]."""
        xp = namespace(encoded)
        x = encoded
        last = len(self._sizes) - 2
        for layer in range(last + 1):
            x = x @ parameters[f"layers.{layer}.weight"] + parameters[f"layers.{layer}.bias"]
            if layer < last:
                x = xp.tanh(x) if self._activation == "tanh" else xp.where(x > 0, x, xp.zeros_like(x))
        return x
