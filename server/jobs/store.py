"""All there is to know about jobs: their rows, their states, and who may write them. `history` keeps what they report.

The job table is the queue. A worker *claims* the oldest queued job and gets a fencing token; each write of a worker
carries it, so that one who has lost its lease without knowing can change nothing (`LeaseLost`). It carries a number,
too: a write whose answer was lost on the way is sent again with the number that it had, and changes nothing if it had
been committed. A claim whose answer was lost is given again to the worker that had made it.

Jobs of all kinds share the table and the queue. A training goes on from its newest checkpoint; a gradient check begins
again. A checkpoint that a job reads beside its policy's latest one cannot be deleted before the job ends.

    queued ── claim ──> running ── finish ──> succeeded | failed
      ^                    │
      ├── release, lose ───┤                      release: in order, the attempt goes on elsewhere
      │                    └─ request_cancel ─> cancelling ── finish, release, lose ──> cancelled
      └── request_cancel ──> cancelled            lose: a crash, attempt + 1, failed once max_attempts are used up

While a job is cancelling its holder's last writes are accepted: a job that succeeded or failed before the request
reached it ends as what it became, with everything it has computed.

All functions take a transaction (`Database.write()` where they write) and never end it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import CursorResult, func, select, update
from sqlalchemy import delete as delete_from
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from server.checkpoints import store as checkpoints
from server.database import now
from server.errors import NotCancellable, NotFound, NotTerminal, PolicyBusy, TooManyRequests
from server.ids import new_id
from server.jobs import history
from server.jobs.reports import Claim, JobKind, Outcome, Progress, Report, Rival, Snapshot
from server.metrics import JobFigures
from server.pages import PageQuery, Slice, fetch
from server.tables import JOB_STATUSES, TERMINAL_STATUSES, Checkpoint, Environment, Job

__all__ = [
    "HELD_STATUSES",
    "TERMINAL_STATUSES",
    "Explainable",
    "Job",
    "LeaseLost",
    "NotRepeatable",
    "QueueReason",
    "any_expired",
    "any_queued",
    "at_work",
    "claim",
    "claimed_before",
    "create",
    "delete",
    "explainable",
    "figures",
    "finish",
    "get",
    "list_",
    "lose",
    "policy_busy",
    "queue_reasons",
    "reap",
    "release",
    "renew",
    "report",
    "request_cancel",
    "without_arrays",
    "without_feature_arrays",
]

HELD_STATUSES = ("running", "pausing", "cancelling")
"""The states in which a worker holds the job."""

_NEXT = {
    "queued": {"running", "cancelled"},
    "running": {"queued", "pausing", "cancelling", "succeeded", "failed"},
    "pausing": {"paused", "cancelling", "succeeded", "failed"},
    "paused": {"queued", "cancelled"},
    "cancelling": {"cancelled", "succeeded", "failed"},
    **{status: set[str]() for status in TERMINAL_STATUSES},
}

COMPARED = 64
"""Most updates up to the one that is explained with which a replay is compared: a job may have thinned that one out."""

_WITHOUT_HOLDER = {"running": "queued", "pausing": "paused", "cancelling": "cancelled"}
"""What a held job becomes when its holder is gone."""

_OPEN = tuple(status for status in JOB_STATUSES if status not in TERMINAL_STATUSES)

assert _NEXT.keys() == set(JOB_STATUSES)


class LeaseLost(Exception):
    """The job is not held with this token any more, so nothing was written."""


class NotRepeatable(Exception):
    """An update cannot be made again, because something that it was made from is gone. The message is for people."""


@dataclass(frozen=True, slots=True)
class QueueReason:
    """Why a queued job waits.

    Attributes:
        code: behind (other jobs are older), workers_busy (every live worker has one), or waiting_for_worker.
        message: The same for people.
        ahead: How many queued jobs are older.
    """

    code: Literal["behind", "workers_busy", "waiting_for_worker"]
    message: str
    ahead: int


@dataclass(frozen=True, slots=True)
class Explainable:
    """What is needed to play updates of a training job again.

    Attributes:
        spec: Resolved training spec as JSON.
        start_updates: Updates that the policy had when the job was created.
        updates: Updates that it has now.
        policy_bytes: The policy to start from; None where there is a state.
        state_bytes: State to resume from.
        behaviour_bytes: The policy that acts in training, if that is another one.
        recorded: What was measured of updates that are played again, the newest ones up to the one asked for.
        fingerprint: Where the job was computed, the last time.
    """

    spec: dict[str, Any] = field(repr=False)
    start_updates: int
    updates: int
    policy_bytes: bytes | None = field(repr=False)
    state_bytes: bytes | None = field(repr=False)
    behaviour_bytes: bytes | None = field(repr=False)
    recorded: dict[int, dict[str, float | None]] = field(repr=False)
    fingerprint: dict[str, Any] | None


_NAMES: dict[JobKind | None, str] = {None: "job", "training": "training job", "gradient_check": "gradient check"}
_ARRAYS = ("gradient", "parameter_names", "mean", "values")
"""Fields of a gradient check's result as long as its policy or environment is large; events and lists go without."""
_FEATURE_ARRAYS = ("values", "low", "high")


