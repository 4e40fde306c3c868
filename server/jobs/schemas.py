"""Bodies about jobs."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from pgengine.checking import GradientCheck
from pgengine.exactness import ExactAbsence
from pgengine.explanations import Explanation
from pgengine.findings import Finding
from pgengine.intervals import Method
from pgengine.labels import Label, Objective
from pgengine.notices import Notice
from pgengine.spec import (
    AlgorithmSpec,
    EvaluationSpec,
    LinearPolicySpec,
    MlpPolicySpec,
    PolicySpec,
    Seed,
    StopSpec,
)
from server.checkpoints.schemas import Evaluation
from server.environments.schemas import EnvironmentReference
from server.ids import CheckpointId, EnvironmentId, JobId, PolicyId
from server.jobs.reports import FailureCode
from server.pages import PageQuery
from server.policies.schemas import PolicyReference
from server.request import Answer, Body, Metadata, Name

__all__ = [
    "Failure",
    "GradientCheckCreate",
    "GradientCheckJob",
    "GradientCheckQuery",
    "Metrics",
    "Progress",
    "QueueReason",
    "Result",
    "Status",
    "TrainingJob",
    "TrainingJobCreate",
    "TrainingJobQuery",
    "TrainingJobValidation",
    "UpdateExplanation",
]

Status = Literal["queued", "running", "pausing", "paused", "cancelling", "cancelled", "succeeded", "failed"]


class TrainingJobCreate(Body):
    """A training job to create. Everything but the environment has a default.

    The defaults learn CartPole-v1, Acrobot-v1 and FrozenLake-v1; `result.findings` says where a job learned nothing.
    """

    name: Name | None = None
    """What people call it."""
    environment: EnvironmentReference
    """What to learn: an id, or a description."""
    policy: PolicyReference = Field(default_factory=MlpPolicySpec)
    """What learns: an id, which goes on from its latest checkpoint, or a description of a new one. Left out, with a
    registered id that publishes its transition table: a linear softmax, and in `algorithm` 128 trajectories and Adam
    0.05 where those are left out, too."""
    algorithm: AlgorithmSpec = Field(default_factory=AlgorithmSpec)
    """How it learns."""
    stop: StopSpec = Field(default_factory=StopSpec)
    """When it ends."""
    evaluation: EvaluationSpec = Field(default_factory=EvaluationSpec)
    """How the result is measured."""
    diagnostics_every: Annotated[int, Field(ge=0, le=1_000_000)] = 1
    """Updates from one measurement of the gradient's noise and the exact figures to the next; 0 for none. They cost
    time and change no bit of the training."""
    seed: Seed | None = None
    """Every random number that the engine draws is derived from it, and the seed of each episode, too; an environment
    that draws from elsewhere has `repeatable: false`. Left out: drawn, and returned."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where updates are computed; auto takes a GPU if there is one."""
    metadata: Metadata = Field(default_factory=dict)
    """What clients note on it."""


class TrainingJobQuery(PageQuery):
    """Query parameters of the list of training jobs."""

    status: Annotated[list[Status], Field(max_length=8)] = Field(default_factory=list)
    """Only jobs in one of these states; may be repeated."""
    policy_id: PolicyId | None = None
    """Only jobs of this policy."""


class Progress(Answer):
    """How far a job is, counted from its own beginning and not from the policy's."""

    updates: int
    """Updates of the optimizer."""
    env_steps: int
    """Environment steps of training."""
    episodes: int
    """Complete episodes of training."""
    fraction: float
    """Part of the nearest limit that is used up, in [0, 1]."""


class Failure(Answer):
    """Why a job failed."""

    code: FailureCode
    """Closed code."""
    message: str
    """The same for people."""


class Result(Answer):
    """What a job has come to."""

    evaluation: Evaluation
    """Of the final policy, on fresh episodes by which nothing was selected."""
    checkpoint_id: CheckpointId
    """The final policy."""
    stopped_by: Literal["target_return", "updates", "env_steps", "seconds", "effective_sample_size", "ratio_variance"]
    """Which limit ended it, or that too few trajectories carried the weight of a batch."""
    target_reached: bool | None
    """Whether the job stopped because the final policy was seen to reach the target return; null if there was none."""
    target_method: Method | None = None
    """How that was seen: `exact` (the mean return is known), `betting` (from fresh episodes, for returns in a known
    range), or `t` (from fresh episodes, approximately: nothing is known of the range of returns). null if it was not,
    and in results of earlier versions, which took `t`."""
    target_proven: bool | None = None
    """Whether it is proven: by `exact` for certain, by `betting` but for 5% over all looks of the job, whatever the
    returns are like. false for `t`: rare bad returns may have been missed. null as before."""
    findings: list[Finding] = Field(default_factory=list)
    """What the job should be told of, such as that nothing was learned, and what to try; empty where there is nothing
    to say, and for jobs of earlier versions."""


