"""One job, computed: the same wherever a trainer runs, and whatever carries its link.

Knows the engine and the link; knows no database, no process and no signal.
"""

import time
import traceback
from contextlib import closing
from dataclasses import replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from pgengine.errors import CheckpointError, DivergedError, EnvironmentFailure, SpecError
from pgengine.spec import GradientCheckSpec, TrainingSpec
from server.jobs.reports import Evaluated, Failure, Measured, Outcome, Progress, Report, Rival, Snapshot
from server.logs import log
from server.memory import is_out_of_memory, out_of_memory
from server.worker.link import Answer, Channel, Command, Finished, LinkClosed, Released, Reported, Start

if TYPE_CHECKING:
    from pgengine import EpisodeEnvironment, Evaluation, Policy, Update
    from pgengine.evaluation import Selection

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
    rival = job.rival
    with closing(pgengine.open_environment(spec.environment)) as environment:
        run = pgengine.train(
            spec, environment=environment, policy=policy, resume_from=job.state_bytes, behaviour=behaviour
        )
        for update in run:
            command = reporter.add(update)
            if command == "cancel":
                return Finished(Outcome("cancelled", report=reporter.rest_with(update)))
            if command == "release":
                return Released(reporter.rest_with(update))
            if update.stopped_by is None and update.selection is not None:
                rival = _better(rival, update)
        # a crash during the evaluation must not cost the last updates
        reporter.checkpoint(update)
        selection = update.selection or _looked_at(environment, update.policy, spec)
        evaluation = _evaluated(environment, update.policy, spec)
        report = reporter.rest_with(update, selection.model_dump(mode="json"), evaluation.model_dump(mode="json"))
        if rival is not None and rival.mean_return > selection.mean_return and not rival.is_evaluated:
            best = pgengine.load(rival.policy_bytes)
            told = Evaluated(
                rival.updates,
                sha256(rival.policy_bytes).hexdigest(),
                _evaluated(environment, best, spec).model_dump(mode="json"),
            )
            report = replace(report, evaluated=told)
    return Finished(Outcome("succeeded", report=report, result=_result(spec, update, evaluation)))


def _better(rival: Rival | None, update: "Update") -> Rival | None:
    """The better of two checkpoints of a policy, by what selections saw of them; of equals the newer one."""
    if update.selection is None or (rival is not None and rival.mean_return > update.selection.mean_return):
        return rival
    return Rival(update.updates, update.selection.mean_return, update.policy.to_bytes(), is_evaluated=False)


def _looked_at(environment: "EpisodeEnvironment", policy: "Policy", spec: TrainingSpec) -> "Selection":
    """What the final policy is compared with other checkpoints by, where no look at a target has told it."""
    from pgengine.evaluation import SELECTION_ERROR, select

    return select(
        environment,
        policy,
        target=None,
        error=SELECTION_ERROR,
        episodes=spec.evaluation.episodes,
        seed=spec.seed,
        survival=spec.algorithm.survival,
    )


def _evaluated(environment: "EpisodeEnvironment", policy: "Policy", spec: TrainingSpec) -> "Evaluation":
    """What a policy is worth, on episodes that decide nothing."""
    import pgengine

    return pgengine.evaluate(
        policy,
        environment,
        episodes=spec.evaluation.episodes,
        seed=spec.seed,
        deterministic_episodes=spec.evaluation.deterministic_episodes,
        survival=spec.algorithm.survival,
    )


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


def _result(spec: TrainingSpec, update: "Update", evaluation: "Evaluation") -> dict[str, Any]:
    reached = update.stopped_by == "target_return"
    shown = update.selection if reached else None  # a run of an earlier version kept none
    return {
        "evaluation": evaluation.model_dump(mode="json"),
        "stopped_by": update.stopped_by,
        "target_reached": None if spec.stop.target_return is None else reached,
        "target_method": None if shown is None else shown.method,
        "target_proven": None if shown is None else shown.is_proven,
        "findings": [finding.model_dump(mode="json") for finding in update.findings(evaluation)],
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
        if update.selection is not None or time.monotonic() >= self._checkpoint_at:
            self._keep(update, _dumped(update.selection))
        return self._report()

    def advance(self, fraction: float) -> Command:
        """Say how far a job without updates is, when it is due, and what the supervisor wants."""
        self._progress = Progress(fraction=fraction)
        return self._report()

    def checkpoint(self, update: "Update") -> None:
        """Send a checkpoint of this update and all before, unless it has been sent."""
        if self._kept_updates != update.updates:
            self._keep(update, _dumped(update.selection))
        if self._checkpoint is not None:
            self.settle()
            self._send()

    def rest(self) -> Report:
        """What has not been sent yet."""
        metrics, self._metrics = tuple(self._metrics), []
        checkpoint, self._checkpoint = self._checkpoint, None
        fingerprint, self._fingerprint = self._fingerprint, None
        return Report(self._progress, metrics, checkpoint, fingerprint)

    def rest_with(
        self, update: "Update", selection: dict[str, Any] | None = None, evaluation: dict[str, Any] | None = None
    ) -> Report:
        """What has not been sent yet, with a checkpoint of this update."""
        if evaluation is not None or self._kept_updates != update.updates:
            # what was seen of this update when it was made has been sent with it
            sent = update.selection is not None and self._kept_updates == update.updates
            self._keep(update, None if sent else selection, evaluation)
        return self.rest()

    def settle(self) -> None:
        """Wait for the answer to the report in flight, so that none is left over for the next job."""
        self._exchange(wait=True)

    def _keep(
        self, update: "Update", selection: dict[str, Any] | None, evaluation: dict[str, Any] | None = None
    ) -> None:
        pending = self._checkpoint
        if pending is not None and pending.updates != update.updates and pending.selection is not None:
            # a report has room for one checkpoint; one that was looked at must not be lost, others are better newer
            self.settle()
            self._send()
        self._checkpoint = Snapshot(
            update.updates, _progress(update), update.policy.to_bytes(), update.state(), selection, evaluation
        )
        self._checkpoint_at = time.monotonic() + self._checkpoint_seconds
        self._kept_updates = update.updates

    def _report(self) -> Command:
        self._exchange(wait=False)
        # what ends the job here goes with its last message
        if self._command == "continue" and not self._in_flight and time.monotonic() >= self._report_at:
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


def _dumped(selection: "Selection | None") -> dict[str, Any] | None:
    return None if selection is None else selection.model_dump(mode="json")


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
