"""A policy: spec, spaces and arrays; acts with numpy alone, and is kept as safetensors with a JSON header.

    policy = pgengine.load(data)
    policy.act(policy.parse([0.0, 0.1, 0.0, -0.1], batch=False)).actions

This file knows how a policy is made, kept, checked and asked. It imports no torch: training binds the same pure
functions to torch tensors.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Float, Shaped
from pydantic import Field, ValidationError

from pgengine.distributions import Array, Softmax, open_distribution
from pgengine.environments import EnvironmentFacts
from pgengine.environments.tabular import TabularMDP
from pgengine.errors import CheckpointError, ObservationError, SpecError
from pgengine.noise import Noise
from pgengine.policies.networks import MAX_PARAMETERS, blocks, open_network
from pgengine.resolution import resolve_policy
from pgengine.spaces import BoxSpace, DiscreteSpace, SpaceSpec, parse_observations
from pgengine.spec import (
    LARGEST_INTEGER,
    EnvironmentSpec,
    LinearPolicySpec,
    MlpPolicySpec,
    PolicySpec,
    Spec,
    TabularSpec,
)

__all__ = ["Acted", "Policy", "create_policy", "load"]

PROBES = 8  # observations whose outputs are kept beside the weights and checked at load
PROBE_TOLERANCE = 1e-4  # between machines; on the same machine they agree to the bit


@dataclass(slots=True)
class Acted:
    """What a policy did with N observations.

    Attributes:
        actions: [N, …] for the environment.
        samples: [N, …] raw draws, which the log-probabilities belong to.
        log_probs: [N] in nats.
        probabilities: [N, A] of a softmax, else None.
        mean: [N, D] of a Gaussian, else None.
        sigma: [D] of a Gaussian, else None.
    """

    actions: Shaped[np.ndarray, "N ..."]
    samples: Shaped[np.ndarray, "N ..."]
    log_probs: Float[np.ndarray, "N"]
    probabilities: Float[np.ndarray, "N A"] | None
    mean: Float[np.ndarray, "N D"] | None
    sigma: Float[np.ndarray, "D"] | None


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


class Policy:
    """A pure function of (parameters, observation), with its parameters.

    Attributes:
        spec: Network and distribution, all defaults written out.
        observation_space: What it reads.
        action_space: What it does.
        updates: Updates that it has had.
        parameters: Arrays by name, float32.
        features: [S, A, J] features of state and action that a linear policy reads, or None.
    """

    def __init__(self, header: PolicyHeader, parameters: dict[str, np.ndarray], features: np.ndarray | None) -> None:
        """Binds parameters to the functions that a header names.

        Raises:
            SpecError: if the header's parts do not fit one another.
        """
        if header.policy.distribution is None:
            raise SpecError("/distribution", "missing", "a policy is kept with its distribution")
        self.spec = header.policy
        self.observation_space: DiscreteSpace | BoxSpace = header.observation_space
        self.action_space: DiscreteSpace | BoxSpace = header.action_space
        self.updates = header.updates
        self.parameters = parameters
        self.features = features
        self.distribution = open_distribution(header.policy.distribution, header.action_space)
        self.network = open_network(header.policy, header.observation_space, self.distribution.width, features)

    @property
    def size(self) -> int:
        """How many numbers its parameters are, whether they exist yet or not."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of its parameters by name."""
        return self.network.shapes() | {name: array.shape for name, array in self.distribution.initial().items()}

    # --- the pure functions, in numpy or torch ---

    def log_prob(self, parameters: dict[str, Array], encoded: Array, samples: Array) -> Array:
        """Log-probabilities [N] of raw samples, differentiable in torch."""
        return self.distribution.log_prob(parameters, self.network.outputs(parameters, encoded), samples)

    def entropy(self, parameters: dict[str, Array], encoded: Array) -> Array:
        """Entropy [N] of the action distributions, in nats."""
        return self.distribution.entropy(parameters, self.network.outputs(parameters, encoded))

    # --- acting ---

    def outputs(self, observations: Shaped[np.ndarray, "N ..."]) -> Float[np.ndarray, "N width"]:
        """Outputs of the network; a row's bits do not depend on its neighbours."""
        encoded = blocks(self.network.encode(observations))
        with np.errstate(over="ignore", invalid="ignore"):  # whoever asks checks that the outputs are finite
            outputs: np.ndarray = self.network.outputs(self.parameters, encoded)
        return outputs.reshape(-1, self.distribution.width)[: len(observations)]

    def parse(self, value: Any, *, batch: bool) -> Shaped[np.ndarray, "N ..."]:
        """Observations from JSON values.

        Args:
            value: One observation, or a list of them.
            batch: Which of the two.

        Raises:
            ObservationError: with a pointer from the root of the value.
        """
        if not batch:
            try:
                return parse_observations(self.observation_space, [value])
            except ObservationError as error:
                raise ObservationError(error.pointer.removeprefix("/0"), error.code, error.message) from None
        if not isinstance(value, list) or not value:
            raise ObservationError("", "observation_shape", "expected a list with at least one observation")
        return parse_observations(self.observation_space, value)

    def act(
        self, observations: Shaped[np.ndarray, "N ..."], *, seed: int | None = None, deterministic: bool = False
    ) -> Acted:
        """Actions for observations.

        Args:
            observations: As `parse` gives them.
            seed: Makes the draws repeatable; row i draws the same alone at position i and in any longer batch. None
                draws from a generator that the operating system has seeded.
            deterministic: The most probable action instead of a draw.

        Raises:
            ObservationError: with the row whose numbers are so large that the outputs overflow.
        """
        d = self.distribution
        outputs = self.outputs(observations)
        if not np.isfinite(outputs).all():
            row = int(np.flatnonzero(~np.isfinite(outputs).all(axis=1))[0])
            raise ObservationError(
                f"/{row}", "observation_too_large", "the policy's outputs overflow for these numbers"
            )
        noise = None if deterministic else _acting_noise(seed, len(observations), d.noise_width)
        if isinstance(d, Softmax):
            # one table gives all: at one row, operations cost more than numbers
            table = d.log_probabilities(outputs)
            probabilities = np.exp(table)
            samples = d.mode(outputs) if noise is None else d.draw(probabilities, noise)
            log_probs = table[np.arange(len(table)), samples]
            return Acted(d.action(samples), samples, log_probs, probabilities, None, None)
        samples = d.mode(outputs) if noise is None else d.sample(self.parameters, outputs, noise)
        log_probs = d.log_prob(self.parameters, outputs, samples)
        sigma = np.exp(d.log_sigma(self.parameters, outputs))
        return Acted(d.action(samples), samples, log_probs, None, outputs, sigma)

    # --- keeping ---

    def header(self) -> PolicyHeader:
        """What stands beside the arrays in a checkpoint."""
        return PolicyHeader(
            policy=self.spec.model_copy(update={"initial_parameters": None}),  # they are in the arrays
            observation_space=self.observation_space,
            action_space=self.action_space,
            updates=self.updates,
        )

    def to_bytes(self) -> bytes:
        """The whole policy as safetensors with a JSON header; `pgengine.load` reads it."""
        probes = _probes(self)
        tensors = {f"parameters.{name}": array for name, array in self.parameters.items()}
        tensors["probe.outputs"] = self.outputs(probes)
        if self.features is not None:
            tensors["features"] = self.features
        return safetensors.numpy.save(tensors, {"pgengine": self.header().model_dump_json()})

    def copy(self, parameters: dict[str, np.ndarray] | None = None, updates: int | None = None) -> "Policy":
        """The same policy with arrays of its own."""
        arrays = {name: array.copy() for name, array in (parameters or self.parameters).items()}
        header = self.header().model_copy(update={"updates": self.updates if updates is None else updates})
        return Policy(header, arrays, self.features)

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


