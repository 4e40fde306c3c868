"""Families of action distributions, written once against operations that numpy and torch share.

A distribution is a pure function of (parameters, outputs of the network) and takes its noise from outside. The action
that the environment gets is an image of the raw sample; log-probabilities belong to the raw sample, so clipping and
squashing stay outside the density and the score is exact.

    acting in numpy          log_prob and entropy in numpy or torch
    sample = d.sample(…)     d.log_prob(parameters, outputs, sample)
    action = d.action(sample)
"""

import math
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from array_api_compat import array_namespace

from pgengine.errors import SpecError
from pgengine.spaces import BoxSpace, DiscreteSpace, MultiBinarySpace, MultiDiscreteSpace, Space, box_bounds
from pgengine.spec import BernoulliSpec, GaussianSpec, SoftmaxSpec

__all__ = [
    "Array",
    "Bernoulli",
    "DiagonalGaussian",
    "Distribution",
    "MultiSoftmax",
    "Softmax",
    "box_is_near_one",
    "namespace",
    "open_distribution",
]

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)

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
    def noise_kind(self) -> Literal["uniform", "normal"]:
        """What a sample is made from: numbers in [0, 1), or standard normal ones."""
        ...

    @property
    def noise_width(self) -> int | None:
        """How many of them: None is a single number [N], D a vector [N, D]."""
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
    spec: SoftmaxSpec | BernoulliSpec | GaussianSpec, space: Space, *, uniform_share: float = 0.0
) -> "Softmax | MultiSoftmax | Bernoulli | DiagonalGaussian":
    """The distribution that a spec describes over an action space.

    Args:
        spec: Which family.
        space: What an action looks like.
        uniform_share: Probability with which the action (each component of it) is drawn uniformly instead.

    Raises:
        SpecError: if the family does not fit the space, or a box shall be mixed with the uniform distribution.
    """
    if isinstance(spec, SoftmaxSpec) and isinstance(space, DiscreteSpace):
        return Softmax(space, uniform_share)
    if isinstance(spec, SoftmaxSpec) and isinstance(space, MultiDiscreteSpace):
        return MultiSoftmax(space, uniform_share)
    if isinstance(spec, BernoulliSpec) and isinstance(space, MultiBinarySpace):
        return Bernoulli(space, uniform_share)
    if isinstance(spec, GaussianSpec) and isinstance(space, BoxSpace):
        if uniform_share:
            raise SpecError(
                "/distribution/kind",
                "mixture_needs_finite_actions",
                "only a finite set of actions can be mixed with the uniform one",
            )
        return DiagonalGaussian(spec, space)
    fitting, name = _FITTING[space.kind]
    raise SpecError("/distribution/kind", "action_family_mismatch", f"expected {fitting}: the action space is {name}")


_FITTING = {
    "discrete": ("softmax", "discrete"),
    "multi_discrete": ("softmax", "multi-discrete"),
    "multi_binary": ("bernoulli", "multi-binary"),
    "box": ("gaussian", "a box"),
}


