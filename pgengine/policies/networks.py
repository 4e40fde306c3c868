"""From observations to the outputs that a distribution reads: linear functions and fully connected networks.

Pure functions of (parameters, encoded observations), written once for numpy and torch. This file knows shapes and
initial values; it does not know which distribution reads the outputs. In numpy `outputs` gets rows in blocks, as
[PAD, …] or [blocks, PAD, …], so that a row's bits do not depend on its neighbours; in torch it gets [N, …].
"""

import math
from typing import Protocol, runtime_checkable

import numpy as np

from pgengine.distributions import Array, namespace
from pgengine.errors import SpecError
from pgengine.features import PairFeatures, StateFeatures, open_features
from pgengine.noise import Noise
from pgengine.policies.layers import PAD, activate, encoded_numbers, orthogonal, product, width_of_numbers
from pgengine.policies.transformer import Transformer
from pgengine.spaces import BoxSpace, DiscreteSpace, MultiDiscreteSpace, Space
from pgengine.spec import (
    FeaturesSpec,
    LinearPolicySpec,
    MlpPolicySpec,
    OneHotFeaturesSpec,
    PlainFeaturesSpec,
    ScorePolicySpec,
    TableFeaturesSpec,
    TransformerPolicySpec,
)

__all__ = [
    "MAX_PARAMETERS",
    "PAD",
    "CrossedFeatures",
    "FeatureScores",
    "Linear",
    "Mlp",
    "Network",
    "PairScores",
    "Table",
    "blocks",
    "open_network",
    "padded",
]

MAX_PARAMETERS = 16_777_216


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

    A matrix product chooses its method, and with it the last bits, by the number of rows. Taken block by block
    (`product`) it always has the same number, so a row's bits depend neither on its neighbours nor on its place.
    """
    full = padded(rows)
    return full if len(full) == PAD else full.reshape(-1, PAD, *full.shape[1:])


def _zeros(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}


@runtime_checkable
class Network(Protocol):
    """What a policy needs of its network."""

    @property
    def numbers(self) -> int:
        """How many numbers a forward pass makes for one observation, or window, at most; all layers together."""
        ...

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
    spec: LinearPolicySpec | MlpPolicySpec | ScorePolicySpec | TransformerPolicySpec,
    space: Space,
    width: int,
    features: np.ndarray | None,
    actions: Space | None = None,
) -> Network:
    """The network that a spec describes.

    Args:
        spec: Which network.
        space: What it reads.
        width: How many outputs it gives.
        features: [O, A, J] features of observation and action, or [O, 1, J] of the observation, if there is a table.
        actions: The action space, for features of observation and action; None for networks that are no policies.

    Raises:
        SpecError: if the parts do not fit one another.
    """
    if isinstance(spec, TransformerPolicySpec):
        return Transformer(spec, space, width)
    if isinstance(spec, MlpPolicySpec):
        return Mlp(spec, space, width)
    if isinstance(spec, ScorePolicySpec):
        return PairScores(spec, space, _finite(actions, width), features)
    return _linear(spec.features, space, width, features, actions)


def _linear(
    spec: FeaturesSpec | None, space: Space, width: int, table: np.ndarray | None, actions: Space | None
) -> Network:
    if spec is None:  # a policy that was kept before features had names, or that has no environment
        spec = _usual_features(space, table)
    if isinstance(spec, OneHotFeaturesSpec) and isinstance(space, DiscreteSpace):
        return Table(space, width)
    if isinstance(spec, PlainFeaturesSpec) and isinstance(space, BoxSpace):
        return Linear(space, width)
    opened = open_features(spec, space, actions or DiscreteSpace(n=width), table)
    return FeatureScores(opened) if isinstance(opened, PairFeatures) else CrossedFeatures(opened, width)


def _usual_features(space: Space, table: np.ndarray | None) -> FeaturesSpec:
    if table is not None:
        return TableFeaturesSpec()
    return OneHotFeaturesSpec() if isinstance(space, DiscreteSpace | MultiDiscreteSpace) else PlainFeaturesSpec()


def _finite(actions: Space | None, width: int) -> DiscreteSpace:
    actions = DiscreteSpace(n=width) if actions is None else actions
    if not isinstance(actions, DiscreteSpace):
        raise SpecError(
            "/kind", "score_needs_discrete_actions", "a score network gives a number for each action; take mlp"
        )
    return actions


_FACTORS = 16  # numbers of which a feature is made: up to six factors in 64 bits, and copies


class FeatureScores:
    """f(s, a) = theta' x(s, a). Source: Bereyhi, chapter 5, linear softmax."""

    def __init__(self, features: PairFeatures) -> None:
        self._features = features

    @property
    def numbers(self) -> int:
        """The features of every action and what they are made from."""
        return _FACTORS * self._features.count * self._features.actions

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """One number for each feature."""
        return {"theta": (self._features.count,)}

    def initial(self, noise: Noise) -> dict[str, np.ndarray]:
        """All zero: all actions equally likely."""
        return _zeros(self.shapes())

    def encode(self, observations: np.ndarray) -> np.ndarray:
        """x(s, ·), [N, A, J]."""
        return self._features.encode(observations)

    def outputs(self, parameters: dict[str, Array], encoded: Array) -> Array:
        """Scores [N, A]."""
        return encoded @ parameters["theta"]


