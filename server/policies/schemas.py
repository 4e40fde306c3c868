"""Bodies about policies."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from pgengine.notices import Notice
from pgengine.spaces import SpaceSpec
from pgengine.spec import MlpPolicySpec, PolicySpec, Seed
from server.environments.schemas import EnvironmentReference, id_or_inline
from server.ids import CheckpointId, EnvironmentId, PolicyId
from server.request import Answer, Body, Metadata, Name

__all__ = ["CheckpointParameters", "Policy", "PolicyCreate", "PolicyReference", "PolicySummary"]

PolicyReference = Annotated[
    Annotated[PolicyId, Tag("id")] | Annotated[PolicySpec, Tag("inline")],
    Discriminator(
        id_or_inline,
        custom_error_type="id_or_object",
        custom_error_message="Expected an id (pol_…) or an object with a kind.",
    ),
]
"""A policy that exists, by its id, or one described here."""


class PolicyCreate(Body):
    """A policy to create."""

    environment: EnvironmentReference
    """What it will act in: an id, or a description."""
    policy: PolicySpec = Field(default_factory=MlpPolicySpec)
    """Network and distribution. Left out: a network with two hidden layers."""
    seed: Seed | None = None
    """Initial parameters are drawn from it. Left out: drawn, and returned."""
    name: Name | None = None
    """What people call it."""
    metadata: Metadata = Field(default_factory=dict)
    """What clients note on it."""


class PolicySummary(Answer):
    """A policy in a list: without arrays."""

    object: Literal["policy"] = "policy"
    """Always `policy`."""
    id: PolicyId
    """Its id."""
    name: str | None
    """What people call it."""
    metadata: dict[str, str]
    """What clients note on it."""
    environment_id: EnvironmentId
    """The environment that it was made for."""
    kind: Literal["linear", "mlp", "score", "transformer"]
    """Which network it is."""
    seed: int
    """Initial parameters were drawn from it."""
    updates: int
    """Updates that it has had."""
    checkpoint_id: CheckpointId
    """Its latest checkpoint."""
    created_at: datetime
    """When it was created."""


class Policy(PolicySummary):
    """What is trained and asked for actions."""

    spec: PolicySpec
    """Network and distribution, all defaults written out."""
    best_checkpoint_id: CheckpointId | None
    """The checkpoint whose selection has the highest mean return, of equals the newest; null if none was looked at.
    What it is worth is its evaluation, made on other episodes at the end of the job."""
    observation_space: SpaceSpec
    """What it reads."""
    action_space: SpaceSpec
    """What it does."""
    observation_schema: dict[str, Any]
    """JSON Schema of one observation."""
    action_schema: dict[str, Any]
    """JSON Schema of one action."""
    memory: int
    """How many observations it reads; above 1 it is asked with `history`, the newest observation last."""
    notices: list[Notice]
    """What is worth knowing of it in its environment."""


class CheckpointParameters(Answer):
    """The numbers that a policy is made of."""

    object: Literal["checkpoint_parameters"] = "checkpoint_parameters"
    """Always `checkpoint_parameters`."""
    checkpoint_id: CheckpointId
    """The checkpoint."""
    policy_id: PolicyId
    """The policy that it belongs to."""
    updates: int
    """Updates that the policy had had."""
    parameters: dict[str, Any]
    """Parameters by name, nested lists of numbers, as `initial_parameters` takes them."""
    buffers: dict[str, Any]
    """Figures of the observation normaliser by name, nested lists of numbers; empty without one. They cannot be given
    to a new policy."""
