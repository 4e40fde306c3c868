"""Bodies about checkpoints."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from pgengine.exactness import ExactAbsence
from pgengine.intervals import Method
from server.ids import CheckpointId, JobId, PolicyId
from server.request import Answer

__all__ = ["Checkpoint", "Evaluation", "Selection"]


class Evaluation(Answer):
    """What fresh episodes say of a policy as it is. Nothing was selected by them."""

    mean_return: float | None
    """Mean return of the stochastic policy; null if it is not finite."""
    confidence_interval: Annotated[list[float | None], Field(min_length=2, max_length=2)]
    """Lower and upper end of its 95% confidence interval; null where nothing can be said."""
    method: Method = "t"
    """How the interval was made. `clopper_pearson` (two possible returns) and `betting` (returns in a known range) hold
    the mean in at least 95% of all samples, whatever is rare. `t` does so only approximately: less often where what is
    rare or skewed was not seen. `exact`: all returns are known to be the same."""
    exact_mean_return: float | None = None
    """The mean return itself, computed from the model without sampling; null where it is not known."""
    exact_absent: ExactAbsence | None = None
    """Why it is not known; null if it is, and in evaluations by earlier versions."""
    episodes: int
    """How many fresh episodes were played."""
    deterministic_mean_return: float | None = None
    """Mean return of the policy that always takes its most probable action; null where that was not played."""
    deterministic_episodes: int = 0
    """How many fresh episodes were played so."""
    mean_length: float | None = None
    """Mean length of the episodes in environment steps."""


class Selection(Answer):
    """What decided whether the target is reached, and which checkpoint is the best.

    A number that was selected for being high is too high on average; what a policy is worth is its evaluation.
    """

    mean_return: float | None
    """What checkpoints are compared by: the exact mean return where it is known, else that of the episodes below."""
    method: Method = "t"
    """How the lower bound was made: `exact` (the mean is known), `betting` (proven, for returns in a known range), or
    `t` (approximate: nothing is known of the range of returns)."""
    lower_bound: float | None = None
    """The mean return is at least this, but for the error; null in selections by earlier versions."""
    error: float | None = None
    """Probability with which the bound may be too high; approximate where the method is `t`."""
    episodes: int
    """How many fresh episodes were played; 0 where the mean is known."""


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
    selection: Selection | None
    """What it was compared with other checkpoints by, if it was: the highest one is the policy's best."""
    evaluation: Evaluation | None
    """What other fresh episodes said of it, by which nothing was selected: of the final policy of a job, and of the
    policy's best checkpoint at the end of a job. null for others."""
    created_at: datetime
    """When it was made."""