class CrossedFeatures:
    """theta' x(s), crossed with the outputs: each output has a column of its own.

    Source: Bereyhi, chapter 5, theta' x(s).
    """

    def __init__(self, features: StateFeatures, width: int) -> None:
        self._features = features
        self._width = width

    @property
    def numbers(self) -> int:
        """The features, or the rows of the active ones, and what they are made from; the outputs."""
        active = self._features.active
        made = self._features.count if active is None else active * (1 + self._width)
        return _FACTORS * made + self._width

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """One number for each feature and output."""
        return {"theta": (self._features.count, self._width)}

    def initial(self, noise: Noise) -> dict[str, np.ndarray]:
        """All zero."""
        return _zeros(self.shapes())

    def encode(self, observations: np.ndarray) -> np.ndarray:
        """Features [N, J], or the indices of those that are 1, [N, active]."""
        return self._features.encode(observations)

    def outputs(self, parameters: dict[str, Array], encoded: Array) -> Array:
        """Linear outputs [N, width]."""
        theta = parameters["theta"]
        if self._features.active is None:
            return product(encoded, theta)
        xp = namespace(theta)
        rows = xp.take(theta, xp.reshape(encoded, (-1,)), axis=0)
        return xp.sum(xp.reshape(rows, (*encoded.shape, self._width)), axis=-2)


class Table:
    """One number for each state and output: linear in one-hot features of the pair."""

    def __init__(self, space: DiscreteSpace, width: int) -> None:
        self._shape = (space.n, width)
        self._start = space.start

    @property
    def numbers(self) -> int:
        """The outputs."""
        return self._shape[1]

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

    @property
    def numbers(self) -> int:
        """The numbers of the observation and the outputs."""
        return sum(self._shape)

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
        return product(encoded, theta[:-1, :]) + theta[-1, :]


_GAINS = {"tanh": 5.0 / 3.0, "relu": math.sqrt(2.0)}
_LAST_GAIN = 0.01  # all actions start about equally likely


class _Layers:
    """Fully connected layers, one after the other."""

    def __init__(self, sizes: list[int], activation: str) -> None:
        self._sizes = sizes
        self._activation = activation
        self._names = [(f"layers.{n}.weight", f"layers.{n}.bias") for n in range(len(sizes) - 1)]

    @property
    def numbers(self) -> int:
        """The inputs, and each layer before, within and after its activation."""
        return 3 * sum(self._sizes)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """A weight [inputs, outputs] and a bias [outputs] for each layer."""
        shapes: dict[str, tuple[int, ...]] = {}
        for names, rows, columns in zip(self._names, self._sizes[:-1], self._sizes[1:], strict=True):
            shapes |= {names[0]: (rows, columns), names[1]: (columns,)}
        return shapes

    def initial(self, noise: Noise) -> dict[str, np.ndarray]:
        """Orthogonal matrices (Saxe et al. 2014), the last one small: all actions start about equally likely."""
        parameters: dict[str, np.ndarray] = {}
        last = len(self._names) - 1
        for layer, (weight, bias) in enumerate(self._names):
            gain = _LAST_GAIN if layer == last else _GAINS[self._activation]
            shape = (self._sizes[layer], self._sizes[layer + 1])
            parameters[weight] = orthogonal(noise, layer, shape, gain)
            parameters[bias] = np.zeros(shape[1], dtype=np.float32)
        return parameters


