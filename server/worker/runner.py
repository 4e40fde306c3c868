"""One job, computed: the same wherever a trainer runs, and whatever carries its link.

Knows the engine and the link; knows no database, no process and no signal.
"""

import time
import traceback
from typing import TYPE_CHECKING, Any

from pgengine.errors import CheckpointError, DivergedError, EnvironmentFailure, SpecError
from pgengine.spec import GradientCheckSpec, TrainingSpec
from server.jobs.reports import Failure, Measured, Outcome, Progress, Report, Snapshot
from server.logs import log
from server.memory import is_out_of_memory, out_of_memory
from server.worker.link import Answer, Channel, Command, Finished, LinkClosed, Released, Reported, Start

if TYPE_CHECKING:
    from pgengine import Evaluation, Update

__all__ = ["REPORT_SECONDS", "run"]

REPORT_SECONDS = 0.1
"""Least time between two reports: at most ten a second."""

LONGEST_MESSAGE = 1000
"""Characters of a failure's message; an environment may say anything."""


def run(job: Start, link: Channel) -> None:
    """Compute a job to its end, its cancellation or its release, and say so in a last message.

    Args:
        job: The job.
        link: Where reports go and commands come from.

    Raises:
        LinkClosed: if the supervisor is gone; nothing can be said any more.
    """
    reporter = _Reporter(link, job)
    try:
        last = _check(job, reporter) if job.job_kind == "gradient_check" else _train(job, reporter)
    except LinkClosed:
        raise
    except Exception as error:  # noqa: BLE001  whatever an environment or the engine raises ends this job, not the trainer
        last = Finished(Outcome("failed", report=reporter.rest(), failure=_failure(job, error)))
    reporter.settle()
    link.send(last)


def _train(job: Start, reporter: "_Reporter") -> Finished | Released:
    import pgengine

    spec = TrainingSpec.model_validate(job.spec)
    assert job.policy_bytes is not None, "a training starts from a stored policy"
    policy = pgengine.load(job.policy_bytes)
    reporter.describe(pgengine.runtime_fingerprint(policy))
    behaviour = None if job.behaviour_bytes is None else pgengine.load(job.behaviour_bytes)
    update: Update | None = None
    for update in pgengine.train(spec, policy=policy, resume_from=job.state_bytes, behaviour=behaviour):
        command = reporter.add(update)
        if command == "cancel":
            return Finished(Outcome("cancelled", report=reporter.rest_with(update)))
        if command == "release":
            return Released(reporter.rest_with(update))
        policy = update.policy
    if update is not None:
        # a crash during the evaluation must not cost the last updates
        reporter.checkpoint(update)
    evaluation = pgengine.evaluate(
        policy,
        spec.environment,
        episodes=spec.evaluation.episodes,
        seed=spec.seed,
        deterministic_episodes=spec.evaluation.deterministic_episodes,
        survival=spec.algorithm.survival,
    )
    result = _result(spec, update, evaluation)
    report = reporter.rest() if update is None else reporter.rest_with(update, result["evaluation"])
    return Finished(Outcome("succeeded", report=report, result=result))


def _check(job: Start, reporter: "_Reporter") -> Finished | Released:
    """A gradient check: a pure function of its spec, which begins again wherever it is given back."""
    import pgengine
    from pgengine.checking import check_steps

    reporter.describe(pgengine.runtime_fingerprint())
    spec = GradientCheckSpec.model_validate(job.spec)
    policy = None if job.policy_bytes is None else pgengine.load(job.policy_bytes)
    result: dict[str, Any] | None = None
    for step in check_steps(spec, policy):
        command = reporter.advance(step.fraction)
        if step.result is not None:
            result = step.result.model_dump(mode="json")
        elif command == "cancel":
            return Finished(Outcome("cancelled", report=reporter.rest()))
        elif command == "release":
            return Released(reporter.rest())
    return Finished(Outcome("succeeded", report=reporter.rest(), result=result))


def _result(spec: TrainingSpec, update: "Update | None", evaluation: "Evaluation") -> dict[str, Any]:
    stopped_by = "updates" if update is None else update.stopped_by
    findings = [] if update is None else update.findings(evaluation)
    return {
        "evaluation": evaluation.model_dump(mode="json"),
        "stopped_by": stopped_by,
        "target_reached": None if spec.stop.target_return is None else stopped_by == "target_return",
        "findings": [finding.model_dump(mode="json") for finding in findings],
    }