# --- what clients do -------------------------------------------------------------------------------------------------


def create(
    session: Session,
    *,
    policy_id: str | None,
    environment_id: str,
    start_updates: int,
    spec: dict[str, Any],
    label: dict[str, Any],
    max_attempts: int,
    name: str | None = None,
    metadata: dict[str, Any] | None = None,
    kind: JobKind = "training",
    checkpoint_id: str | None = None,
    key_id: str | None = None,
    most_open: int | None = None,
    notices: Sequence[dict[str, Any]] = (),
    exact_absent: dict[str, Any] | None = None,
) -> Job:
    """Queue a job.

    Args:
        session: A writing transaction.
        policy_id: What learns, from its latest checkpoint on; or what is checked, None where the spec describes it.
        environment_id: What it learns in.
        start_updates: Updates that the policy has had.
        spec: Resolved spec as JSON. Its environment is not kept with the job: it is that of the environment's row.
        label: What its gradient estimate is, as JSON; empty for a gradient check.
        max_attempts: Crashes after which the job fails.
        name: For people.
        metadata: For clients.
        kind: What is to be computed.
        checkpoint_id: What it reads beside its policy's latest checkpoint, held until it ends: the policy that acts in
            training, or the one whose gradient is checked.
        key_id: Who asks for it.
        most_open: Most jobs of that key that have not ended, this one included; None for no bound.
        notices: What is worth knowing before it is done, {code, message} each; the first events tell them, too.
        exact_absent: Why its updates will have no exact figures, as JSON; None if they will, or for a gradient check.

    Raises:
        PolicyBusy: if another training job of the policy has not ended.
        TooManyRequests: if the key has as many jobs as it may.
    """
    if most_open is not None:
        _check_open(session, key_id, most_open)
    instant = _clock(session)
    job = Job(
        id=new_id("job"),
        kind=kind,
        key_id=key_id,
        name=name,
        metadata_=metadata or {},
        policy_id=policy_id,
        environment_id=environment_id,
        checkpoint_id=checkpoint_id,
        spec={name: value for name, value in spec.items() if name != "environment"},
        label=label,
        notices=list(notices),
        exact_absent=exact_absent,
        status="queued",
        attempt=1,
        max_attempts=max_attempts,
        token=0,
        start_updates=start_updates,
        updates=0,
        env_steps=0,
        episodes=0,
        fraction=0.0,
        next_seq=1,
        created_at=instant,
        queued_at=instant,
    )
    try:
        with session.begin_nested():
            session.add(job)
    except IntegrityError as error:
        # the partial unique index is the only judge: looking first would leave a gap between two requests
        if "uq_job_policy_id_training_active" in str(error.orig) or "job.policy_id" in str(error.orig):
            assert policy_id is not None
            raise policy_busy(at_work(session, policy_id)) from error
        raise
    history.emit(session, job, "status", _status_data(job), instant)
    for notice in notices:
        history.emit(session, job, "log", notice, instant)
    session.flush()
    return job