class Mlp(_Layers):
    """A fully connected network. Source: Bereyhi, chapter 5, deep policy network; Sun, MLP."""

    def __init__(self, spec: MlpPolicySpec, space: Space, width: int) -> None:
        super().__init__([width_of_numbers(space), *spec.hidden, width], spec.activation)
        self._space = space
        self._flat = isinstance(space, BoxSpace)

    def encode(self, observations: np.ndarray) -> np.ndarray:
        """Flat observations, or one-hot vectors of a discrete one, [N, D]."""
        if self._flat:
            return observations.reshape(len(observations), -1)
        return encoded_numbers(self._space, observations)

    def outputs(self, parameters: dict[str, Array], encoded: Array) -> Array:
        """Outputs of the last layer, [N, width]."""
        (weight, bias), *others = self._names
        x = product(encoded, parameters[weight]) + parameters[bias]
        for weight, bias in others:
            x = product(activate(self._activation, x), parameters[weight]) + parameters[bias]
        return x


class PairScores(_Layers):
    """A fully connected network f(s, a) that gives one score for each pair.

    It reads x(s, a) of a table, or the observation beside a one-hot action. In the latter case the first layer is
    taken apart: its rows for the observation are multiplied once for all actions, its rows for the actions are added.

    Source: Sun, Policy Gradient, softmax over f_theta(s, a) with f_theta: S x A -> R.
    """

    def __init__(self, spec: ScorePolicySpec, space: Space, actions: DiscreteSpace, table: np.ndarray | None) -> None:
        self._space, self._actions = space, actions
        self._pairs: PairFeatures | None = None
        if table is not None or spec.features is not None:
            opened = open_features(spec.features or TableFeaturesSpec(), space, actions, table)
            if not isinstance(opened, PairFeatures):
                raise SpecError("/features/values", "shape", "a score network needs features of pairs, [O, A, J]")
            self._pairs = opened
        inputs = width_of_numbers(space) + actions.n if self._pairs is None else self._pairs.count
        super().__init__([inputs, *spec.hidden, 1], spec.activation)

    @property
    def numbers(self) -> int:
        """Those of a fully connected network for each action."""
        return self._actions.n * super().numbers

    def encode(self, observations: np.ndarray) -> np.ndarray:
        """Observations [N, D], or features [N, A, J]."""
        return encoded_numbers(self._space, observations) if self._pairs is None else self._pairs.encode(observations)

    def outputs(self, parameters: dict[str, Array], encoded: Array) -> Array:
        """Scores [N, A]."""
        xp, A = namespace(encoded), self._actions.n
        (weight, bias), *others = self._names
        if self._pairs is None:
            of_states = product(encoded, parameters[weight][:-A, :])
            x = of_states[..., None, :] + parameters[weight][-A:, :]  # [N, A, H]
            # pairs become rows of one matrix, which in numpy has the same number of rows in every block
            x = xp.reshape(x, (*encoded.shape[:-2], encoded.shape[-2] * A, x.shape[-1]))
        else:
            x = xp.reshape(encoded, (*encoded.shape[:-3], encoded.shape[-3] * A, encoded.shape[-1]))
            x = product(x, parameters[weight])
        x = x + parameters[bias]
        for weight, bias in others:
            x = product(activate(self._activation, x), parameters[weight]) + parameters[bias]
        return xp.reshape(x, (*x.shape[:-2], x.shape[-2] // A, A))