class QueueReason(Answer):
    """Why a queued job waits."""

    code: Literal["behind", "workers_busy", "waiting_for_worker"]
    """Other jobs are older; every live worker has a job; no worker has taken it yet."""
    message: str
    """The same for people."""


class TrainingJob(Answer):
    """A request to train a policy, and what became of it."""

    object: Literal["training_job"] = "training_job"
    """Always `training_job`."""
    id: JobId
    """Its id."""
    name: str | None
    """What people call it."""
    status: Status
    """Its state."""
    is_terminal: bool
    """Whether the state is one of cancelled, succeeded and failed, which never change again."""
    policy_id: PolicyId
    """What learns."""
    environment_id: EnvironmentId
    """What it learns in."""
    attempt: int
    """1, and one more after each crash of a worker."""
    label: Label
    """What the gradient estimate is, compared with the gradient of the objective."""
    notices: list[Notice]
    """What else is worth knowing of the policy in this environment; the first events tell it, too."""
    exact_absent: ExactAbsence | None
    """Why its updates have no `exact_return` and `exact_gradient_norm`; null if those that are measured have them, and
    for jobs of earlier versions."""
    algorithm: AlgorithmSpec
    """How it learns, all defaults written out."""
    stop: StopSpec
    """When it ends, all defaults written out."""
    evaluation: EvaluationSpec
    """How the result is measured."""
    diagnostics_every: int
    """Updates from one measurement of the gradient's noise and the exact figures to the next; 0 for none."""
    seed: int
    """Every random number that the engine draws is derived from it, and the seed of each episode, too; an environment
    that draws from elsewhere has `repeatable: false`."""
    device: Literal["auto", "cpu", "cuda"]
    """Where updates are computed."""
    progress: Progress
    """How far it is."""
    failure: Failure | None
    """Why it failed."""
    result: Result | None
    """What it has come to, once it has succeeded."""
    queue_position: int | None
    """How many queued jobs are older; null if it is not queued."""
    queue_reason: QueueReason | None
    """Why it waits; null if it is not queued."""
    metadata: dict[str, str]
    """What clients note on it."""
    created_at: datetime
    """When it was created."""
    queued_at: datetime
    """When it was queued, the last time."""
    started_at: datetime | None
    """When a worker took it for the first time."""
    finished_at: datetime | None
    """When it ended."""


class TrainingJobValidation(Answer):
    """What a training job would be; nothing was written."""

    object: Literal["training_job_validation"] = "training_job_validation"
    """Always `training_job_validation`."""
    policy_id: PolicyId | None
    """What would learn, where the body names it."""
    environment_id: EnvironmentId | None
    """What it would learn in, where the body names it."""
    policy: PolicySpec
    """Network and distribution, all defaults written out."""
    parameters: int
    """Numbers in the policy."""
    algorithm: AlgorithmSpec
    """How it would learn, all defaults written out."""
    stop: StopSpec
    """When it would end, all defaults written out."""
    evaluation: EvaluationSpec
    """How the result would be measured."""
    diagnostics_every: int
    """Updates from one measurement of the gradient's noise and the exact figures to the next; 0 for none."""
    seed: int | None
    """The seed of the body; null where one would be drawn."""
    device: Literal["auto", "cpu", "cuda"]
    """Where updates would be computed."""
    label: Label
    """What the gradient estimate would be, compared with the gradient of the objective."""
    notices: list[Notice]
    """What else is worth knowing of the policy in this environment."""
    objective: Objective
    """What the gradient would be a gradient of."""
    exact_absent: ExactAbsence | None
    """Why its updates would have no `exact_return` and `exact_gradient_norm`; null if those that are measured would."""


# --- gradient checks --------------------------------------------------------------------------------------------------