def _check_open(session: Session, key_id: str | None, most: int) -> None:
    # counting stops at the bound. Two requests of one moment may both find the last place free, which harms nobody
    mine = select(Job.id).where(Job.key_id == key_id, Job.status.in_(_OPEN)).limit(most)
    if (session.scalar(select(func.count()).select_from(mine.subquery())) or 0) >= most:
        raise TooManyRequests(
            f"This key has {most} jobs that have not ended, as many as it may (PGENGINE_MAX_OPEN_JOBS); "
            "wait for the end of one, or cancel one.",
            headers={"retry-after": "10"},
        )


def get(session: Session, job_id: str, kind: JobKind | None = None) -> Job:
    """The job, of this kind or of any.

    Raises:
        NotFound: if there is none with this id.
    """
    return _of_kind(session.get(Job, job_id), kind)


def at_work(session: Session, policy_id: str) -> str | None:
    """Id of the training job of the policy that has not ended, so that another one would be refused now; or None."""
    active = (Job.kind == "training", Job.policy_id == policy_id, Job.status.not_in(TERMINAL_STATUSES))
    return session.scalar(select(Job.id).where(*active).limit(1))


def policy_busy(job_id: str | None) -> PolicyBusy:
    """The refusal that names the training job at work; None where it has ended meanwhile."""
    if job_id is None:
        return PolicyBusy("Another training job of this policy ended at this moment; send the request again.")
    return PolicyBusy(f"{job_id} trains this policy and has not ended; wait for its end, or cancel it.")


def list_(
    session: Session,
    query: PageQuery,
    *,
    statuses: Collection[str] = (),
    policy_id: str | None = None,
    kind: JobKind = "training",
) -> Slice[Job]:
    """One page of jobs of a kind, of all states if none is named."""
    statement = select(Job).where(Job.kind == kind)
    if statuses:
        statement = statement.where(Job.status.in_(statuses))
    if policy_id is not None:
        statement = statement.where(Job.policy_id == policy_id)
    return fetch(session, statement, Job.id, "job", query)


def request_cancel(session: Session, job_id: str, kind: JobKind | None = None) -> Job:
    """Ask for the end of a job. Repeating it changes nothing.

    A queued job is cancelled at once; a running one becomes cancelling, and its worker hears of it with the answer to
    its next report.

    Raises:
        NotFound: if there is none with this id.
        NotCancellable: if it has succeeded or failed.
    """
    job = _locked(session, job_id, kind)
    if job.status in ("cancelling", "cancelled"):
        return job
    if job.status in TERMINAL_STATUSES:
        raise NotCancellable(f"The job has already {job.status}.")
    instant = _clock(session)
    job.cancel_requested_at = instant
    _move(session, job, "cancelling" if job.status in HELD_STATUSES else "cancelled", instant, "cancel requested")
    session.flush()
    return job


def delete(session: Session, job_id: str, kind: JobKind | None = None) -> None:
    """Remove an ended job with its events and metrics. Checkpoints belong to the policy and stay.

    Raises:
        NotFound: if there is none with this id.
        NotTerminal: if it has not ended.
    """
    job = _locked(session, job_id, kind)
    if job.status not in TERMINAL_STATUSES:
        raise NotTerminal(f"The job is {job.status}; cancel it first.")
    checkpoints.forget_states(session, job_id)
    # a plain statement: the foreign keys remove events and metrics and let checkpoints go
    session.execute(delete_from(Job).where(Job.id == job_id))
    session.expunge(job)


