"""A policy: spec, spaces and arrays; acts with numpy alone, and is kept as safetensors with a JSON header.

    policy = pgengine.load("policy.safetensors")
    action = policy.act([0.0, 0.1, 0.0, -0.1])

What a policy reads is called `seen`: observations [N, …], or windows [N, k, …] over the last k of them if it has a
memory. This file knows how a policy is made, kept, checked and asked. It imports no torch: training binds the same pure
functions to torch tensors.
"""

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Float, Int, Shaped
from pydantic import Field

from pgengine.distributions import Array, Bernoulli, DiagonalGaussian, MultiSoftmax, Softmax, open_distribution
from pgengine.environments import EnvironmentFacts
from pgengine.environments.tabular import TabularMDP
from pgengine.errors import ObservationError, SpecError
from pgengine.features import read_feature_table
from pgengine.noise import Noise
from pgengine.policies.layers import PAD
from pgengine.policies.memory import first_windows, mark, shifted_windows, windows_of_rows
from pgengine.policies.networks import MAX_PARAMETERS, blocks, open_network
from pgengine.policies.normaliser import merged, new_buffers, normalised
from pgengine.policies.probes import probes
from pgengine.resolution import resolve_policy
from pgengine.spaces import BoxSpace, Space, SpaceSpec, array_shape, parse_observations
from pgengine.spec import (
    LARGEST_INTEGER,
    EnvironmentSpec,
    LinearPolicySpec,
    PolicySpec,
    ScorePolicySpec,
    Spec,
    TableFeaturesSpec,
    TabularSpec,
    TransformerPolicySpec,
)

__all__ = ["Acted", "Policy", "PolicyHeader", "create_policy"]

NUMBERS = 2_000_000  # made at a time by a forward pass of many rows: some megabytes


@dataclass(slots=True)
class Acted:
    """What a policy did with N observations.

    Attributes:
        actions: [N, …] for the environment.
        samples: [N, …] raw draws, which the log-probabilities belong to.
        log_probs: [N] in nats.
        probabilities: [N, A] of a softmax; a list of them, one for each component of a MultiDiscrete action; [N, D] of
            a 1 in each component of a MultiBinary action; else None.
        mean: [N, D] of a Gaussian, else None.
        sigma: [D] of a Gaussian, [N, D] of one with a head, else None.
    """

    actions: Shaped[np.ndarray, "N ..."]
    samples: Shaped[np.ndarray, "N ..."]
    log_probs: Float[np.ndarray, "N"]
    probabilities: Float[np.ndarray, "N A"] | list[np.ndarray] | None
    mean: Float[np.ndarray, "N D"] | None
    sigma: Float[np.ndarray, "D"] | Float[np.ndarray, "N D"] | None


