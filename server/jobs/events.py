"""What events look like, for the description of the API; `history` and `store` write and read them."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from pgengine.checking import GradientCheck
from server.checkpoints.schemas import Evaluation, Selection
from server.ids import CheckpointId, JobId
from server.jobs.schemas import Failure, Progress, Result, Status
from server.pages import Page
from server.request import Answer

__all__ = ["Event", "EventPage"]


class _Event(Answer):
    object: Literal["event"] = "event"
    """Always `event`."""
    job_id: JobId
    """The job."""
    seq: int
    """Number of the event in its job, from 1."""
    attempt: int
    """Attempt in which it happened."""
    created_at: datetime
    """When it happened."""


class StatusData(Answer):
    """The job's new state."""

    status: Status
    """The state."""
    is_terminal: bool
    """Whether the job has ended; no other event follows."""
    attempt: int
    """The job's attempt from now on."""
    reason: str = ""
    """Why; only where that is known."""
    failure: Failure | None = None
    """Why the job failed; only where it did."""
    result: Result | GradientCheck | None = None
    """What it has come to, once it has succeeded; without arrays."""


class StatusEvent(_Event):
    """The job has another state."""

    type: Literal["status"]
    """Always `status`."""
    data: StatusData
    """The state."""


class MeasuredUpdate(Answer):
    """What was measured in one update: metrics by name, null where a value is not finite."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    update: int
    """Updates that the policy had had."""
    nonfinite: list[str]
    """Names of the metrics that are not finite."""
    __pydantic_extra__: dict[str, float | None]


class MetricsData(Answer):
    """A range of updates, and what is recorded of them now."""

    from_update: int
    """First update of the range."""
    to_update: int
    """Last update of the range."""
    metrics: list[MeasuredUpdate]
    """What is recorded; what a long job has thinned out is missing."""


class MetricsEvent(_Event):
    """Updates were measured."""

    type: Literal["metrics"]
    """Always `metrics`."""
    data: MetricsData
    """The updates."""


class CheckpointData(Answer):
    """A checkpoint."""

    checkpoint_id: CheckpointId
    """Its id."""
    updates: int
    """Updates that the policy had had."""
    progress: Progress
    """How far the job was."""


class CheckpointEvent(_Event):
    """A checkpoint was made."""

    type: Literal["checkpoint"]
    """Always `checkpoint`."""
    data: CheckpointData
    """The checkpoint."""


class EvaluationData(Answer):
    """What fresh episodes said of a checkpoint: to decide something, or to be reported."""

    checkpoint_id: CheckpointId
    """The checkpoint."""
    updates: int
    """Updates that the policy had had."""
    purpose: Literal["selection", "report"] | None = None
    """What they were played for: to see whether the target is reached and which checkpoint is the best, or to report
    what the policy is worth. Missing in events of earlier versions."""
    selection: Selection | None = None
    """What was seen, where something was decided by it."""
    evaluation: Evaluation | None = None
    """What was seen, where nothing was."""


class EvaluationEvent(_Event):
    """A checkpoint was evaluated."""

    type: Literal["evaluation"]
    """Always `evaluation`."""
    data: EvaluationData
    """The evaluation."""


class LogData(Answer):
    """Something worth knowing; further fields depend on the code."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    code: str
    """What it is about."""
    message: str
    """The same for people."""
    __pydantic_extra__: dict[str, Any]


class LogEvent(_Event):
    """Something happened that is worth knowing."""

    type: Literal["log"]
    """Always `log`."""
    data: LogData
    """What happened."""


class RewindData(Answer):
    """Where the job goes on."""

    to_update: int
    """Updates that the policy had at the checkpoint from which the job goes on; what was recorded beyond is removed."""


class RewindEvent(_Event):
    """The job goes on from an earlier checkpoint."""

    type: Literal["rewind"]
    """Always `rewind`."""
    data: RewindData
    """The checkpoint."""


Event = Annotated[
    StatusEvent | MetricsEvent | CheckpointEvent | EvaluationEvent | LogEvent | RewindEvent,
    Field(discriminator="type"),
]
"""One entry of a job's stream; `type` says what `data` is."""


class EventPage(Page[Event]):
    """One page of a job's events."""
