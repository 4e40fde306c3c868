"""From observations to the outputs that a distribution reads: linear functions and fully connected networks.

Pure functions of (parameters, encoded observations), written once for numpy and torch. This file knows shapes and
initial values; it does not know which distribution reads the outputs.
"""

import math
from typing import Protocol, runtime_checkable

import numpy as np

from pgengine.distributions import Array, namespace
from pgengine.noise import Noise
from pgengine.spaces import BoxSpace, DiscreteSpace
from pgengine.spec import LinearPolicySpec, MlpPolicySpec

__all__ = [
    "MAX_PARAMETERS",
    "PAD",
    "FeatureScores",
    "Linear",
    "Mlp",
    "Network",
    "Table",
    "blocks",
    "open_network",
    "padded",
    "rows_are_independent",
]

MAX_PARAMETERS = 16_777_216
PAD = 8
"""Rows in a block."""


def padded(rows: np.ndarray) -> np.ndarray:
    """The rows, followed by zeros up to a multiple of PAD."""
    missing = -len(rows) % PAD
    if not missing:
        return rows
    room = np.zeros((len(rows) + missing, *rows.shape[1:]), dtype=rows.dtype)
    room[: len(rows)] = rows
    return room


def blocks(rows: np.ndarray) -> np.ndarray:
    """Rows [N, …] as [blocks, PAD, …], the last block filled up with zeros; a single block as [PAD, …].

    A matrix product chooses its method, and with it the last bits, by the number of rows. Taken block by block it
    always has the same number, so a row's bits do not depend on how many neighbours it has.
    """
    full = padded(rows)
    return full if len(full) == PAD else full.reshape(-1, PAD, *full.shape[1:])


def rows_are_independent() -> bool:
    """Self-test of `blocks` on this machine: whether a row has the same bits alone and among 4,096.

    Where it fails, an episode can only be replayed together with its whole batch.
    """
    noise = Noise(0, "acting", 0)
    for inputs, outputs in ((4, 64), (64, 64), (64, 2), (64, 17), (376, 17)):
        weight = noise.matrix("probe", 0, (inputs, outputs)).astype(np.float32)
        rows = noise.matrix("probe", 1, (4096, inputs)).astype(np.float32)
        among = (blocks(rows) @ weight).reshape(-1, outputs)
        if any(not np.array_equal((blocks(rows[n : n + 1]) @ weight)[0], among[n]) for n in range(0, 4096, 97)):
            return False
    return True


def _zeros(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}


@runtime_checkable
class Network(Protocol):
    """What a policy needs of its network."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters by name."""
        ...

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

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """One number for each feature."""
        return {"theta": self._features.shape[2:]}

    def initial(self, noise: Noise) -> dict[str, np.ndarray]:
        """All zero: all actions equally likely."""
        return _zeros(self.shapes())

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

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """One number for each state and output."""
        return {"theta": self._shape}

    def initial(self, noise: Noise) -> dict[str, np.ndarray]:
        """All zero."""
        return _zeros(self.shapes())

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

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """One row for each number of the observation, and a last one for the constant feature."""
        return {"theta": self._shape}

    def initial(self, noise: Noise) -> dict[str, np.ndarray]:
        """All zero."""
        return _zeros(self.shapes())

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
        self._layers = [(f"layers.{n}.weight", f"layers.{n}.bias") for n in range(len(self._sizes) - 1)]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """A weight [inputs, outputs] and a bias [outputs] for each layer."""
        shapes: dict[str, tuple[int, ...]] = {}
        for layer, (rows, columns) in enumerate(zip(self._sizes[:-1], self._sizes[1:], strict=True)):
            shapes |= {f"layers.{layer}.weight": (rows, columns), f"layers.{layer}.bias": (columns,)}
        return shapes

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
        for layer, (weight, bias) in enumerate(self._layers):
            x = x @ parameters[weight] + parameters[bias]
            if layer < last:
                x = xp.tanh(x) if self._activation == "tanh" else xp.where(x <= 0, xp.zeros_like(x), x)  # NaN stays NaN
        return x