def explainable(session: Session, job_id: str, update: int) -> Explainable:
    """What is needed to play an update of a training job again: from its newest state before, else from its beginning.

    Args:
        session: A transaction.
        job_id: The job.
        update: Number of the policy's update, from 1.

    Raises:
        NotFound: if there is no such job, or it has made no such update.
        NotRepeatable: if a policy that it read is gone.
    """
    job = get(session, job_id, "training")
    first, last = job.start_updates + 1, job.start_updates + job.updates
    if not first <= update <= last:
        range_ = f"updates {first} to {last}" if last >= first else "no updates yet"
        raise NotFound(f"This job has made {range_}.")
    assert job.policy_id is not None
    found = checkpoints.state_before(session, job.id, update)
    begin, state_bytes = found or (job.start_updates, None)
    behaviour_id = _behaviour_of(job.spec)
    try:
        policy_bytes = None if found else checkpoints.content_after(session, job.policy_id, job.start_updates)
    except NotFound:
        raise NotRepeatable("the checkpoint from which the job began is gone") from None
    try:
        behaviour_bytes = None if behaviour_id is None else checkpoints.content(session, behaviour_id)
    except NotFound:
        raise NotRepeatable("the policy that acted was deleted") from None
    return Explainable(
        spec=_whole_spec(session, job),
        start_updates=job.start_updates,
        updates=last,
        policy_bytes=policy_bytes,
        state_bytes=state_bytes,
        behaviour_bytes=behaviour_bytes,
        recorded=history.recorded(session, job.id, max(begin + 1, update - COMPARED + 1), update),
        fingerprint=job.fingerprint,
    )


def _behaviour_of(spec: dict[str, Any]) -> str | None:
    """The checkpoint of another policy that acts in a training, or None."""
    behaviour = spec.get("algorithm", {}).get("importance", {}).get("behaviour", {})
    return behaviour.get("id") if behaviour.get("kind") == "policy" else None


def without_arrays(result: dict[str, Any] | None) -> dict[str, Any] | None:
    """The result of a gradient check without what is as long as its policy is large."""
    if result is None or "estimators" not in result:
        return result
    short = {name: None if name in _ARRAYS else value for name, value in result.items()}
    short["estimators"] = [
        {name: None if name in _ARRAYS else value for name, value in each.items()} for each in result["estimators"]
    ]
    return short


def without_feature_arrays(policy: dict[str, Any]) -> dict[str, Any]:
    """The spec of a policy without what is as long as its environment's tables are."""
    features = policy.get("features")
    if features is None:
        return policy
    return policy | {"features": {name: None if name in _FEATURE_ARRAYS else of for name, of in features.items()}}


def queue_reasons(session: Session, jobs: Sequence[Job]) -> dict[str, QueueReason]:
    """Why each of these jobs waits, by id; those that are not queued are missing. Two statements, however many."""
    queued = [job.id for job in jobs if job.status == "queued"]
    if not queued:
        return {}
    place = func.row_number().over(order_by=(Job.queued_at, Job.id)).label("place")
    line = select(Job.id, place).where(Job.status == "queued").subquery()
    rows = session.execute(select(line.c.id, line.c.place).where(line.c.id.in_(queued))).all()
    busy = _live_leases(session)
    return {job_id: _queue_reason(place - 1, busy) for job_id, place in rows}


def _queue_reason(ahead: int, busy: int) -> QueueReason:
    if ahead:
        return QueueReason("behind", f"{ahead} queued job{'s are' if ahead > 1 else ' is'} older", ahead)
    if busy:
        return QueueReason("workers_busy", f"{busy} worker{'s are' if busy > 1 else ' is'} busy with other jobs", 0)
    return QueueReason("waiting_for_worker", "no worker has taken it yet; if it stays so, none is running", 0)


def figures(session: Session) -> JobFigures:
    """What the job table says at this moment, for the operator's dashboard."""
    counted = {row[0]: row[1] for row in session.execute(select(Job.status, func.count()).group_by(Job.status))}
    instant, oldest = session.execute(
        select(now(), select(func.min(Job.queued_at)).where(Job.status == "queued").scalar_subquery())
    ).one()
    env_steps, updates = session.execute(
        select(func.coalesce(func.sum(Job.env_steps), 0), func.coalesce(func.sum(Job.updates), 0))
    ).one()
    return JobFigures(
        jobs={status: counted.get(status, 0) for status in JOB_STATUSES},
        queue_age_seconds=max(0.0, (instant - oldest).total_seconds()) if oldest is not None else 0.0,
        live_leases=_live_leases(session),
        env_steps=int(env_steps),
        updates=int(updates),
    )


