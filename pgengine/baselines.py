"""Baselines with a memory: what earlier batches tell of the credit of a step.

A baseline that knows the own trajectory's actions biases the estimate; one that was learned from earlier batches does
not. So the order is fixed: predict, take the gradient, then fit. Those who want the other order can have it, and the
label says what it is.

Baselines within a batch are in `pgengine.estimators`.

Source: Log-derivative page, high variance and baselines; Duan et al. 2016, features of the linear value.
"""

from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped

from pgengine.environments import EnvironmentFacts
from pgengine.noise import Noise
from pgengine.rollout import Batch
from pgengine.spaces import BoxSpace, DiscreteSpace, MultiBinarySpace
from pgengine.spec import (
    AlgorithmSpec,
    LinearValueBaselineSpec,
    MovingAverageBaselineSpec,
    NeuralValueBaselineSpec,
)

__all__ = ["Baseline", "ValueBaseline", "open_baseline"]

STEPS_TO_ONE = 100.0  # environment steps after which the time as a feature is 1
LARGEST_FEATURE = 10.0


@runtime_checkable
class Baseline(Protocol):
    """What an estimator needs of a baseline with a memory."""

    def predict(self, batch: Batch, credit: Float[np.ndarray, "B"]) -> Float[np.ndarray, "B"]:
        """The baseline of each row. It looks at the batch's own credit where its spec says so."""
        ...

    def fit(self, batch: Batch, credit: Float[np.ndarray, "B"]) -> None:
        """Learns from a batch, after its gradient was taken."""
        ...

    def arrays(self) -> dict[str, np.ndarray]:
        """All that it remembers."""
        ...

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Puts back what `arrays` gave."""
        ...


@runtime_checkable
class ValueBaseline(Baseline, Protocol):
    """A baseline that says what an observation is worth."""

    def final_values(self, batch: Batch) -> Float[np.ndarray, "K"]:
        """What it says of the last observation of each episode."""
        ...


def open_baseline(algorithm: AlgorithmSpec, facts: EnvironmentFacts, seed: int) -> Baseline | None:
    """The baseline with a memory that an algorithm names, or None if it names another."""
    spec = algorithm.baseline
    if isinstance(spec, MovingAverageBaselineSpec):
        return _MovingAverage(spec, per_trajectory=algorithm.credit == "total_return")
    if isinstance(spec, LinearValueBaselineSpec):
        return _LinearValue(spec, facts)
    if isinstance(spec, NeuralValueBaselineSpec):
        return _NeuralValue(spec, facts, seed)
    return None


def _time(offsets: np.ndarray) -> Int[np.ndarray, "B"]:
    lengths = np.diff(offsets)
    time: np.ndarray = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    return time


class _MovingAverage:
    """average <- decay * average + (1 - decay) * mean credit of the batch, for each time step.

    A trajectory that has ended counts zero.
    """

    def __init__(self, spec: MovingAverageBaselineSpec, *, per_trajectory: bool) -> None:
        self._spec = spec
        self._per_trajectory = per_trajectory
        self._average = np.zeros(1)

    def predict(self, batch: Batch, credit: Float[np.ndarray, "B"]) -> Float[np.ndarray, "B"]:
        average = self._with(batch, credit) if self._spec.includes_batch else self._average
        time = np.zeros(len(credit), dtype=np.int64) if self._per_trajectory else _time(batch.offsets)
        rows: np.ndarray = np.append(average, 0.0)[np.minimum(time, len(average))]
        return rows

    def fit(self, batch: Batch, credit: Float[np.ndarray, "B"]) -> None:
        self._average = self._with(batch, credit)

    def _with(self, batch: Batch, credit: np.ndarray) -> np.ndarray:
        K = len(batch.lengths)
        if self._per_trajectory:
            means = np.array([credit[batch.offsets[:-1]].sum() / K])
        else:
            means = np.bincount(_time(batch.offsets), weights=credit) / K
        average = np.zeros(max(len(means), len(self._average)))
        average[: len(self._average)] = self._spec.decay * self._average
        average[: len(means)] += (1.0 - self._spec.decay) * means
        return average

    def arrays(self) -> dict[str, np.ndarray]:
        return {"average": self._average}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        self._average = arrays["average"].copy()


class _ValueFeatures:
    """What a value reads: the observation's numbers or a one-hot vector, and the time."""

    def __init__(self, facts: EnvironmentFacts) -> None:
        space = facts.observation_space
        self._discrete = space if isinstance(space, DiscreteSpace) else None
        if isinstance(space, DiscreteSpace | MultiBinarySpace):
            numbers = space.n
        else:
            numbers = space.size if isinstance(space, BoxSpace) else len(space.nvec)
        self.size = numbers + 1

    def __call__(
        self, observations: Shaped[np.ndarray, "B ..."], time: Int[np.ndarray, "B"]
    ) -> Float[np.ndarray, "B F"]:
        if self._discrete is None:
            flat = observations.reshape(len(observations), -1).astype(np.float64)
        else:
            flat = (observations[:, None] - self._discrete.start == np.arange(self._discrete.n)).astype(np.float64)
        clipped = np.clip(flat, -LARGEST_FEATURE, LARGEST_FEATURE)
        return np.concatenate([clipped, time[:, None] / STEPS_TO_ONE], axis=1)