_fresh = np.random.default_rng()
"""Seeded by the operating system, for draws that nobody wants to repeat; an address for each would take longer."""


def _acting_noise(seed: int | None, N: int, width: int | None) -> np.ndarray:
    if seed is None:
        return _fresh.random(N) if width is None else _fresh.standard_normal((N, width))
    noise = Noise(seed, "acting", 0)
    if width is None:
        return noise.uniform("action", 0, N)[:, 0]
    return noise.normal("action", 0, N, width)[:, 0]


def _probes(policy: Policy) -> np.ndarray:
    space = policy.observation_space
    if isinstance(space, DiscreteSpace):
        return space.start + np.arange(PROBES) % space.n
    flat: np.ndarray = Noise(0, "acting", 0).matrix("probe", 0, (PROBES, space.size))
    return flat.astype(np.float32).reshape(PROBES, *space.shape)


def create_policy(
    policy: LinearPolicySpec | MlpPolicySpec,
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
    policy = resolve_policy(policy, facts)
    header = PolicyHeader(
        policy=policy, observation_space=facts.observation_space, action_space=facts.action_space, updates=0
    )
    features = None
    if isinstance(policy, LinearPolicySpec) and isinstance(environment, TabularSpec):
        features = TabularMDP(environment).features
    made = Policy(header, {}, None if features is None else features.astype(np.float32))
    if made.size > max_parameters:
        raise SpecError("", "policy_too_large", f"expected at most {max_parameters} parameters, these are {made.size}")
    made.parameters = made.network.initial(Noise(seed, "training", 0)) | made.distribution.initial()
    for name, values in (policy.initial_parameters or {}).items():
        made.parameters[name] = _given(name, values, made.parameters)
    return made


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


def load(data: bytes) -> Policy:
    """The policy that `Policy.to_bytes` kept; reads no code and no pickle.

    Raises:
        CheckpointError: if the bytes are not a policy, are damaged, or give other outputs on this machine than
            where they were made.
    """
    try:
        tensors = safetensors.numpy.load(data)
        header = PolicyHeader.model_validate_json(_metadata(data)["pgengine"])
        if header.format != "pgengine-policy" or header.version != 1:
            raise CheckpointError(f"expected a policy of version 1, found {header.format} {header.version}")
        parameters = {
            name.removeprefix("parameters."): array for name, array in tensors.items() if name.startswith("parameters.")
        }
        policy = Policy(header, parameters, tensors.get("features"))
        _check_shapes(policy)
        outputs = policy.outputs(_probes(policy))
        expected = tensors["probe.outputs"]
        agree = expected.shape == outputs.shape and np.allclose(
            outputs, expected, rtol=PROBE_TOLERANCE, atol=PROBE_TOLERANCE
        )
    except _DAMAGE as error:
        raise CheckpointError(f"these bytes are not a policy: {type(error).__name__}") from error
    if not agree:
        raise CheckpointError("the policy gives other outputs here than where it was made; it is damaged")
    return policy


_DAMAGE = (
    safetensors.SafetensorError,
    ValidationError,
    SpecError,
    LookupError,
    ValueError,
    TypeError,
    ArithmeticError,
    MemoryError,
)
"""What damaged or hostile bytes can make the readers raise."""


def _check_shapes(policy: Policy) -> None:
    """Compares before anything is computed: a small file can claim a large network."""
    if policy.features is not None:
        spaces = (policy.observation_space, policy.action_space)
        if policy.features.shape[:2] != tuple(getattr(space, "n", None) for space in spaces):
            raise CheckpointError("the features of the checkpoint do not belong to its spaces")
    shapes = {name: array.shape for name, array in policy.parameters.items()}
    if shapes != policy.shapes() or any(array.dtype != np.float32 for array in policy.parameters.values()):
        raise CheckpointError("the parameters of the checkpoint do not belong to its network")


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file: eight bytes of length, then JSON, as its format says."""
    length = int.from_bytes(data[:8], "little")
    metadata: dict[str, str] = json.loads(data[8 : 8 + length])["__metadata__"]
    return metadata