def _log_softmax(scores: Array, uniform_share: float) -> Array:
    """Log-probabilities [N, A] of scores [N, A], mixed with the uniform distribution."""
    if type(scores) is np.ndarray:  # the same numbers by methods, which take half the time for a single row
        shifted = scores - scores.max(axis=-1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    else:
        xp = namespace(scores)
        shifted = scores - xp.max(scores, axis=-1, keepdims=True)
        log_p = shifted - xp.log(xp.sum(xp.exp(shifted), axis=-1, keepdims=True))
    if uniform_share:
        xp = namespace(scores)
        return xp.log((1.0 - uniform_share) * xp.exp(log_p) + uniform_share / scores.shape[-1])
    return log_p


def _entropy(log_p: Array) -> Array:
    """Entropy [N] of log-probabilities [N, A]; what has probability zero adds nothing."""
    xp = namespace(log_p)
    p = xp.exp(log_p)
    return -xp.sum(xp.where(p > 0, p * log_p, xp.zeros_like(p)), axis=-1)


def _draw(weights: np.ndarray, noise: np.ndarray) -> np.ndarray:
    cdf = weights.cumsum(axis=-1, dtype=np.float64)
    indices: np.ndarray = (cdf[:, :-1] <= noise[:, None] * cdf[:, -1:]).sum(axis=-1)
    return indices


class Softmax:
    """pi(a|s) = exp f(s, a) / sum_b exp f(s, b), which a share of the uniform distribution may be mixed with.

    Source: Bereyhi, chapter 5, softmax policy; Sun, softmax over scores f_theta(s, a).
    """

    noise_kind: Literal["uniform", "normal"] = "uniform"
    noise_width: int | None = None

    def __init__(self, space: DiscreteSpace, uniform_share: float = 0.0) -> None:
        self.width = space.n
        self._start = space.start
        self._uniform_share = uniform_share

    def initial(self) -> dict[str, np.ndarray]:
        """A softmax has no parameters of its own."""
        return {}

    def log_probabilities(self, outputs: Array) -> Array:
        """Log-probabilities [N, A] of all actions from the scores [N, A]."""
        return _log_softmax(outputs, self._uniform_share)

    def sample(self, parameters: dict[str, Array], outputs: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Indices of actions, by inverting the distribution function at the noise.

        The last boundary is left out of the comparison and the others are scaled by the sum, so that rounding never
        gives an action that does not exist.
        """
        if self._uniform_share:
            return self.draw(np.exp(self.log_probabilities(outputs)), noise)
        return self.draw(np.exp(outputs - outputs.max(axis=-1, keepdims=True)), noise)

    def draw(self, weights: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Indices of actions drawn in proportion to weights [N, A] that need not sum to 1."""
        return _draw(weights, noise)

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
        return _entropy(self.log_probabilities(outputs))


class MultiSoftmax:
    """A softmax of its own for each component of a MultiDiscrete action; components are drawn independently.

    Its outputs are the scores of the first component, then those of the second, and so on.

    Source: Bereyhi, chapter 5, softmax policy, on each component.
    """

    noise_kind: Literal["uniform", "normal"] = "uniform"

    def __init__(self, space: MultiDiscreteSpace, uniform_share: float = 0.0) -> None:
        self.width = sum(space.nvec)
        self.noise_width: int | None = len(space.nvec)
        self._starts = np.array(space.starts, dtype=np.int64)
        ends = np.cumsum(space.nvec).tolist()
        self._parts = [slice(end - n, end) for end, n in zip(ends, space.nvec, strict=True)]
        self._uniform_share = uniform_share

    def initial(self) -> dict[str, np.ndarray]:
        """A softmax has no parameters of its own."""
        return {}

    def log_probabilities(self, outputs: Array) -> list[Array]:
        """Log-probabilities [N, A_i] of the values of each component."""
        return [_log_softmax(outputs[:, part], self._uniform_share) for part in self._parts]

    def sample(self, parameters: dict[str, Array], outputs: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Indices [N, components]; each component inverts its distribution function at a number of its own."""
        tables = self.log_probabilities(outputs)
        return np.stack([_draw(np.exp(table), noise[:, i]) for i, table in enumerate(tables)], axis=1)

    def mode(self, outputs: np.ndarray) -> np.ndarray:
        """Index of the most probable value of each component; of equal ones the first."""
        return np.stack([np.argmax(outputs[:, part], axis=-1) for part in self._parts], axis=1)

    def action(self, sample: np.ndarray) -> np.ndarray:
        """The environment's numbers, [N, components]."""
        return sample + self._starts

    def log_prob(self, parameters: dict[str, Array], outputs: Array, sample: Array) -> Array:
        """Log-probabilities [N] of the actions taken: the sum over the components."""
        xp = namespace(outputs)
        tables = self.log_probabilities(outputs)
        taken = [xp.take_along_axis(table, sample[:, i : i + 1], axis=-1) for i, table in enumerate(tables)]
        return xp.sum(xp.concat(taken, axis=-1), axis=-1)

    def entropy(self, parameters: dict[str, Array], outputs: Array) -> Array:
        """Entropy [N]: the sum over the components, which are independent."""
        xp = namespace(outputs)
        return xp.sum(xp.stack([_entropy(table) for table in self.log_probabilities(outputs)], axis=-1), axis=-1)


class Bernoulli:
    """A coin for each component of a MultiBinary action; an output is the log-odds of a 1.

    Source: Bereyhi, chapter 5, softmax policy, on two values of each component with the score of 0 held at zero.
    """

    noise_kind: Literal["uniform", "normal"] = "uniform"

    def __init__(self, space: MultiBinarySpace, uniform_share: float = 0.0) -> None:
        self.width = space.n
        self.noise_width: int | None = space.n
        self._uniform_share = uniform_share

    def initial(self) -> dict[str, np.ndarray]:
        """A coin has no parameters of its own."""
        return {}

    def log_probabilities(self, outputs: Array) -> tuple[Array, Array]:
        """Log-probabilities [N, D] of a 0 and of a 1 in each component."""
        zero, one = _log_sigmoid(-outputs), _log_sigmoid(outputs)
        if self._uniform_share:
            xp, rest = namespace(outputs), 1.0 - self._uniform_share
            zero, one = (xp.log(rest * xp.exp(log_p) + self._uniform_share / 2) for log_p in (zero, one))
        return zero, one

    def sample(self, parameters: dict[str, Array], outputs: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Zeros and ones [N, D]; each inverts its distribution function at a number of its own."""
        zero, _ = self.log_probabilities(outputs.astype(np.float64))
        ones: np.ndarray = np.exp(zero) <= noise
        return ones.astype(np.int64)

    def mode(self, outputs: np.ndarray) -> np.ndarray:
        """The more probable value of each component; of equal ones 0."""
        more_probable: np.ndarray = outputs > 0
        return more_probable.astype(np.int64)

    def action(self, sample: np.ndarray) -> np.ndarray:
        """The same zeros and ones in the number type of Gymnasium's MultiBinary."""
        return sample.astype(np.int8)

    def log_prob(self, parameters: dict[str, Array], outputs: Array, sample: Array) -> Array:
        """Log-probabilities [N] of the actions taken: the sum over the components."""
        xp = namespace(outputs)
        zero, one = self.log_probabilities(outputs)
        return xp.sum(xp.where(sample > 0, one, zero), axis=-1)

    def entropy(self, parameters: dict[str, Array], outputs: Array) -> Array:
        """Entropy [N]: the sum over the components, which are independent."""
        xp = namespace(outputs)
        return xp.sum(_entropy(xp.stack(self.log_probabilities(outputs), axis=-1)), axis=-1)


def _log_sigmoid(x: Array) -> Array:
    """log(1 / (1 + e^-x)) without overflow on either side; its gradient is finite everywhere."""
    xp = namespace(x)
    # (x - |x|) / 2 is the smaller of x and 0, with the right slope at 0, where linear policies begin
    return 0.5 * (x - xp.abs(x)) - xp.log1p(xp.exp(-xp.abs(x)))


WIDEST = 1e12  # bounds that lie farther apart are a way to say that there are none


def box_is_near_one(space: BoxSpace) -> bool:
    """Whether draws with mean 0 and deviation 0.5 suit every number of a box: bounds like -1 and 1, or none."""
    low, high = box_bounds(space)
    with np.errstate(invalid="ignore"):
        middle, half = (low + high) / 2, (high - low) / 2
    bounded = np.isfinite(low) & np.isfinite(high) & (half < WIDEST)
    near = (np.abs(middle) <= half / 4) & (half >= 0.5) & (half <= 4.0)
    return bool((near | ~bounded).all())


def _scale_of_box(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Middle and half width [D] of a box; 0 and 1 of a number without two bounds."""
    with np.errstate(invalid="ignore"):
        half = (high - low) / 2
    bounded = np.isfinite(half) & (half < WIDEST)
    return np.where(bounded, np.where(bounded, low, 0.0) + half, 0.0), np.where(bounded, half, 1.0)


class DiagonalGaussian:
    """N(mu(s), diag sigma^2) over the raw sample; the box is reached by clipping or by tanh, outside the density.

    With `unit: box` and clip a raw sample z is the action middle + half * z, of the bounds of each number that has two.

    The outputs are the mean [N, D]; of `sigma: head` they are [N, 2D], the mean and then what is added to
    log(initial_sigma).

    Source: Bereyhi, chapter 5, Gaussian policy, sigma fixed or learned; Sun, N(mu_theta(s), sigma^2 I), sigma from
    a network.
    """

    noise_kind: Literal["uniform", "normal"] = "normal"

    def __init__(self, spec: GaussianSpec, space: BoxSpace) -> None:
        """Reads the box.

        Raises:
            SpecError: if tanh has to squash into a box without bounds.
        """
        D = space.size
        self._head = D if spec.sigma == "head" else None
        self.width = 2 * D if spec.sigma == "head" else D
        self.noise_width: int | None = D
        self._shape = tuple(space.shape)
        self._dtype = np.dtype(space.dtype)
        self._low, self._high = box_bounds(space)
        self._map = spec.action_map
        self._learned = spec.sigma == "learned"
        self._log_sigma = np.full(D, math.log(spec.initial_sigma), dtype=np.float32)
        self._whole = self._dtype.kind in "iu"  # each whole number gets its share of the line
        self._from: np.ndarray = self._low - 0.5 if self._whole else self._low
        self._to: np.ndarray = self._high + 0.5 if self._whole else self._high
        self._scale = _scale_of_box(self._from, self._to) if (spec.unit, self._map) == ("box", "clip") else None
        if self._map == "tanh" and not np.isfinite(self._high - self._low).all():
            raise SpecError(
                "/distribution/action_map", "unbounded_action", "expected clip: the action space has no bounds"
            )

    def initial(self) -> dict[str, np.ndarray]:
        """log_sigma [D], if it is a parameter of its own."""
        return {"log_sigma": self._log_sigma.copy()} if self._learned else {}

    @property
    def depends_on_observation(self) -> bool:
        """Whether the standard deviation is an output of the network."""
        return self._head is not None

    def mean(self, outputs: Array) -> Array:
        """The means [N, D] among the outputs."""
        return outputs if self._head is None else outputs[:, : self._head]

    def log_sigma(self, parameters: dict[str, Array], outputs: Array) -> Array:
        """Logarithm of the standard deviation in the library of the outputs: [D], or [N, D] of a head."""
        if self._learned:
            return parameters["log_sigma"]
        constant = namespace(outputs).asarray(self._log_sigma, dtype=outputs.dtype, device=outputs.device)
        return constant if self._head is None else outputs[:, self._head :] + constant

    def sample(self, parameters: dict[str, Array], outputs: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """The mean plus sigma times the noise, [N, D]; not finite once the policy has diverged."""
        with np.errstate(over="ignore", invalid="ignore"):
            samples: np.ndarray = self.mean(outputs) + np.exp(self.log_sigma(parameters, outputs)) * noise
        return samples.astype(outputs.dtype)

    def mode(self, outputs: np.ndarray) -> np.ndarray:
        """The mean [N, D]."""
        mean: np.ndarray = self.mean(outputs)
        return mean

    def action(self, sample: np.ndarray) -> np.ndarray:
        """Samples brought into the box, [N, *shape]."""
        if self._map == "clip":
            inside = np.clip(self._in_action_units(sample), self._from, self._to)
        else:
            inside = self._from + (np.tanh(sample) + 1.0) * 0.5 * (self._to - self._from)
        if self._whole:
            exact = 2.0**53  # beyond it floats skip whole numbers
            inside = np.clip(np.rint(inside), np.maximum(self._low, -exact), np.minimum(self._high, exact))
        actions: np.ndarray = inside.astype(self._dtype).reshape(len(sample), *self._shape)
        return actions

    def saturated(self, sample: np.ndarray) -> np.ndarray | None:
        """Which numbers [N, D] of the actions lie at a bound of the box; None if it has no bounds."""
        if not (np.isfinite(self._low) | np.isfinite(self._high)).any():
            return None
        if self._map == "tanh":
            at_bound: np.ndarray = np.abs(np.tanh(sample)) > 0.999
            return at_bound
        reached = self._in_action_units(sample)
        outside: np.ndarray = (reached <= self._low) | (reached >= self._high)
        return outside

    def _in_action_units(self, sample: np.ndarray) -> np.ndarray:
        if self._scale is None:
            return sample
        middle, half = self._scale
        scaled: np.ndarray = middle + half * sample
        return scaled

    def draws_alike(self, other: "DiagonalGaussian") -> bool:
        """Whether the same raw draw is the same action in both, so that their densities can be compared."""
        kept, others = self._scale, other._scale
        same = (kept is None) == (others is None) and (kept is None or np.array_equal(kept, others or ()))
        return self._map == other._map and same

    def log_prob(self, parameters: dict[str, Array], outputs: Array, sample: Array) -> Array:
        """Log-density [N] of the raw samples, summed over the dimensions of the action."""
        xp = namespace(outputs)
        log_sigma = self.log_sigma(parameters, outputs)
        z = (sample - self.mean(outputs)) / xp.exp(log_sigma)
        return -(0.5 * z * z + log_sigma + _HALF_LOG_TWO_PI).sum(axis=-1)

    def entropy(self, parameters: dict[str, Array], outputs: Array) -> Array:
        """Entropy [N] of the raw sample; without a head the same for every observation."""
        xp = namespace(outputs)
        one = xp.sum(self.log_sigma(parameters, outputs) + 0.5 * math.log(2 * math.pi * math.e), axis=-1)
        return one + xp.zeros_like(outputs[:, 0])