class _LinearValue:
    """w' [o, o^2, t, t^2, t^3, 1] by least squares on the last batch."""

    def __init__(self, spec: LinearValueBaselineSpec, facts: EnvironmentFacts) -> None:
        self._spec = spec
        self._read = _ValueFeatures(facts)
        self._coefficients = np.zeros(2 * (self._read.size - 1) + 4)

    def _features(self, observations: np.ndarray, time: np.ndarray) -> np.ndarray:
        read = self._read(observations, time)
        numbers, t = read[:, :-1], read[:, -1:]
        return np.concatenate([numbers, numbers**2, t, t**2, t**3, np.ones_like(t)], axis=1)

    def predict(self, batch: Batch, credit: Float[np.ndarray, "B"]) -> Float[np.ndarray, "B"]:
        features = self._features(batch.observations, _time(batch.offsets))
        coefficients = self._fitted(features, credit) if self._spec.fit == "before" else self._coefficients
        rows: np.ndarray = features @ coefficients
        return rows

    def final_values(self, batch: Batch) -> Float[np.ndarray, "K"]:
        values: np.ndarray = self._features(batch.final_observations, batch.lengths) @ self._coefficients
        return values

    def fit(self, batch: Batch, credit: Float[np.ndarray, "B"]) -> None:
        self._coefficients = self._fitted(self._features(batch.observations, _time(batch.offsets)), credit)

    def _fitted(self, features: np.ndarray, credit: np.ndarray) -> np.ndarray:
        B, size = features.shape
        normal = features.T @ features / B + self._spec.ridge * np.eye(size)
        solved: np.ndarray = np.linalg.solve(normal, features.T @ credit / B)
        return solved

    def arrays(self) -> dict[str, np.ndarray]:
        return {"coefficients": self._coefficients}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        self._coefficients = arrays["coefficients"].copy()


