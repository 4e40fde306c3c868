"""All there is to know about jobs: their rows, their states, their events, their metrics, and who may write them.

The job table is the queue. A worker *claims* the oldest queued job and gets a fencing token; each write of a worker
carries it, so that one who has lost its lease without knowing can change nothing (`LeaseLost`).

    queued ── claim ──> running ── finish ──> succeeded | failed
      ^                    │
      ├── release, lose ───┤                      release: in order, the attempt goes on elsewhere
      │                    └─ request_cancel ─> cancelling ── finish, release, lose ──> cancelled
      └── request_cancel ──> cancelled            lose: a crash, attempt + 1, failed once max_attempts are used up

While a job is cancelling its holder's last writes are accepted: a job that succeeded or failed before the request
reached it ends as what it became, with everything it has computed.

Every event takes its number from the job's row, which the writing transaction has locked: the order of commits is the
order of `seq`, and a reader that asks for what follows the last number it has seen misses nothing.

All functions take a transaction (`Database.write()` where they write) and never end it.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, cast

from sqlalchemy import CursorResult, Table, func, select, update
from sqlalchemy import delete as delete_from
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from server.checkpoints import store as checkpoints
from server.database import now
from server.errors import NotCancellable, NotFound, NotTerminal, PolicyBusy
from server.ids import new_id
from server.jobs.reports import Claim, Measured, Outcome, Progress, Report, Snapshot
from server.metrics import JobFigures
from server.pages import PageQuery, Slice, fetch
from server.tables import EVENT_TYPES, JOB_STATUSES, TERMINAL_STATUSES, Checkpoint, Event, Job, Metric

__all__ = [
    "EVENT_TYPES",
    "HELD_STATUSES",
    "RECORDED_UPDATES",
    "TERMINAL_STATUSES",
    "Curves",
    "Head",
    "Job",
    "LeaseLost",
    "QueueReason",
    "any_expired",
    "any_queued",
    "claim",
    "create",
    "delete",
    "events",
    "figures",
    "finish",
    "get",
    "heads",
    "list_",
    "lose",
    "metrics",
    "queue_reason",
    "reap",
    "release",
    "renew",
    "report",
    "request_cancel",
]

HELD_STATUSES = ("running", "pausing", "cancelling")
"""The states in which a worker holds the job."""

RECORDED_UPDATES = 100_000
"""With more updates recorded than this, a job drops every second one of them."""

_NEXT = {
    "queued": {"running", "cancelled"},
    "running": {"queued", "pausing", "cancelling", "succeeded", "failed"},
    "pausing": {"paused", "cancelling", "succeeded", "failed"},
    "paused": {"queued", "cancelled"},
    "cancelling": {"cancelled", "succeeded", "failed"},
    **{status: set[str]() for status in TERMINAL_STATUSES},
}

_WITHOUT_HOLDER = {"running": "queued", "pausing": "paused", "cancelling": "cancelled"}
"""What a held job becomes when its holder is gone."""

assert _NEXT.keys() == set(JOB_STATUSES)


class LeaseLost(Exception):
    """The job is not held with this token any more, so nothing was written."""


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
class Curves:
    """Metrics in columns of equal length, one row for each kept update.

    Attributes:
        updates: Number of updates that the policy had had.
        env_steps: Environment steps of the job up to then.
        attempts: Attempt that measured it.
        values: Columns by metric; None where the value is missing or not finite.
        nonfinite: By metric, the updates in which it was not finite.
        recorded: How many updates are recorded in the range; more than rows if the curve was down-sampled.
    """

    updates: list[int]
    env_steps: list[int]
    attempts: list[int]
    values: dict[str, list[float | None]]
    nonfinite: dict[str, list[int]]
    recorded: int


@dataclass(frozen=True, slots=True)
class Head:
    """How far the events of a job are.

    Attributes:
        seq: Number of the newest event.
        is_terminal: Whether the job has ended, so that no other event will follow.
    """

    seq: int
    is_terminal: bool


# --- what clients do -------------------------------------------------------------------------------------------------


def create(
    session: Session,
    *,
    policy_id: str,
    environment_id: str,
    start_updates: int,
    spec: dict[str, Any],
    label: dict[str, Any],
    max_attempts: int,
    name: str | None = None,
    metadata: dict[str, Any] | None = None,
) -> Job:
    """Queue a training job.

    Args:
        session: A writing transaction.
        policy_id: What learns, from its latest checkpoint on.
        environment_id: What it learns in.
        start_updates: Updates that the policy has had.
        spec: Resolved training spec as JSON.
        label: What its gradient estimate is, as JSON.
        max_attempts: Crashes after which the job fails.
        name: For people.
        metadata: For clients.

    Raises:
        PolicyBusy: if another training job of the policy has not ended.
    """
    instant = _clock(session)
    job = Job(
        id=new_id("job"),
        kind="training",
        name=name,
        metadata_=metadata or {},
        policy_id=policy_id,
        environment_id=environment_id,
        spec=spec,
        label=label,
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
    session.add(job)
    try:
        session.flush()
    except IntegrityError as error:
        # the partial unique index is the only judge: looking first would leave a gap between two requests
        if "uq_job_policy_id_training_active" in str(error.orig) or "job.policy_id" in str(error.orig):
            raise PolicyBusy from error
        raise
    _emit(session, job, "status", _status_data(job), instant)
    session.flush()
    return job


def get(session: Session, job_id: str) -> Job:
    """The job.

    Raises:
        NotFound: if there is none with this id.
    """
    job = session.get(Job, job_id)
    if job is None:
        raise NotFound("There is no training job with this id.")
    return job


def list_(
    session: Session, query: PageQuery, *, statuses: Collection[str] = (), policy_id: str | None = None
) -> Slice[Job]:
    """One page of jobs, of all states if none is named."""
    statement = select(Job).where(Job.kind == "training")
    if statuses:
        statement = statement.where(Job.status.in_(statuses))
    if policy_id is not None:
        statement = statement.where(Job.policy_id == policy_id)
    return fetch(session, statement, Job.id, "job", query)


def request_cancel(session: Session, job_id: str) -> Job:
    """Ask for the end of a job. Repeating it changes nothing.

    A queued job is cancelled at once; a running one becomes cancelling, and its worker hears of it with the answer to
    its next report.

    Raises:
        NotFound: if there is none with this id.
        NotCancellable: if it has succeeded or failed.
    """
    job = _locked(session, job_id)
    if job.status in ("cancelling", "cancelled"):
        return job
    if job.status in TERMINAL_STATUSES:
        raise NotCancellable(f"The job has already {job.status}.")
    instant = _clock(session)
    job.cancel_requested_at = instant
    _move(session, job, "cancelling" if job.status in HELD_STATUSES else "cancelled", instant, "cancel requested")
    session.flush()
    return job


def delete(session: Session, job_id: str) -> None:
    """Remove an ended job with its events and metrics. Checkpoints belong to the policy and stay.

    Raises:
        NotFound: if there is none with this id.
        NotTerminal: if it has not ended.
    """
    job = _locked(session, job_id)
    if job.status not in TERMINAL_STATUSES:
        raise NotTerminal(f"The job is {job.status}; cancel it first.")
    # a plain statement: the foreign keys remove events and metrics and let checkpoints go
    session.execute(delete_from(Job).where(Job.id == job_id))
    session.expunge(job)


def queue_reason(session: Session, job: Job) -> QueueReason | None:
    """Why the job waits, or None if it is not queued."""
    if job.status != "queued":
        return None
    older = (Job.queued_at < job.queued_at) | ((Job.queued_at == job.queued_at) & (Job.id < job.id))
    ahead = session.scalar(select(func.count()).select_from(Job).where(Job.status == "queued", older)) or 0
    if ahead:
        return QueueReason("behind", f"{ahead} queued job{'s are' if ahead > 1 else ' is'} older", ahead)
    busy = _live_leases(session)
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


# --- what clients read -----------------------------------------------------------------------------------------------


def events(session: Session, job_id: str, after: int = 0, limit: int = 200) -> list[dict[str, Any]]:
    """The events that follow a number, oldest first, as they are published; none of an unknown job.

    A metrics event names a range of updates and is joined with what is recorded of them now: where a later attempt
    has repeated an update its values are shown, and what the job has thinned out is missing.
    """
    rows = session.scalars(
        select(Event).where(Event.job_id == job_id, Event.seq > after).order_by(Event.seq).limit(limit)
    ).all()
    ranges = [(row.data["from_update"], row.data["to_update"]) for row in rows if row.type == "metrics"]
    measured = _measured(session, job_id, ranges)
    return [_public_event(row, measured) for row in rows]


def heads(session: Session, job_ids: Sequence[str]) -> dict[str, Head]:
    """How far the events of each of these jobs are; jobs that do not exist are missing."""
    rows = session.execute(select(Job.id, Job.next_seq, Job.status).where(Job.id.in_(job_ids)))
    return {job_id: Head(next_seq - 1, status in TERMINAL_STATUSES) for job_id, next_seq, status in rows}


def metrics(
    session: Session,
    job_id: str,
    keys: Sequence[str] | None = None,
    from_update: int = 0,
    max_points: int = 1000,
) -> Curves:
    """Metrics of a job in columns, down-sampled to about so many rows.

    All curves share their rows, so that they can be drawn over one axis and written as one table. When there are more
    updates than `max_points`, they are cut into buckets of equal size; of each bucket those rows stay in which one of
    the curves has its minimum or maximum, and the first and the last row stay too. So no peak is lost, the number of
    rows is at most `max_points`, but never less than two for each curve, and fewer curves are drawn in finer buckets.

    Args:
        session: A transaction.
        job_id: The job.
        keys: Which metrics; None means all that were recorded.
        from_update: First update of the range.
        max_points: Most rows.
    """
    rows = session.execute(
        select(Metric.update, Metric.env_steps, Metric.attempt, Metric.values, Metric.nonfinite)
        .where(Metric.job_id == job_id, Metric.update >= from_update)
        .order_by(Metric.update)
    ).all()
    names = list(dict.fromkeys(keys if keys is not None else (name for row in rows for name in row[3])))
    kept = [rows[i] for i in _peaks([row[3] for row in rows], names, max_points)]
    return Curves(
        updates=[row[0] for row in kept],
        env_steps=[row[1] for row in kept],
        attempts=[row[2] for row in kept],
        values={name: [row[3].get(name) for row in kept] for name in names},
        nonfinite={name: found for name in names if (found := [row[0] for row in kept if name in (row[4] or ())])},
        recorded=len(rows),
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

    A job goes on from the newest checkpoint that it has written itself, with the state that makes the rest of it equal
    to the bit. Where that takes it back, an event `rewind` says so, and what was recorded beyond is removed.

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
    job.worker = worker
    job.lease_expires_at = instant + timedelta(seconds=lease_seconds)
    job.started_at = job.started_at or instant
    _move(session, job, "running", instant)
    checkpoint = checkpoints.latest(session, job.policy_id)
    state_bytes = checkpoints.state(session, checkpoint.id) if checkpoint.job_id == job.id else None
    if state_bytes is not None or job.attempt > 1:
        _rewind(session, job, checkpoint, instant)
    session.flush()
    return Claim(
        job_id=job.id,
        token=job.token,
        attempt=job.attempt,
        spec=job.spec,
        updates=checkpoint.updates,
        start_updates=job.start_updates,
        policy_bytes=checkpoints.content(session, checkpoint.id),
        state_bytes=state_bytes,
    )


def renew(session: Session, job_id: str, token: int, lease_seconds: float) -> bool:
    """Hold the job for so many seconds from now; False if it is held no more."""
    result = session.execute(
        update(Job)
        .where(Job.id == job_id, Job.token == token, Job.status.in_(HELD_STATUSES))
        .values(lease_expires_at=now(lease_seconds))
        .execution_options(synchronize_session=False)
    )
    return isinstance(result, CursorResult) and result.rowcount == 1


def report(session: Session, job_id: str, token: int, report: Report) -> Literal["continue", "cancel"]:
    """Write down what happened, and learn what to do.

    Raises:
        LeaseLost: if the job is not held with this token.
    """
    job = _held(session, job_id, token)
    _record(session, job, report, _clock(session))
    session.flush()
    return "cancel" if job.status == "cancelling" else "continue"


def finish(session: Session, job_id: str, token: int, outcome: Outcome) -> None:
    """Write the end of a job: last checkpoint, result and terminal event, all or nothing.

    Raises:
        LeaseLost: if the job is not held with this token.
    """
    job = _held(session, job_id, token)
    instant = _clock(session)
    if outcome.report is not None:
        _record(session, job, outcome.report, instant)
    if outcome.status == "succeeded":
        checkpoint_id = checkpoints.latest(session, job.policy_id).id
        job.result = {**_finite(outcome.result or {}), "checkpoint_id": checkpoint_id}
        job.fraction = 1.0
    if outcome.failure is not None:
        job.failure = {"code": outcome.failure.code, "message": outcome.failure.message}
    _move(session, job, outcome.status, instant)
    session.flush()


def release(session: Session, job_id: str, token: int, reason: str, report: Report | None = None) -> None:
    """Give a job back in order: it is queued again at its old place, and another worker goes on with the attempt.

    Raises:
        LeaseLost: if the job is not held with this token.
    """
    job = _held(session, job_id, token)
    instant = _clock(session)
    if report is not None:
        _record(session, job, report, instant)
    _move(session, job, _WITHOUT_HOLDER[job.status], instant, reason)
    session.flush()


def lose(session: Session, job_id: str, token: int, reason: str) -> None:
    """Say that what computed the job has crashed: it is queued for its next attempt, or fails with `worker_lost`.

    Raises:
        LeaseLost: if the job is not held with this token.
    """
    _lose(session, _held(session, job_id, token), reason)


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


def _locked(session: Session, job_id: str) -> Job:
    job = session.scalar(
        select(Job).where(Job.id == job_id).with_for_update().execution_options(populate_existing=True)
    )
    if job is None:
        raise NotFound("There is no training job with this id.")
    return job


def _held(session: Session, job_id: str, token: int) -> Job:
    job = session.scalar(
        select(Job)
        .where(Job.id == job_id, Job.token == token, Job.status.in_(HELD_STATUSES))
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    if job is None:
        raise LeaseLost(f"{job_id} is not held with token {token}")
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
    _emit(session, job, "status", _status_data(job, reason), instant)


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


# --- events and metrics ----------------------------------------------------------------------------------------------


def _emit(session: Session, job: Job, type_: str, data: dict[str, Any], instant: datetime) -> None:
    seq, job.next_seq = job.next_seq, job.next_seq + 1
    session.add(Event(job_id=job.id, seq=seq, type=type_, attempt=job.attempt, data=data, created_at=instant))


def _status_data(job: Job, reason: str | None = None) -> dict[str, Any]:
    data = {
        "status": job.status,
        "is_terminal": job.status in TERMINAL_STATUSES,
        "attempt": job.attempt,
        "reason": reason,
        "failure": job.failure,
        "result": job.result,
    }
    return {name: value for name, value in data.items() if value is not None}


def _record(session: Session, job: Job, report: Report, instant: datetime) -> None:
    if report.fingerprint is not None:
        _compare_fingerprint(session, job, report.fingerprint, instant)
    if report.progress is not None:
        _set_progress(job, report.progress)
        job.last_progress_at = instant
    if report.metrics:
        _upsert(session, job, report.metrics)
        covered = {"from_update": report.metrics[0].update, "to_update": report.metrics[-1].update}
        _emit(session, job, "metrics", covered, instant)
    if report.checkpoint is not None:
        _record_checkpoint(session, job, report.checkpoint, instant)
        # with a checkpoint, because counting at every report would cost more than writing it
        _thin(session, job.id)


def _set_progress(job: Job, progress: Progress) -> None:
    job.updates, job.env_steps, job.episodes = progress.updates, progress.env_steps, progress.episodes
    job.fraction = min(1.0, max(0.0, progress.fraction))


def _compare_fingerprint(session: Session, job: Job, fingerprint: dict[str, str | int], instant: datetime) -> None:
    before = job.fingerprint
    job.fingerprint = dict(fingerprint)
    if before is not None and before != fingerprint:
        changed = sorted(name for name in {*before, *fingerprint} if before.get(name) != fingerprint.get(name))
        message = "the job goes on in another runtime; its last bits may differ from those of an undisturbed run"
        _emit(session, job, "log", {"code": "runtime_changed", "message": message, "changed": changed}, instant)


def _record_checkpoint(session: Session, job: Job, snapshot: Snapshot, instant: datetime) -> None:
    evaluation = None if snapshot.evaluation is None else _finite(snapshot.evaluation)
    checkpoint = checkpoints.put(
        session,
        job.policy_id,
        snapshot.updates,
        snapshot.policy_bytes,
        job_id=job.id,
        state_bytes=snapshot.state_bytes,
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
    written = _last_checkpoint(session, job)
    if written is None or written["checkpoint_id"] != checkpoint.id:
        # an evaluation of a checkpoint that is known already is no other checkpoint
        _emit(session, job, "checkpoint", {**named, "progress": counted}, instant)
    if evaluation is not None:
        _emit(session, job, "evaluation", {**named, "evaluation": evaluation}, instant)


def _rewind(session: Session, job: Job, checkpoint: Checkpoint, instant: datetime) -> None:
    """Set everything back to the checkpoint from which the job goes on."""
    session.execute(delete_from(Metric).where(Metric.job_id == job.id, Metric.update > checkpoint.updates))
    written = _last_checkpoint(session, job)
    _set_progress(job, Progress() if written is None else Progress(**written["progress"]))
    _emit(session, job, "rewind", {"to_update": checkpoint.updates}, instant)


def _last_checkpoint(session: Session, job: Job) -> dict[str, Any] | None:
    """What the job's newest checkpoint event says."""
    data: dict[str, Any] | None = session.scalar(
        select(Event.data).where(Event.job_id == job.id, Event.type == "checkpoint").order_by(Event.seq.desc()).limit(1)
    )
    return data