# --- what workers do -------------------------------------------------------------------------------------------------


def any_queued(session: Session) -> bool:
    """Whether a claim could succeed; costs less than one and takes no lock."""
    return session.scalar(select(Job.id).where(Job.status == "queued").limit(1)) is not None


def any_expired(session: Session) -> bool:
    """Whether `reap` would find something; costs less and takes no lock."""
    return session.scalar(select(Job.id).where(*_expired()).limit(1)) is not None


def claim(session: Session, worker: str, lease_seconds: float) -> Claim | None:
    """Take the oldest queued job, or None if there is none.

    A training goes on from the newest checkpoint that it has written itself, with the state that makes the rest of it
    equal to the bit. Where that takes it back, an event `rewind` says so, and what was recorded beyond is removed. A
    gradient check begins again.

    Args:
        session: A writing transaction.
        worker: Who takes it, for people.
        lease_seconds: How long it is held without a renewal.
    """
    job = session.scalar(
        select(Job)
        .where(Job.status == "queued")
        .order_by(Job.queued_at, Job.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    if job is None:
        return None
    instant = _clock(session)
    job.token += 1
    job.reported = 0
    job.worker = worker
    job.lease_expires_at = instant + timedelta(seconds=lease_seconds)
    job.started_at = job.started_at or instant
    _move(session, job, "running", instant)
    if job.kind == "training":
        _prepare_training(session, job, instant)
    else:
        job.fraction = 0.0
    session.flush()
    return _claimed(session, job)


def claimed_before(session: Session, worker: str, lease_seconds: float) -> Claim | None:
    """The job that this worker holds without knowing it, since the answer to its claim was lost; else None.

    Args:
        session: A writing transaction.
        worker: Who asks, and holds nothing that it knows of; no other worker may have its name.
        lease_seconds: How long it is held without a renewal.
    """
    # where something was written with the token, its holder had known of it
    unknown = (Job.worker == worker, Job.status.in_(HELD_STATUSES), Job.reported == 0)
    job = session.scalar(select(Job).where(*unknown).limit(1).with_for_update(skip_locked=True))
    if job is None:
        return None
    job.lease_expires_at = _clock(session) + timedelta(seconds=lease_seconds)
    session.flush()
    return _claimed(session, job)


def _prepare_training(session: Session, job: Job, instant: datetime) -> None:
    checkpoint, state_bytes = _newest(session, job)
    if state_bytes is not None or job.attempt > 1:
        _rewind(session, job, checkpoint, instant)


def _newest(session: Session, job: Job) -> tuple[Checkpoint, bytes | None]:
    """The checkpoint from which a training goes on, and the state, if the job has written it itself."""
    assert job.policy_id is not None, "the table has a constraint for this"
    checkpoint = checkpoints.latest(session, job.policy_id)
    return checkpoint, checkpoints.state(session, checkpoint.id) if checkpoint.job_id == job.id else None


def _claimed(session: Session, job: Job) -> Claim:
    return _claimed_training(session, job) if job.kind == "training" else _claimed_check(session, job)


def _claimed_training(session: Session, job: Job) -> Claim:
    checkpoint, state_bytes = _newest(session, job)
    return Claim(
        job_id=job.id,
        token=job.token,
        attempt=job.attempt,
        spec=_whole_spec(session, job),
        updates=checkpoint.updates,
        start_updates=job.start_updates,
        policy_bytes=checkpoints.content(session, checkpoint.id),
        state_bytes=state_bytes,
        behaviour_bytes=_held_content(session, job),
        rival=_rival(session, job.policy_id),
    )


def _rival(session: Session, policy_id: str | None) -> Rival | None:
    assert policy_id is not None, "the table has a constraint for this"
    best = checkpoints.best(session, policy_id)
    if best is None or best.selection is None:
        return None
    policy_bytes = checkpoints.content(session, best.id)
    return Rival(best.updates, best.selection["mean_return"], policy_bytes, best.evaluation is not None)


def _claimed_check(session: Session, job: Job) -> Claim:
    spec = {name: value for name, value in _whole_spec(session, job).items() if name != "checkpoint_id"}
    return Claim(
        job_id=job.id,
        token=job.token,
        attempt=job.attempt,
        spec=spec,
        updates=job.start_updates,
        start_updates=job.start_updates,
        policy_bytes=_held_content(session, job),
        state_bytes=None,
        kind="gradient_check",
    )


def _whole_spec(session: Session, job: Job) -> dict[str, Any]:
    environment = session.scalar(select(Environment.spec).where(Environment.id == job.environment_id))
    return job.spec | {"environment": environment}


def _held_content(session: Session, job: Job) -> bytes | None:
    return None if job.checkpoint_id is None else checkpoints.content(session, job.checkpoint_id)


def renew(session: Session, job_id: str, token: int, lease_seconds: float) -> bool:
    """Hold the job for so many seconds from now; False if it is held no more."""
    result = session.execute(
        update(Job)
        .where(Job.id == job_id, Job.token == token, Job.status.in_(HELD_STATUSES))
        .values(lease_expires_at=now(lease_seconds))
        .execution_options(synchronize_session=False)
    )
    return isinstance(result, CursorResult) and result.rowcount == 1


def report(
    session: Session, job_id: str, token: int, report: Report, number: int | None = None
) -> Literal["continue", "cancel"]:
    """Write down what happened, and learn what to do.

    Args:
        session: A writing transaction.
        job_id: The job.
        token: What the claim gave.
        report: What happened.
        number: Of this write among the holder's, from 1 and rising, the same when it is repeated, which then changes
            nothing; None for one that is never repeated. The same is true of `finish`, `release` and `lose`.

    Raises:
        LeaseLost: if the job is not held with this token.
    """
    job = _unless_known(session, job_id, token, number)
    if job is None:
        job = _held(session, job_id, token)
    else:
        _record(session, job, report, _clock(session))
        session.flush()
    return "cancel" if job.status == "cancelling" else "continue"


def finish(session: Session, job_id: str, token: int, outcome: Outcome, number: int | None = None) -> None:
    """Write the end of a job: last checkpoint, result and terminal event, all or nothing.

    Raises:
        LeaseLost: if the job is not held with this token.
    """
    job = _unless_known(session, job_id, token, number)
    if job is None:
        return
    instant = _clock(session)
    if outcome.report is not None:
        _record(session, job, outcome.report, instant)
    if outcome.status == "succeeded":
        job.result = history.finite(outcome.result or {})
        if job.kind == "training" and job.policy_id is not None:
            job.result = {**(job.result or {}), "checkpoint_id": checkpoints.latest(session, job.policy_id).id}
        job.fraction = 1.0
    if outcome.failure is not None:
        job.failure = {"code": outcome.failure.code, "message": outcome.failure.message}
    _move(session, job, outcome.status, instant)
    session.flush()


def release(
    session: Session, job_id: str, token: int, reason: str, report: Report | None = None, number: int | None = None
) -> None:
    """Give a job back in order: it is queued again at its old place, and another worker goes on with the attempt.

    Raises:
        LeaseLost: if the job is not held with this token.
    """
    job = _unless_known(session, job_id, token, number)
    if job is None:
        return
    instant = _clock(session)
    if report is not None:
        _record(session, job, report, instant)
    _move(session, job, _WITHOUT_HOLDER[job.status], instant, reason)
    session.flush()


def lose(session: Session, job_id: str, token: int, reason: str, number: int | None = None) -> None:
    """Say that what computed the job has crashed: it is queued for its next attempt, or fails with `worker_lost`.

    Raises:
        LeaseLost: if the job is not held with this token.
    """
    job = _unless_known(session, job_id, token, number)
    if job is not None:
        _lose(session, job, reason)


def reap(session: Session) -> int:
    """Take expired leases, by the database's clock, from workers that are not heard of; returns how many.

    Every process of the server calls it now and then, so that a queue heals as long as anything is alive.
    """
    jobs = session.scalars(select(Job).where(*_expired()).order_by(Job.id).with_for_update(skip_locked=True)).all()
    for job in jobs:
        _lose(session, job, "the worker was not heard of within its lease")
    return len(jobs)


# --- the row, its lock and its states --------------------------------------------------------------------------------


def _clock(session: Session) -> datetime:
    """The database's time; read after a lock was waited for, never before."""
    instant: datetime | None = session.scalar(select(now()))
    assert instant is not None
    return instant


def _of_kind(job: Job | None, kind: JobKind | None) -> Job:
    if job is None or (kind is not None and job.kind != kind):
        raise NotFound(f"There is no {_NAMES[kind]} with this id.")
    return job


def _locked(session: Session, job_id: str, kind: JobKind | None) -> Job:
    job = session.scalar(
        select(Job).where(Job.id == job_id).with_for_update().execution_options(populate_existing=True)
    )
    return _of_kind(job, kind)


def _held(session: Session, job_id: str, token: int) -> Job:
    job = _of_token(session, job_id, token)
    if job is None or job.status not in HELD_STATUSES:
        raise LeaseLost(f"{job_id} is not held with token {token}")
    return job


def _of_token(session: Session, job_id: str, token: int) -> Job | None:
    """The job while nobody has claimed it after the holder of this token, held or not."""
    return session.scalar(
        select(Job)
        .where(Job.id == job_id, Job.token == token)
        .with_for_update()
        .execution_options(populate_existing=True)
    )


def _unless_known(session: Session, job_id: str, token: int, number: int | None) -> Job | None:
    """The job to write to; None if the write with this number has been committed already."""
    if number is None:
        return _held(session, job_id, token)
    job = _of_token(session, job_id, token)
    if job is not None and number <= job.reported:
        return None
    job = _held(session, job_id, token)
    job.reported = number
    return job


def _expired() -> tuple[Any, ...]:
    return Job.status.in_(HELD_STATUSES), Job.lease_expires_at < now()


def _live_leases(session: Session) -> int:
    held = (Job.status.in_(HELD_STATUSES), Job.lease_expires_at >= now())
    return session.scalar(select(func.count()).select_from(Job).where(*held)) or 0


def _move(session: Session, job: Job, status: str, instant: datetime, reason: str | None = None) -> None:
    if status not in _NEXT[job.status]:
        raise ValueError(f"a job cannot go from {job.status} to {status}")
    job.status = status
    if status not in HELD_STATUSES:
        job.worker = job.lease_expires_at = None
    if status in TERMINAL_STATUSES:
        job.finished_at = instant
        job.checkpoint_id = None
    history.emit(session, job, "status", _status_data(job, reason), instant)


def _lose(session: Session, job: Job, reason: str) -> None:
    instant = _clock(session)
    status = _WITHOUT_HOLDER[job.status]
    if status != "cancelled" and job.attempt >= job.max_attempts:
        job.failure = {"code": "worker_lost", "message": f"the last of {job.max_attempts} attempts was lost: {reason}"}
        status = "failed"
    elif status != "cancelled":
        job.attempt += 1
    _move(session, job, status, instant, reason)
    session.flush()


# --- what is written down --------------------------------------------------------------------------------------------


def _status_data(job: Job, reason: str | None = None) -> dict[str, Any]:
    data = {
        "status": job.status,
        "is_terminal": job.status in TERMINAL_STATUSES,
        "attempt": job.attempt,
        "reason": reason,
        "failure": job.failure,
        "result": without_arrays(job.result),
    }
    return {name: value for name, value in data.items() if value is not None}


def _record(session: Session, job: Job, report: Report, instant: datetime) -> None:
    if report.fingerprint is not None:
        _compare_fingerprint(session, job, report.fingerprint, instant)
    if report.progress is not None:
        _set_progress(job, report.progress)
        job.last_progress_at = instant
    if report.metrics:
        history.record(session, job, report.metrics, instant)
    if report.checkpoint is not None:
        _record_checkpoint(session, job, report.checkpoint, instant)
        # with a checkpoint, because counting at every report would cost more than writing it
        history.thin(session, job.id)
    if report.evaluated is not None and job.policy_id is not None:
        told = history.finite(report.evaluated.evaluation)
        of = report.evaluated
        checkpoint = checkpoints.evaluate(session, job.policy_id, of.updates, of.sha256, told)
        if checkpoint is not None:
            _emit_evaluation(session, job, checkpoint, instant, "report", told)


def _set_progress(job: Job, progress: Progress) -> None:
    job.updates, job.env_steps, job.episodes = progress.updates, progress.env_steps, progress.episodes
    job.fraction = min(1.0, max(0.0, progress.fraction))


def _compare_fingerprint(session: Session, job: Job, fingerprint: dict[str, str | int], instant: datetime) -> None:
    before = job.fingerprint
    job.fingerprint = dict(fingerprint)
    if before is not None and before != fingerprint:
        changed = sorted(name for name in {*before, *fingerprint} if before.get(name) != fingerprint.get(name))
        message = "the job goes on in another runtime; its last bits may differ from those of an undisturbed run"
        history.emit(session, job, "log", {"code": "runtime_changed", "message": message, "changed": changed}, instant)


def _record_checkpoint(session: Session, job: Job, snapshot: Snapshot, instant: datetime) -> None:
    assert job.policy_id is not None, "only a training has checkpoints"
    selection = None if snapshot.selection is None else history.finite(snapshot.selection)
    evaluation = None if snapshot.evaluation is None else history.finite(snapshot.evaluation)
    checkpoint = checkpoints.put(
        session,
        job.policy_id,
        snapshot.updates,
        snapshot.policy_bytes,
        job_id=job.id,
        state_bytes=snapshot.state_bytes,
        selection=selection,
        evaluation=evaluation,
    )
    named = {"checkpoint_id": checkpoint.id, "updates": snapshot.updates}
    progress = snapshot.progress
    counted = {
        "updates": progress.updates,
        "env_steps": progress.env_steps,
        "episodes": progress.episodes,
        "fraction": progress.fraction,
    }
    written = history.last_checkpoint(session, job)
    if written is None or written["checkpoint_id"] != checkpoint.id:
        # an evaluation of a checkpoint that is known already is no other checkpoint
        history.emit(session, job, "checkpoint", {**named, "progress": counted}, instant)
    if selection is not None:
        _emit_evaluation(session, job, checkpoint, instant, "selection", selection)
    if evaluation is not None:
        _emit_evaluation(session, job, checkpoint, instant, "report", evaluation)


def _emit_evaluation(
    session: Session,
    job: Job,
    checkpoint: Checkpoint,
    instant: datetime,
    purpose: Literal["selection", "report"],
    told: dict[str, Any],
) -> None:
    """Says what episodes were played for, and keeps what decided something apart from what is reported."""
    data = {"checkpoint_id": checkpoint.id, "updates": checkpoint.updates, "purpose": purpose}
    data["selection" if purpose == "selection" else "evaluation"] = told
    history.emit(session, job, "evaluation", data, instant)


def _rewind(session: Session, job: Job, checkpoint: Checkpoint, instant: datetime) -> None:
    """Set everything back to the checkpoint from which the job goes on."""
    history.forget_beyond(session, job, checkpoint.updates)
    written = history.last_checkpoint(session, job)
    _set_progress(job, Progress() if written is None else Progress(**written["progress"]))
    history.emit(session, job, "rewind", {"to_update": checkpoint.updates}, instant)