class _NeuralValue:
    """A tanh network of its own on scaled inputs, for scaled credits, a few steps of Adam on each batch."""

    def __init__(self, spec: NeuralValueBaselineSpec, facts: EnvironmentFacts, seed: int) -> None:
        self._spec = spec
        self._read = _ValueFeatures(facts)
        sizes = [self._read.size, *spec.hidden, 1]
        noise = Noise(seed, "training", 0)
        self._weights: list[torch.Tensor] = []
        for layer, (rows, columns) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            matrix = noise.matrix("value", layer, (rows, columns)) / np.sqrt(rows)
            self._weights += [torch.as_tensor(matrix), torch.zeros(columns, dtype=torch.float64)]
        self._moments = [torch.zeros_like(w) for w in self._weights] + [torch.zeros_like(w) for w in self._weights]
        self._scales = np.concatenate([np.zeros(sizes[0]), np.ones(sizes[0]), [0.0, 0.0]])
        self._steps = 0

    def predict(self, batch: Batch, credit: Float[np.ndarray, "B"]) -> Float[np.ndarray, "B"]:
        if self._spec.fit == "before":
            fitted = self._copy()
            fitted.fit(batch, credit)
            return fitted._values(batch.observations, _time(batch.offsets))
        return self._values(batch.observations, _time(batch.offsets))

    def final_values(self, batch: Batch) -> Float[np.ndarray, "K"]:
        return self._values(batch.final_observations, batch.lengths)

    def _values(self, observations: np.ndarray, time: np.ndarray) -> np.ndarray:
        size = self._read.size
        x = (self._read(observations, time) - self._scales[:size]) / self._scales[size:-2]
        with torch.no_grad():
            values: np.ndarray = self._outputs(torch.as_tensor(x)).numpy()
        scaled: np.ndarray = self._scales[-2] + self._scales[-1] * values
        return scaled

    def _outputs(self, x: torch.Tensor) -> torch.Tensor:
        for layer in range(0, len(self._weights), 2):
            x = x @ self._weights[layer] + self._weights[layer + 1]
            if layer < len(self._weights) - 2:
                x = torch.tanh(x)
        return x[:, 0]

    def fit(self, batch: Batch, credit: Float[np.ndarray, "B"]) -> None:
        features = self._read(batch.observations, _time(batch.offsets))
        deviation = features.std(axis=0)
        self._scales = np.concatenate(
            [features.mean(axis=0), np.where(deviation > 1e-6, deviation, 1.0), [credit.mean(), credit.std()]]
        )
        size = len(deviation)
        x = torch.as_tensor((features - self._scales[:size]) / self._scales[size:-2])
        target = torch.as_tensor((credit - self._scales[-2]) / max(float(self._scales[-1]), 1e-6))
        for weight in self._weights:
            weight.requires_grad_(True)
        for _ in range(self._spec.steps):
            loss = ((self._outputs(x) - target) ** 2).mean()
            self._adam(torch.autograd.grad(loss, self._weights))
        for weight in self._weights:
            weight.requires_grad_(False)

    def _adam(self, gradients: tuple[torch.Tensor, ...]) -> None:
        """One step of Adam, whose moments are plain arrays that a state can hold."""
        self._steps += 1
        n = len(self._weights)
        with torch.no_grad():
            for weight, gradient, first, second in zip(
                self._weights, gradients, self._moments[:n], self._moments[n:], strict=True
            ):
                first.mul_(0.9).add_(gradient, alpha=0.1)
                second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
                corrected = first / (1 - 0.9**self._steps)
                root = (second / (1 - 0.999**self._steps)).sqrt_().add_(1e-8)
                weight.sub_(self._spec.learning_rate * corrected / root)

    def _copy(self) -> "_NeuralValue":
        copied = object.__new__(_NeuralValue)
        copied._spec, copied._read = self._spec, self._read
        copied.restore(self.arrays())
        return copied

    def arrays(self) -> dict[str, np.ndarray]:
        arrays = {f"weights.{i}": w.numpy().copy() for i, w in enumerate(self._weights)}
        arrays |= {f"moments.{i}": m.numpy().copy() for i, m in enumerate(self._moments)}
        return arrays | {"scales": self._scales, "steps": np.array([self._steps])}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        n = sum(name.startswith("weights.") for name in arrays)
        self._weights = [torch.as_tensor(arrays[f"weights.{i}"].copy()) for i in range(n)]
        self._moments = [torch.as_tensor(arrays[f"moments.{i}"].copy()) for i in range(2 * n)]
        self._scales, self._steps = arrays["scales"].copy(), int(arrays["steps"][0])
