"""Bodies about checkpoints."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from server.ids import CheckpointId, JobId, PolicyId
from server.request import Answer

__all__ = ["Checkpoint", "Evaluation"]


class Evaluation(Answer):
    """What fresh episodes say of a policy as it is."""

    mean_return: float | None
    """Mean return of the stochastic policy; null if it is not finite."""
    confidence_interval: Annotated[list[float | None], Field(min_length=2, max_length=2)]
    """Lower and upper end of its 95% confidence interval."""
    episodes: int
    """How many fresh episodes were played."""
    deterministic_mean_return: float | None = None
    """Mean return of the policy that always takes its most probable action; null where that was not played."""
    deterministic_episodes: int = 0
    """How many fresh episodes were played so."""
    mean_length: float | None = None
    """Mean length of the episodes in environment steps."""


class Checkpoint(Answer):
    """A policy as it was after so many updates."""

    object: Literal["checkpoint"] = "checkpoint"
    """Always `checkpoint`."""
    id: CheckpointId
    """Its id."""
    policy_id: PolicyId
    """The policy it belongs to."""
    job_id: JobId | None
    """The training job that made it; null for a policy as it was created, and once the job is deleted."""
    updates: int
    """Updates that the policy had had."""
    size: int
    """Bytes of its content."""
    sha256: str
    """SHA-256 of its content in hexadecimal."""
    evaluation: Evaluation | None
    """What fresh episodes said of it, if it was evaluated."""
    created_at: datetime
    """When it was made."""