class _Reporter:
    """Collects what the updates say and sends it: at most ten times a second, one report in flight."""

    def __init__(self, link: Channel, job: Start) -> None:
        self._link = link
        self._checkpoint_seconds = job.checkpoint_seconds
        self._checkpoint_at = time.monotonic() + job.checkpoint_seconds
        self._reported_updates = self._kept_updates = job.updates
        self._report_at = 0.0
        self._in_flight = False
        self._command: Command = "continue"
        self._progress: Progress | None = None
        self._fingerprint: dict[str, str | int] | None = None
        self._metrics: list[Measured] = []
        self._checkpoint: Snapshot | None = None

    def describe(self, fingerprint: dict[str, str | int]) -> None:
        """Say with the next report where this is computed."""
        self._fingerprint = fingerprint

    def add(self, update: "Update") -> Command:
        """Collect one update, send what is due, and say what the supervisor wants."""
        progress = self._progress = _progress(update)
        # a finished run that is resumed gives its last update again
        if update.updates > self._reported_updates:
            self._metrics.append(Measured(update.updates, progress.env_steps, dict(update.metrics)))
            self._reported_updates = update.updates
        if update.evaluation is not None or time.monotonic() >= self._checkpoint_at:
            self._keep(update, None if update.evaluation is None else update.evaluation.model_dump(mode="json"))
        return self._report()

    def advance(self, fraction: float) -> Command:
        """Say how far a job without updates is, when it is due, and what the supervisor wants."""
        self._progress = Progress(fraction=fraction)
        return self._report()

    def checkpoint(self, update: "Update") -> None:
        """Send a checkpoint of this update and all before, unless it has been sent."""
        if self._kept_updates != update.updates:
            self._keep(update, None)
        if self._checkpoint is not None:
            self.settle()
            self._send()

    def rest(self) -> Report:
        """What has not been sent yet."""
        metrics, self._metrics = tuple(self._metrics), []
        checkpoint, self._checkpoint = self._checkpoint, None
        fingerprint, self._fingerprint = self._fingerprint, None
        return Report(self._progress, metrics, checkpoint, fingerprint)

    def rest_with(self, update: "Update", evaluation: dict[str, Any] | None = None) -> Report:
        """What has not been sent yet, with a checkpoint of this update."""
        if evaluation is not None or self._kept_updates != update.updates:
            self._keep(update, evaluation)
        return self.rest()

    def settle(self) -> None:
        """Wait for the answer to the report in flight, so that none is left over for the next job."""
        self._exchange(wait=True)

    def _keep(self, update: "Update", evaluation: dict[str, Any] | None) -> None:
        pending = self._checkpoint
        if pending is not None and pending.updates != update.updates and pending.evaluation is not None:
            # a report has room for one checkpoint; an evaluated one must not be lost, others are better newer
            self.settle()
            self._send()
        self._checkpoint = Snapshot(
            update.updates, _progress(update), update.policy.to_bytes(), update.state(), evaluation
        )
        self._checkpoint_at = time.monotonic() + self._checkpoint_seconds
        self._kept_updates = update.updates

    def _report(self) -> Command:
        self._exchange(wait=False)
        if not self._in_flight and time.monotonic() >= self._report_at:
            self._send()
        return self._command

    def _send(self) -> None:
        self._link.send(Reported(self.rest()))
        self._in_flight = True
        self._report_at = time.monotonic() + REPORT_SECONDS

    def _exchange(self, *, wait: bool) -> None:
        if not self._in_flight:
            return
        answer = self._link.receive(None if wait else 0)
        if answer is None:
            return
        if not isinstance(answer, Answer):
            raise LinkClosed(f"an answer was expected, not {answer.kind}")
        self._in_flight = False
        self._command = answer.command


def _progress(update: "Update") -> Progress:
    progress = update.progress
    return Progress(progress.updates, progress.env_steps, progress.episodes, progress.fraction)


def _failure(job: Start, error: Exception) -> Failure:
    """What clients are told; the log has the traceback."""
    log(
        "job_failed",
        "warning",
        job_id=job.job_id,
        error=type(error).__name__,
        traceback="".join(traceback.format_exception(error)),
    )
    # an environment may be what has asked for too much; the engine keeps what it raised as the cause
    if is_out_of_memory(error):
        return Failure("out_of_memory", out_of_memory())
    if isinstance(error, DivergedError):
        return Failure("diverged", _plain(error))
    # the spec was checked when the job was created: what is refused here is an environment that this worker lacks
    if isinstance(error, EnvironmentFailure | SpecError):
        return Failure("environment_error", _plain(error))
    if isinstance(error, CheckpointError):
        return Failure("internal", "the checkpoint to start from could not be read")
    return Failure("internal", "the trainer made a mistake; the worker's log has the details")


def _plain(error: Exception) -> str:
    """The message, short and of characters that every database keeps."""
    text = str(error).replace("\0", "").encode("utf-8", "replace").decode()
    return text if len(text) <= LONGEST_MESSAGE else text[: LONGEST_MESSAGE - 1] + "…"