class PolicyHeader(Spec):
    """What stands beside the arrays in a checkpoint."""

    format: str = "pgengine-policy"
    """Tells our files from others."""
    version: int = 1
    """Version of this shape."""
    policy: PolicySpec
    """Network and distribution, all defaults written out."""
    observation_space: SpaceSpec
    """What it reads."""
    action_space: SpaceSpec
    """What it does."""
    updates: int = Field(ge=0, le=LARGEST_INTEGER)
    """Updates that the policy has had."""
    uniform_share: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability with which an action is drawn uniformly instead."""


class Policy:
    """A pure function of (parameters, what is seen), with its parameters.

    Attributes:
        spec: Network and distribution, all defaults written out.
        observation_space: What one observation looks like.
        action_space: What it does.
        updates: Updates that it has had.
        parameters: Arrays by name, float32.
        buffers: Figures that normalise observations, float64, empty without them; they move by `observe` alone.
        features: [O, A, J] features of observation and action, or [O, 1, J] of the observation, or None.
        memory: How many observations it reads at once, the newest one included.
        uniform_share: Probability with which an action (each component of it) is drawn uniformly instead.
    """

    def __init__(
        self,
        header: PolicyHeader,
        parameters: dict[str, np.ndarray],
        features: np.ndarray | None,
        buffers: dict[str, np.ndarray] | None = None,
    ) -> None:
        """Binds parameters to the functions that a header names.

        Args:
            header: What it is.
            parameters: Arrays by name.
            features: Table of features, for a policy that reads one.
            buffers: Figures of the normaliser; None starts without any observation.

        Raises:
            SpecError: if the header's parts do not fit one another.
        """
        if header.policy.distribution is None:
            raise SpecError("/distribution", "missing", "a policy is kept with its distribution")
        self.spec = header.policy
        self.observation_space: Space = header.observation_space
        self.action_space: Space = header.action_space
        self.updates = header.updates
        self.parameters = parameters
        self.features = features
        self.memory = header.policy.window if isinstance(header.policy, TransformerPolicySpec) else 1
        self.uniform_share = header.uniform_share
        self.distribution = open_distribution(
            header.policy.distribution, header.action_space, uniform_share=header.uniform_share
        )
        self.network = open_network(
            header.policy, header.observation_space, self.distribution.width, features, header.action_space
        )
        self._piece = max(PAD, self.rows_at_once(NUMBERS) // PAD * PAD)
        self._normalises = header.policy.normalise_observations
        self.buffers = self._new_buffers() if buffers is None else buffers

    @property
    def size(self) -> int:
        """How many numbers its parameters are, whether they exist yet or not."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    @property
    def multiplications(self) -> int:
        """About how many a forward pass takes for one row of what is seen."""
        of_actions = isinstance(self.spec, ScorePolicySpec)  # each action is a row of its matrices
        return self.size * (self.distribution.width if of_actions else self.memory)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of its parameters by name."""
        return self.network.shapes() | {name: array.shape for name, array in self.distribution.initial().items()}

    def _new_buffers(self) -> dict[str, np.ndarray]:
        if not self._normalises:
            return {}
        if not isinstance(self.observation_space, BoxSpace):
            raise SpecError("/normalise_observations", "normalise_needs_box", "only boxes of numbers are normalised")
        return new_buffers(self.observation_space)

    # --- the pure functions, in numpy or torch ---

    def log_prob(self, parameters: dict[str, Array], encoded: Array, samples: Array) -> Array:
        """Log-probabilities [N] of raw samples, differentiable in torch."""
        return self.distribution.log_prob(parameters, self.network.outputs(parameters, encoded), samples)

    def entropy(self, parameters: dict[str, Array], encoded: Array) -> Array:
        """Entropy [N] of the action distributions, in nats."""
        return self.distribution.entropy(parameters, self.network.outputs(parameters, encoded))

    def encode(self, seen: Shaped[np.ndarray, "N ..."]) -> np.ndarray:
        """What is seen, normalised, as the network reads it; in numpy, and the same for every parameter."""
        return self.network.encode(normalised(self.buffers, seen) if self._normalises else seen)

    # --- memory ---

    def windows(
        self,
        observations: Shaped[np.ndarray, "B ..."],
        offsets: Int[np.ndarray, "K1"],
        rows: Int[np.ndarray, "N"] | None = None,
    ) -> Shaped[np.ndarray, "N ..."]:
        """What is seen in rows of K episodes laid out flat.

        Args:
            observations: Rows in episode order.
            offsets: Row at which each episode begins, and B at the end.
            rows: Which rows; None is each of them.

        Returns:
            The observations themselves, or windows [N, k, …] of a policy with memory, in which places before the
            beginning of an episode are marked: NaN in a box, one below the smallest value in other spaces.
        """
        if self.memory == 1:
            return observations if rows is None else observations[rows]
        return windows_of_rows(self.observation_space, observations, offsets, self.memory, rows)

    def begin_windows(self, observations: Shaped[np.ndarray, "N ..."]) -> Shaped[np.ndarray, "N ..."]:
        """What is seen at the beginning of episodes: the first observation, nothing before it."""
        return observations if self.memory == 1 else first_windows(self.observation_space, observations, self.memory)

    def next_windows(
        self, seen: Shaped[np.ndarray, "N ..."], observations: Shaped[np.ndarray, "N ..."]
    ) -> Shaped[np.ndarray, "N ..."]:
        """What is seen one step later, in an array of its own."""
        return observations if self.memory == 1 else shifted_windows(seen, observations)

    # --- what moves between updates ---

    def observe(self, observations: Shaped[np.ndarray, "B ..."]) -> None:
        """Takes observations into the figures that normalise; between updates, never within a batch.

        Without a normaliser nothing happens.

        Args:
            observations: As the environment gave them, not windows; at least one.
        """
        if self._normalises:
            self.buffers |= merged(self.buffers, observations)

    def mixed_with_uniform(self, epsilon: float) -> "Policy":
        """The policy that draws uniformly with probability epsilon, in each component of an action, else as this one.

        It has the same arrays, not copies: when this policy learns, so does the mixture. Its log-probabilities are
        those of the mixture, so no ratio to it is larger than 1 / (1 - epsilon) in a step of a single component.

        Raises:
            SpecError: if the action space is a box.
        """
        header = self.header().model_copy(update={"uniform_share": epsilon})
        return Policy(header, self.parameters, self.features, self.buffers)

    # --- acting ---

    def rows_at_once(self, numbers: int) -> int:
        """For how many rows a forward pass makes so many numbers; 1 at least."""
        return max(1, numbers // self.network.numbers)

    def outputs(self, seen: Shaped[np.ndarray, "N ..."]) -> Float[np.ndarray, "N width"]:
        """Outputs of the network; a row's bits do not depend on its neighbours.

        Large networks take few rows at a time, so that memory does not grow with N beyond what is seen and answered.
        """
        if len(seen) > self._piece:
            parts = [self.outputs(seen[n : n + self._piece]) for n in range(0, len(seen), self._piece)]
            return np.concatenate(parts)
        encoded = blocks(self.encode(seen))
        with np.errstate(over="ignore", invalid="ignore"):  # whoever asks checks that the outputs are finite
            outputs: np.ndarray = self.network.outputs(self.parameters, encoded)
        return outputs.reshape(-1, self.distribution.width)[: len(seen)]

    def outputs_along(
        self, observations: Shaped[np.ndarray, "B ..."], offsets: Int[np.ndarray, "K1"]
    ) -> Float[np.ndarray, "B width"]:
        """Outputs for each row of K episodes laid out flat: `outputs` of its `windows`, which are not kept."""
        rows, piece = np.arange(len(observations)), self._piece
        if self.memory == 1 or len(rows) <= piece:
            return self.outputs(self.windows(observations, offsets))
        pieces = np.split(rows, range(piece, len(rows), piece))
        return np.concatenate([self.outputs(self.windows(observations, offsets, part)) for part in pieces])

    def parse(self, value: Any, *, batch: bool) -> Shaped[np.ndarray, "N ..."]:
        """What is seen, from JSON values.

        Args:
            value: One observation; of a policy with memory one history, a list of up to k observations of one episode,
                oldest first. Or a list of these.
            batch: Which of the two.

        Returns:
            [N, …], or [N, k, …] of a policy with memory.

        Raises:
            ObservationError: with a pointer from the root of the value.
        """
        if not batch:
            try:
                return self._parse([value])
            except ObservationError as error:
                raise ObservationError(error.pointer.removeprefix("/0"), error.code, error.message) from None
        if not isinstance(value, list) or not value:
            raise ObservationError("", "observation_shape", "expected a list with at least one observation")
        return self._parse(value)

    def _parse(self, values: list[Any]) -> Shaped[np.ndarray, "N ..."]:
        if self.memory == 1:
            return parse_observations(self.observation_space, values)
        histories = []
        for row, history in enumerate(values):
            if not isinstance(history, list) or not 1 <= len(history) <= self.memory:
                message = f"expected a history: a list of 1 to {self.memory} observations, oldest first"
                raise ObservationError(f"/{row}", "observation_shape", message)
            try:
                histories.append(parse_observations(self.observation_space, history))
            except ObservationError as error:
                raise ObservationError(f"/{row}{error.pointer}", error.code, error.message) from None
        first = histories[0]
        seen = np.empty((len(histories), self.memory, *first.shape[1:]), dtype=first.dtype)
        seen[:] = mark(self.observation_space)
        for window, history in zip(seen, histories, strict=True):
            window[-len(history) :] = history
        return seen

    def act(self, observation: Any, *, deterministic: bool = False, seed: int | None = None) -> Any:
        """What `env.step` takes: an action for an observation, or several for several.

            action = policy.act(observation)

        Args:
            observation: As an environment or JSON gives it: a number, a list or an array; of a policy with memory a
                history, the last observations of the episode, oldest first, up to k of them. Or several of these: a
                list, or an array with one axis more.
            deterministic: The most probable action instead of a draw.
            seed: Makes the draw repeatable: the same seed and observation give the same action. An integer from 0 to
                2^53 - 1; None draws anew.

        Returns:
            For one observation an int of a discrete space, else an array in the number type of the action space; for
            several an array with one axis more. `answer` gives their probabilities, too.

        Raises:
            ObservationError: which says where and what was expected.
            ValueError: if the seed is none.
        """
        if seed is not None and not (isinstance(seed, Integral) and 0 <= seed <= LARGEST_INTEGER):
            raise ValueError(f"seed: expected an integer from 0 to {LARGEST_INTEGER}, or None")
        value = _plain(observation)
        depth = len(array_shape(self.observation_space)) + (self.memory > 1)
        several = _depth(value) > depth
        actions = self.answer(self.parse(value, batch=several), seed=seed, deterministic=deterministic).actions
        if several:
            return actions
        return int(actions[0]) if actions.ndim == 1 else actions[0]

    def answer(
        self, seen: Shaped[np.ndarray, "N ..."], *, seed: int | None = None, deterministic: bool = False
    ) -> Acted:
        """Actions for what is seen, with raw draws, log-probabilities and distributions.

        Args:
            seen: As `parse` gives it.
            seed: Makes the draws repeatable; row i draws the same alone at position i and in any longer batch. None
                draws from a generator that the operating system has seeded.
            deterministic: The most probable action instead of a draw.

        Raises:
            ObservationError: with the row whose numbers are so large that the outputs overflow.
        """
        d = self.distribution
        outputs = self.outputs(seen)
        if not np.isfinite(outputs).all():
            row = int(np.flatnonzero(~np.isfinite(outputs).all(axis=1))[0])
            raise ObservationError(
                f"/{row}", "observation_too_large", "the policy's outputs overflow for these numbers"
            )
        noise = None if deterministic else _acting_noise(seed, len(seen), d.noise_kind, d.noise_width)
        if isinstance(d, Softmax):
            # one table gives all: at one row, operations cost more than numbers
            table = d.log_probabilities(outputs)
            probabilities = np.exp(table)
            samples = d.mode(outputs) if noise is None else d.draw(probabilities, noise)
            log_probs = table[np.arange(len(table)), samples]
            return Acted(d.action(samples), samples, log_probs, probabilities, None, None)
        samples = d.mode(outputs) if noise is None else d.sample(self.parameters, outputs, noise)
        with np.errstate(all="ignore"):  # a deviation beyond all numbers is said as it is
            log_probs = d.log_prob(self.parameters, outputs, samples)
            if isinstance(d, DiagonalGaussian):
                sigma = np.exp(d.log_sigma(self.parameters, outputs))
                return Acted(d.action(samples), samples, log_probs, None, d.mean(outputs), sigma)
        probabilities = _probabilities(d, outputs)
        return Acted(d.action(samples), samples, log_probs, probabilities, None, None)

    # --- keeping ---

    def header(self) -> PolicyHeader:
        """What stands beside the arrays in a checkpoint."""
        in_arrays: dict[str, Any] = {"initial_parameters": None}
        if isinstance(self.spec, LinearPolicySpec | ScorePolicySpec) and isinstance(
            self.spec.features, TableFeaturesSpec
        ):
            in_arrays["features"] = TableFeaturesSpec()
        return PolicyHeader(
            policy=self.spec.model_copy(update=in_arrays),
            observation_space=self.observation_space,
            action_space=self.action_space,
            updates=self.updates,
            uniform_share=self.uniform_share,
        )

    def to_bytes(self) -> bytes:
        """The whole policy as safetensors with a JSON header; `pgengine.load` reads it."""
        seen = probes(self.observation_space, self.memory)
        tensors = {f"parameters.{name}": array for name, array in self.parameters.items()}
        tensors |= {f"buffers.{name}": array for name, array in self.buffers.items()}
        tensors["probe.outputs"] = self.outputs(seen)
        if self.features is not None:
            tensors["features"] = self.features
        return safetensors.numpy.save(tensors, {"pgengine": self.header().model_dump_json()})

    def copy(self, parameters: dict[str, np.ndarray] | None = None, updates: int | None = None) -> "Policy":
        """The same policy with arrays of its own."""
        arrays = {name: array.copy() for name, array in (parameters or self.parameters).items()}
        buffers = {name: array.copy() for name, array in self.buffers.items()}
        header = self.header().model_copy(update={"updates": self.updates if updates is None else updates})
        return Policy(header, arrays, self.features, buffers)

    def fits(self, facts: EnvironmentFacts) -> None:
        """Checks that the policy can act in an environment.

        Raises:
            SpecError: if a space differs.
        """
        for what, own, other in (
            ("observation", self.observation_space, facts.observation_space),
            ("action", self.action_space, facts.action_space),
        ):
            if own != other:
                raise SpecError(
                    "", "policy_does_not_fit", f"the {what} space of the policy is not that of the environment"
                )


def _plain(value: Any) -> Any:
    """An observation as JSON would give it: arrays, tensors, tuples and numbers of numpy as lists and plain numbers."""
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return np.asarray(value).tolist() if hasattr(value, "__array__") else value


def _depth(value: Any) -> int:
    """How many lists lie inside one another, along the first of each."""
    depth = 0
    while isinstance(value, list):
        depth, value = depth + 1, value[0] if value else None
    return depth


def _probabilities(d: MultiSoftmax | Bernoulli, outputs: np.ndarray) -> np.ndarray | list[np.ndarray]:
    """Of the values of each component, or of a 1 in each."""
    if isinstance(d, MultiSoftmax):
        return [np.exp(table) for table in d.log_probabilities(outputs)]
    one: np.ndarray = np.exp(d.log_probabilities(outputs)[1])
    return one


_fresh = np.random.default_rng()
"""Seeded by the operating system, for draws that nobody wants to repeat; an address for each would take longer."""


def _acting_noise(seed: int | None, N: int, kind: str, width: int | None) -> np.ndarray:
    if seed is None:
        shape = N if width is None else (N, width)
        return _fresh.random(shape) if kind == "uniform" else _fresh.standard_normal(shape)
    noise = Noise(seed, "acting", 0)
    if kind == "normal":
        return noise.normal("action", 0, N, width or 1)[:, 0]
    if width is None:
        return noise.uniform("action", 0, N)[:, 0]
    return noise.uniforms("action", 0, N, width)[:, 0]


def create_policy(
    policy: PolicySpec,
    environment: EnvironmentSpec,
    facts: EnvironmentFacts,
    *,
    seed: int,
    max_parameters: int = MAX_PARAMETERS,
) -> Policy:
    """A policy at update 0.

    Args:
        policy: Network and distribution.
        environment: What it will act in; a finite MDP may bring features.
        facts: What is known of the environment.
        seed: Initial parameters are drawn from it.
        max_parameters: A larger policy is refused before anything is drawn.

    Raises:
        SpecError: with a pointer from the root of the policy's spec.
    """
    policy = resolve_policy(policy, facts, environment)
    header = PolicyHeader(
        policy=policy, observation_space=facts.observation_space, action_space=facts.action_space, updates=0
    )
    made = Policy(header, {}, _feature_table(policy, environment, facts))
    if made.size > max_parameters:
        raise SpecError("", "policy_too_large", f"expected at most {max_parameters} parameters, these are {made.size}")
    made.parameters = made.network.initial(Noise(seed, "training", 0)) | made.distribution.initial()
    for name, values in (policy.initial_parameters or {}).items():
        made.parameters[name] = _given(name, values, made.parameters)
    return made


def _feature_table(policy: PolicySpec, environment: EnvironmentSpec, facts: EnvironmentFacts) -> np.ndarray | None:
    """The table that a policy reads: its own, or the one that a finite MDP brings."""
    if not isinstance(policy, LinearPolicySpec | ScorePolicySpec) or not isinstance(policy.features, TableFeaturesSpec):
        return None
    if policy.features.values is not None:
        return read_feature_table(policy.features.values, facts.observation_space, facts.action_space)
    features = TabularMDP(environment).features if isinstance(environment, TabularSpec) else None
    return None if features is None else features.astype(np.float32)


def _given(name: str, values: Any, parameters: dict[str, np.ndarray]) -> np.ndarray:
    pointer = f"/initial_parameters/{name}"
    if name not in parameters:
        raise SpecError(pointer, "unknown_parameter", f"expected one of {', '.join(sorted(parameters))}")
    shape = parameters[name].shape
    try:
        flat = BoxSpace(shape=list(shape), low=[None], high=[None], dtype="float32")
        values_array: np.ndarray = parse_observations(flat, [values])[0]
        return values_array
    except ObservationError as error:
        raise SpecError(pointer + error.pointer.removeprefix("/0"), "parameter_value", error.message) from None
