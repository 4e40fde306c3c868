"""Families of action distributions, written once against operations that numpy and torch share.

A distribution is a pure function of (parameters, outputs of the network) and takes its noise from outside. The action
that the environment gets is an image of the raw sample; log-probabilities belong to the raw sample, so clipping and
squashing stay outside the density and the score is exact.

    acting in numpy          log_prob and entropy in numpy or torch
    sample = d.sample(…)     d.log_prob(parameters, outputs, sample)
    action = d.action(sample)
"""

import math
from typing import Any, Protocol, runtime_checkable

import numpy as np
from array_api_compat import array_namespace

from pgengine.errors import SpecError
from pgengine.spaces import BoxSpace, DiscreteSpace, box_bounds
from pgengine.spec import GaussianSpec, SoftmaxSpec

__all__ = ["Array", "DiagonalGaussian", "Distribution", "Softmax", "namespace", "open_distribution"]

Array = Any
"""A numpy array or a torch tensor; jaxtyping tells the shapes apart, nothing here tells the libraries apart."""


@runtime_checkable
class Distribution(Protocol):
    """What a policy needs of a family of action distributions."""

    @property
    def width(self) -> int:
        """Outputs that the network must give for each observation."""
        ...

    @property
    def noise_width(self) -> int | None:
        """None: one uniform number for each sample. D: a standard normal vector."""
        ...

    def initial(self) -> dict[str, np.ndarray]:
        """Parameters of the distribution itself, at the start."""
        ...

    def sample(self, parameters: dict[str, Array], outputs: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Raw samples [N, …] at the noise, in numpy."""
        ...

    def mode(self, outputs: np.ndarray) -> np.ndarray:
        """Most probable raw samples [N, …], in numpy."""
        ...

    def action(self, sample: np.ndarray) -> np.ndarray:
        """What the environment gets for raw samples."""
        ...

    def log_prob(self, parameters: dict[str, Array], outputs: Array, sample: Array) -> Array:
        """Log-density [N] of raw samples."""
        ...

    def entropy(self, parameters: dict[str, Array], outputs: Array) -> Array:
        """Entropy [N] in nats."""
        ...


def namespace(array: Array) -> Any:
    """The library of an array, under the names that numpy and torch share."""
    # the general answer takes longer than an operation on one row, and nearly all arrays are numpy's
    return np if type(array) is np.ndarray else array_namespace(array)


def open_distribution(
    spec: SoftmaxSpec | GaussianSpec, space: DiscreteSpace | BoxSpace
) -> "Softmax | DiagonalGaussian":
    """The distribution that a spec describes over an action space.

    Raises:
        SpecError: if the family does not fit the space.
    """
    if isinstance(spec, SoftmaxSpec):
        if isinstance(space, DiscreteSpace):
            return Softmax(space)
        raise SpecError("/distribution/kind", "action_family_mismatch", "expected gaussian: the action space is a box")
    if isinstance(space, BoxSpace):
        return DiagonalGaussian(spec, space)
    raise SpecError("/distribution/kind", "action_family_mismatch", "expected softmax: the action space is discrete")


class Softmax:
    """pi(a|s) = exp f(s, a) / sum_b exp f(s, b).

    Source: Bereyhi, chapter 5, softmax policy; Sun, softmax over scores f_theta(s, a).
    """

    noise_width: int | None = None

    def __init__(self, space: DiscreteSpace) -> None:
        self.width = space.n
        self._start = space.start

    def initial(self) -> dict[str, np.ndarray]:
        """A softmax has no parameters of its own."""
        return {}

    def log_probabilities(self, outputs: Array) -> Array:
        """Log-probabilities [N, A] of all actions from the scores [N, A]."""
        xp = namespace(outputs)
        shifted = outputs - xp.max(outputs, axis=-1, keepdims=True)
        return shifted - xp.log(xp.sum(xp.exp(shifted), axis=-1, keepdims=True))

    def sample(self, parameters: dict[str, Array], outputs: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Indices of actions, by inverting the distribution function at the noise.

        The last boundary is left out of the comparison and the others are scaled by the sum, so that rounding never
        gives an action that does not exist.
        """
        return self.draw(np.exp(outputs - outputs.max(axis=-1, keepdims=True)), noise)

    def draw(self, weights: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Indices of actions drawn in proportion to weights [N, A] that need not sum to 1."""
        cdf = weights.cumsum(axis=-1, dtype=np.float64)
        indices: np.ndarray = (cdf[:, :-1] <= noise[:, None] * cdf[:, -1:]).sum(axis=-1)
        return indices

    def mode(self, outputs: np.ndarray) -> np.ndarray:
        """Index of the most probable action; of equal ones the first."""
        indices: np.ndarray = np.argmax(outputs, axis=-1)
        return indices

    def action(self, sample: np.ndarray) -> np.ndarray:
        """The environment's number of an action."""
        return sample + self._start

    def log_prob(self, parameters: dict[str, Array], outputs: Array, sample: Array) -> Array:
        """Log-probabilities [N] of the actions taken."""
        xp = namespace(outputs)
        return xp.take_along_axis(self.log_probabilities(outputs), sample[:, None], axis=-1)[:, 0]

    def entropy(self, parameters: dict[str, Array], outputs: Array) -> Array:
        """Entropy [N]; an action of probability zero adds nothing."""
        xp = namespace(outputs)
        log_p = self.log_probabilities(outputs)
        p = xp.exp(log_p)
        return -xp.sum(xp.where(p > 0, p * log_p, xp.zeros_like(p)), axis=-1)


class DiagonalGaussian:
    """N(mu(s), diag sigma^2) over the raw sample; the box is reached by clipping or by tanh, outside the density.

    Source: Bereyhi, chapter 5, Gaussian policy, sigma fixed or learned; Sun, N(mu_theta(s), sigma^2 I).
    """

    def __init__(self, spec: GaussianSpec, space: BoxSpace) -> None:
        """Reads the box.

        Raises:
            SpecError: if tanh has to squash into a box without bounds.
        """
        self.width = space.size
        self.noise_width: int | None = space.size
        self._shape = tuple(space.shape)
        self._dtype = np.dtype(space.dtype)
        self._low, self._high = box_bounds(space)
        self._map = spec.action_map
        self._learned = spec.sigma == "learned"
        self._log_sigma = np.full(self.width, math.log(spec.initial_sigma), dtype=np.float32)
        if self._map == "tanh" and not np.isfinite(self._high - self._low).all():
            raise SpecError(
                "/distribution/action_map", "unbounded_action", "expected clip: the action space has no bounds"
            )

    def initial(self) -> dict[str, np.ndarray]:
        """log_sigma [D], if it is learned."""
        return {"log_sigma": self._log_sigma.copy()} if self._learned else {}

    def log_sigma(self, parameters: dict[str, Array], like: Array) -> Array:
        """Logarithm [D] of the standard deviation, in the library of `like`."""
        if self._learned:
            return parameters["log_sigma"]
        return namespace(like).asarray(self._log_sigma, dtype=like.dtype)

    def sample(self, parameters: dict[str, Array], outputs: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """The mean plus sigma times the noise, [N, D]; not finite once the policy has diverged."""
        with np.errstate(over="ignore", invalid="ignore"):
            samples: np.ndarray = outputs + np.exp(self.log_sigma(parameters, outputs)) * noise
        return samples.astype(outputs.dtype)

    def mode(self, outputs: np.ndarray) -> np.ndarray:
        """The mean [N, D]."""
        return outputs

    def action(self, sample: np.ndarray) -> np.ndarray:
        """Samples brought into the box, [N, *shape]."""
        whole = self._dtype.kind in "iu"  # each whole number gets its share of the line
        low, high = (self._low - 0.5, self._high + 0.5) if whole else (self._low, self._high)
        if self._map == "clip":
            inside = np.clip(sample, low, high)
        else:
            inside = low + (np.tanh(sample) + 1.0) * 0.5 * (high - low)
        if whole:
            exact = 2.0**53  # beyond it floats skip whole numbers
            inside = np.clip(np.rint(inside), np.maximum(self._low, -exact), np.minimum(self._high, exact))
        actions: np.ndarray = inside.astype(self._dtype).reshape(len(sample), *self._shape)
        return actions

    def log_prob(self, parameters: dict[str, Array], outputs: Array, sample: Array) -> Array:
        """Log-density [N] of the raw samples, summed over the dimensions of the action."""
        xp = namespace(outputs)
        log_sigma = self.log_sigma(parameters, outputs)
        z = (sample - outputs) / xp.exp(log_sigma)
        return -xp.sum(0.5 * z * z + log_sigma + 0.5 * math.log(2 * math.pi), axis=-1)

    def entropy(self, parameters: dict[str, Array], outputs: Array) -> Array:
        """Entropy [N] of the raw sample; the same for every observation."""
        xp = namespace(outputs)
        one = xp.sum(self.log_sigma(parameters, outputs) + 0.5 * math.log(2 * math.pi * math.e))
        return one + xp.zeros_like(outputs[:, 0])