class GradientCheckCreate(Body):
    """A gradient check to create: are estimators what their labels say? Compared with the exact gradient."""

    name: Name | None = None
    """What people call it."""
    environment: EnvironmentReference
    """A finite MDP, an environment with a transition table of its own, or an LQR: an id, or a description."""
    policy: PolicyReference = Field(default_factory=LinearPolicySpec)
    """The policy at whose parameters the gradient is taken: an id, checked at its latest checkpoint, or a description.
    A described one is not kept."""
    estimators: Annotated[list[AlgorithmSpec], Field(min_length=1, max_length=32)] = Field(
        default_factory=lambda: [AlgorithmSpec()]
    )
    """Which estimators to compare, each with its own number of trajectories."""
    mode: Literal["enumerate", "sample"] = "sample"
    """All batches of a small MDP, or batches that are played by the same code as in training."""
    batches: Annotated[int, Field(ge=8, le=10_000_000)] = 2000
    """Batches to play for each estimator in mode `sample`."""
    false_alarm: Annotated[float, Field(gt=0.0, le=0.1)] = 1e-6
    """Odds that an unbiased estimator is called biased in mode `sample`, over all of its parameters."""
    values: bool = False
    """Whether the result also has exact values of states and actions, visits, and optima."""
    seed: Seed | None = None
    """Every random number of the check is derived from it. Left out: drawn, and returned."""
    metadata: Metadata = Field(default_factory=dict)
    """What clients note on it."""


class GradientCheckQuery(PageQuery):
    """Query parameters of the list of gradient checks."""

    status: Annotated[list[Status], Field(max_length=8)] = Field(default_factory=list)
    """Only checks in one of these states; may be repeated."""
    policy_id: PolicyId | None = None
    """Only checks of this policy."""


class CheckProgress(Answer):
    """How far a check is."""

    fraction: float
    """Share of the work that is done, in [0, 1]."""


class GradientCheckJob(Answer):
    """A request to compare estimators with the exact gradient, and what came of it."""

    object: Literal["gradient_check"] = "gradient_check"
    """Always `gradient_check`."""
    id: JobId
    """Its id."""
    name: str | None
    """What people call it."""
    status: Status
    """Its state."""
    is_terminal: bool
    """Whether the state is one of cancelled, succeeded and failed, which never change again."""
    environment_id: EnvironmentId
    """What the policy acts in."""
    policy_id: PolicyId | None
    """The policy that is checked; null if the request described one."""
    checkpoint_id: CheckpointId | None
    """Exactly the checkpoint that is checked; null if the request described the policy."""
    attempt: int
    """1, and one more after each crash of a worker; each begins again and comes to the same result."""
    policy: PolicySpec
    """Network and distribution, all defaults written out, with the initial parameters that were given; in lists
    without them and without the arrays of its features."""
    estimators: list[AlgorithmSpec]
    """What is compared, all defaults written out."""
    labels: list[Label]
    """What the engine says of each of them."""
    mode: Literal["enumerate", "sample"]
    """Over all batches, or over batches that are played."""
    batches: int
    """Batches to play for each estimator in mode `sample`."""
    false_alarm: float
    """Odds that an unbiased estimator is called biased in mode `sample`."""
    values: bool
    """Whether exact values and optima were asked for."""
    seed: int
    """Every random number of the check is derived from it."""
    progress: CheckProgress
    """How far it is."""
    failure: Failure | None
    """Why it failed."""
    result: GradientCheck | None
    """What it has come to, once it has succeeded; in lists without `gradient`, `mean` and `parameter_names`."""
    queue_position: int | None
    """How many queued jobs are older; null if it is not queued."""
    queue_reason: QueueReason | None
    """Why it waits; null if it is not queued."""
    metadata: dict[str, str]
    """What clients note on it."""
    created_at: datetime
    """When it was created."""
    queued_at: datetime
    """When it was queued, the last time."""
    started_at: datetime | None
    """When a worker took it for the first time."""
    finished_at: datetime | None
    """When it ended."""


# --- what a training job has done -------------------------------------------------------------------------------------


class UpdateExplanation(Explanation):
    """How one update of a training job came about, step by step."""

    object: Literal["update_explanation"] = "update_explanation"
    """Always `update_explanation`."""
    job_id: JobId
    """The job."""
    compared: bool
    """Whether the figures of this update are recorded and came out the same; false where the job has thinned them
    out."""


class Metrics(Answer):
    """Metrics of a job in columns of equal length."""

    object: Literal["metrics"] = "metrics"
    """Always `metrics`."""
    job_id: JobId
    """The job."""
    keys: list[str]
    """Names of the columns."""
    update: list[int]
    """Updates that the policy had had, one for each row."""
    env_steps: list[int]
    """Environment steps of the job up to the update."""
    attempt: list[int]
    """Attempt that measured it."""
    values: dict[str, list[float | None]]
    """Columns by name; null where a value is missing or not finite."""
    nonfinite: dict[str, list[int]]
    """By name, the updates in which the value was not finite."""
    recorded: int
    """Updates that are recorded in the range; more than rows if the curve was down-sampled."""
    exact_absent: ExactAbsence | None
    """Why `exact_return` and `exact_gradient_norm` are missing, as in the job."""
