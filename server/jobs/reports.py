"""What is said of a job between those who write it down and those who compute it. Plain data: no SQL, no torch.

A worker gets a `Claim`: everything that is needed to go on with the job, and the token that lets it write. It gives
a `Report` of what has happened since the last one, again and again, and an `Outcome` at the end.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "Claim",
    "Evaluated",
    "Failure",
    "FailureCode",
    "JobKind",
    "Measured",
    "Outcome",
    "Progress",
    "Report",
    "Rival",
    "Snapshot",
]

JobKind = Literal["training", "gradient_check"]
FailureCode = Literal["diverged", "environment_error", "out_of_memory", "worker_lost", "timeout", "internal"]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is, counted from its own beginning and not from the policy's.

    Attributes:
        updates: Updates of the optimizer.
        env_steps: Environment steps of training.
        episodes: Complete episodes of training.
        fraction: Part of the nearest limit that is used up, in [0, 1].
    """

    updates: int = 0
    env_steps: int = 0
    episodes: int = 0
    fraction: float = 0.0


@dataclass(frozen=True, slots=True)
class Measured:
    """The metrics of one update; values may be infinite or not a number.

    Attributes:
        update: Number of updates that the policy has had, over all jobs.
        env_steps: Environment steps of the job up to this update.
        values: Metrics by name.
    """

    update: int
    env_steps: int
    values: dict[str, float]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A checkpoint to be kept.

    Attributes:
        updates: Number of updates that the policy has had.
        progress: How far the job was; a resumed attempt counts on from here.
        policy_bytes: The policy, as `pgengine.load` reads it.
        state_bytes: What `pgengine.train` resumes from, to the bit.
        selection: What decided something about this very policy, if it was looked at.
        evaluation: An evaluation of it on episodes that decided nothing, if there was one.
    """

    updates: int
    progress: Progress
    policy_bytes: bytes
    state_bytes: bytes | None = None
    selection: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Rival:
    """The best checkpoint that a policy has: what those of a job are compared with.

    Attributes:
        updates: Number of updates that the policy had had.
        mean_return: What a selection saw of it.
        policy_bytes: The policy, as `pgengine.load` reads it.
        is_evaluated: Whether there is an evaluation of it on episodes that decided nothing.
    """

    updates: int
    mean_return: float
    policy_bytes: bytes = field(repr=False)
    is_evaluated: bool


@dataclass(frozen=True, slots=True)
class Evaluated:
    """An evaluation of a checkpoint that is kept already.

    Attributes:
        updates: Number of updates that the policy had had.
        sha256: Of its bytes, in hexadecimal.
        evaluation: On episodes that decided nothing.
    """

    updates: int
    sha256: str
    evaluation: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Report:
    """What happened since the last report.

    Attributes:
        progress: How far the job is; None if nothing has been done since it was started or resumed.
        metrics: Updates in order, without gaps.
        checkpoint: A checkpoint to be kept.
        fingerprint: Where the job is computed: versions, device, threads.
        evaluated: An earlier checkpoint that turned out to be the best, with its evaluation.
    """

    progress: Progress | None = None
    metrics: tuple[Measured, ...] = ()
    checkpoint: Snapshot | None = None
    fingerprint: dict[str, str | int] | None = None
    evaluated: Evaluated | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a job failed: a closed code, and a message for clients without anything of our insides."""

    code: FailureCode
    message: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended.

    Attributes:
        status: The terminal status.
        report: What had not been reported yet, with the last checkpoint.
        result: Of a job that succeeded.
        failure: Of a job that failed.
    """

    status: Literal["succeeded", "failed", "cancelled"]
    report: Report | None = None
    result: dict[str, Any] | None = None
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """A job that a worker holds.

    Attributes:
        job_id: The job.
        token: Fencing token; every write of the holder carries it.
        attempt: Which attempt this is, from 1.
        spec: Resolved spec as JSON: of a training, or of a gradient check.
        updates: Updates that the policy to start from has had.
        start_updates: Updates that the policy had when the job was created.
        policy_bytes: The policy to start from, or to check; None where a check's spec describes it.
        state_bytes: State to resume from; None at the job's beginning.
        behaviour_bytes: The policy that acts in training, if that is another one.
        kind: What is to be computed.
        rival: The best checkpoint of the policy so far, if one was looked at.
    """

    job_id: str
    token: int
    attempt: int
    spec: dict[str, Any] = field(repr=False)
    updates: int
    start_updates: int
    policy_bytes: bytes | None = field(repr=False)
    state_bytes: bytes | None = field(repr=False)
    behaviour_bytes: bytes | None = field(default=None, repr=False)
    kind: JobKind = "training"
    rival: Rival | None = None
