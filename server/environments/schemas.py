"""Bodies about environments."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Discriminator, RootModel, Tag
from pydantic_core import PydanticCustomError

from pgengine.intervals import ReturnRange
from pgengine.notices import Notice
from pgengine.spaces import SpaceSpec
from pgengine.spec import EnvironmentSpec
from server.ids import EnvironmentId
from server.request import Answer

__all__ = [
    "BANDIT",
    "CARTPOLE",
    "FROZEN_LAKE",
    "LQR",
    "Environment",
    "EnvironmentBody",
    "EnvironmentCreate",
    "EnvironmentReference",
    "EnvironmentSummary",
    "EnvironmentType",
    "id_or_inline",
]

CARTPOLE = {"kind": "gymnasium", "id": "CartPole-v1"}
BANDIT = {
    "kind": "tabular",
    "transitions": [[[0.0, 1.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]],
    "rewards": [[0.0, 1.0], [0.0, 0.0]],
    "initial": [1.0, 0.0],
    "terminal": [1],
    "horizon": 1,
}
"""A bandit with two arms, as an example of a finite MDP."""

FROZEN_LAKE = {"kind": "gymnasium", "id": "FrozenLake-v1", "arguments": {"is_slippery": True}}
"""A registered id that publishes its table, so that its gradient is known exactly."""
LQR = {
    "kind": "lqr",
    "dynamics": [[1.0, 0.1], [0.0, 1.0]],
    "control": [[0.0], [0.1]],
    "state_cost": [[1.0, 0.0], [0.0, 0.1]],
    "action_cost": [[0.01]],
    "noise_deviation": [0.0, 0.05],
    "horizon": 50,
}
"""A mass that is pushed to the middle, as an example of a linear system with quadratic costs."""


def id_or_inline(value: Any) -> str | None:
    """Tells an id from an object that describes a new one."""
    if isinstance(value, str):
        return "id"
    return "inline" if isinstance(value, dict | BaseModel) else None


def _without_module(value: Any) -> Any:
    if isinstance(value, dict) and isinstance(value.get("id"), str) and ":" in value["id"]:
        raise PydanticCustomError(
            "module_in_id", "Expected an id without a colon: what stands before it would be imported.", {"field": "id"}
        )
    return value


EnvironmentBody = Annotated[EnvironmentSpec, BeforeValidator(_without_module)]
"""An environment described in a request."""


class EnvironmentCreate(RootModel[EnvironmentBody]):
    """An environment to create."""


EnvironmentReference = Annotated[
    Annotated[EnvironmentId, Tag("id")] | Annotated[EnvironmentBody, Tag("inline")],
    Discriminator(
        id_or_inline,
        custom_error_type="id_or_object",
        custom_error_message="Expected an id (env_…) or an object with a kind.",
    ),
]
"""An environment that exists, by its id, or one described here; identical ones are one object."""


class EnvironmentSummary(Answer):
    """An environment in a list: without arrays."""

    object: Literal["environment"] = "environment"
    """Always `environment`."""
    id: EnvironmentId
    """Its id."""
    kind: Literal["gymnasium", "tabular", "lqr"]
    """Which kind of environment it is."""
    gymnasium_id: str | None
    """The registered id, null for other kinds."""
    max_episode_steps: int
    """Episode limit in environment steps, part of the objective."""
    created_at: datetime
    """When it was created."""


class Environment(Answer):
    """What policies learn in."""

    object: Literal["environment"] = "environment"
    """Always `environment`."""
    id: EnvironmentId
    """Its id."""
    spec: EnvironmentSpec
    """What it was made from."""
    observation_space: SpaceSpec
    """What an observation looks like."""
    action_space: SpaceSpec
    """What an action looks like."""
    observation_schema: dict[str, Any]
    """JSON Schema of one observation."""
    action_schema: dict[str, Any]
    """JSON Schema of one action."""
    max_episode_steps: int
    """Episode limit in environment steps, part of the objective."""
    limit_from: Literal["id", "declared", "horizon", "none"]
    """Who set the limit: the registered id, the request, the horizon of a finite MDP or a linear system, or nobody:
    `max_episode_steps` is then the most that is ever played."""
    episode_length: Literal["fixed", "varying"]
    """Whether all episodes are known to take the same number of steps."""
    reward_threshold: float | None
    """Mean return at which the registered id counts as solved; the default of `stop.target_return`."""
    return_range: ReturnRange | None
    """Between which numbers every return lies, whoever acts, so that intervals and targets can be proven; null where
    this is not known, and for environments that were stored by earlier versions."""
    exact: Literal["finite_mdp", "lqr"] | None
    """What its exact gradient is known by, so that estimators can be checked against it; null if it is not."""
    state_names: list[str] | None
    """What people call the observations of a finite MDP."""
    action_names: list[str] | None
    """What people call the actions."""
    repeatable: bool
    """False if the same seeds and actions were seen to give different episodes; runs then cannot be repeated."""
    notices: list[Notice]
    """What else is worth knowing of it."""
    created_at: datetime
    """When it was created."""


class EnvironmentType(Answer):
    """A kind of environment that may be used here."""

    object: Literal["environment_type"] = "environment_type"
    """Always `environment_type`."""
    kind: Literal["gymnasium", "tabular", "lqr"]
    """The `kind` to send."""
    id: str | None
    """The registered `id` to send, null for other kinds."""
    available: bool
    """Whether it can be made here."""
    hint: str | None
    """Why it cannot be made here and what to do, such as what to install; null if it can."""
    observation_space: SpaceSpec | None
    """What an observation looks like; null where the request decides it, or it cannot be made."""
    action_space: SpaceSpec | None
    """What an action looks like; null where the request decides it, or it cannot be made."""
    max_episode_steps: int | None
    """Episode limit of the id; null where the request has to give one."""
    reward_threshold: float | None
    """Mean return at which the id counts as solved."""
    arguments: dict[str, Any]
    """JSON Schema: of `arguments` for a registered id, of the whole object for other kinds."""