def _upsert(session: Session, job: Job, measured: Iterable[Measured]) -> None:
    insert = sqlite.insert if session.get_bind().dialect.name == "sqlite" else postgresql.insert
    statement = insert(cast(Table, Metric.__table__))
    repeated = ("attempt", "env_steps", "values", "nonfinite")
    statement = statement.on_conflict_do_update(
        index_elements=["job_id", "update"], set_={name: statement.excluded[name] for name in repeated}
    )
    session.execute(statement, [_metric_row(job, each) for each in measured])


def _metric_row(job: Job, measured: Measured) -> dict[str, Any]:
    nonfinite = [name for name, value in measured.values.items() if not math.isfinite(value)]
    return {
        "job_id": job.id,
        "update": measured.update,
        "attempt": job.attempt,
        "env_steps": measured.env_steps,
        "values": _finite(measured.values),
        "nonfinite": nonfinite or None,
    }


def _finite(value: Any) -> Any:
    """The same JSON with null where a number is infinite or not a number."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value


def _thin(session: Session, job_id: str) -> None:
    """Drop every second recorded update once there are too many; the newest stays.

    What is left counts half, so the history gets sparser the older it is, and the job's rows stay bounded.
    """
    recorded = session.scalar(select(func.count()).select_from(Metric).where(Metric.job_id == job_id)) or 0
    if recorded <= RECORDED_UPDATES:
        return
    numbered = select(
        Metric.update.label("number"), func.row_number().over(order_by=Metric.update.desc()).label("place")
    ).where(Metric.job_id == job_id)
    places = numbered.subquery()
    second = select(places.c.number).where(places.c.place % 2 == 0)
    session.execute(
        delete_from(Metric)
        .where(Metric.job_id == job_id, Metric.update.in_(second))
        .execution_options(synchronize_session=False)
    )


def _measured(session: Session, job_id: str, ranges: list[tuple[int, int]]) -> dict[int, dict[str, Any]]:
    """Recorded updates within the ranges, by number, as they are published."""
    if not ranges:
        return {}
    lowest, highest = min(low for low, _ in ranges), max(high for _, high in ranges)
    rows = session.execute(
        select(Metric.update, Metric.values, Metric.nonfinite)
        .where(Metric.job_id == job_id, Metric.update >= lowest, Metric.update <= highest)
        .order_by(Metric.update)
    )
    return {number: {"update": number, **values, "nonfinite": nonfinite or []} for number, values, nonfinite in rows}


def _public_event(row: Event, measured: dict[int, dict[str, Any]]) -> dict[str, Any]:
    data = row.data
    if row.type == "metrics":
        covered = range(data["from_update"], data["to_update"] + 1)
        data = {**data, "metrics": [measured[number] for number in covered if number in measured]}
    return {
        "object": "event",
        "job_id": row.job_id,
        "seq": row.seq,
        "type": row.type,
        "attempt": row.attempt,
        "created_at": row.created_at,
        "data": data,
    }


def _peaks(values: list[dict[str, Any]], names: list[str], max_points: int) -> list[int]:
    """Indices of the rows that stay, in order."""
    count = len(values)
    if count <= max_points:
        return list(range(count))
    # two rows of each bucket for each curve, and the two ends
    buckets = max(1, (max_points - 2) // (2 * max(1, len(names))))
    kept = {0, count - 1}
    for bucket in range(buckets):
        inside = range(bucket * count // buckets, (bucket + 1) * count // buckets)
        for name in names:
            known = [(value, i) for i in inside if (value := values[i].get(name)) is not None]
            if known:
                kept |= {min(known)[1], max(known)[1]}
    return sorted(kept)
