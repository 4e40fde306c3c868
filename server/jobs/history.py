"""What a job has reported, and how it is read: its events, and its metrics by update.

Every event takes its number from the job's row, which the writing transaction has locked: the order of commits is the
order of `seq`, and a reader that asks for what follows the last number it has seen misses nothing. A metrics event
names a range of updates and is joined with their rows when it is read.

Written by `store` alone, within its transactions; read by streams and routes.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

from sqlalchemy import Table, func, select
from sqlalchemy import delete as delete_from
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from server.jobs.reports import JobKind, Measured
from server.tables import EVENT_TYPES, TERMINAL_STATUSES, Event, Job, Metric

__all__ = [
    "EVENT_TYPES",
    "IN_EVERY_ROW",
    "METRICS",
    "RECORDED_UPDATES",
    "Curves",
    "Head",
    "emit",
    "events",
    "finite",
    "forget_beyond",
    "heads",
    "last_checkpoint",
    "metrics",
    "names",
    "record",
    "thin",
]

RECORDED_UPDATES = 100_000
"""With more updates recorded than this, a job drops every second one of them."""


METRICS = (
    "mean_return",
    "return_deviation",
    "mean_length",
    "truncated_fraction",
    "entropy",
    "gradient_norm",
    "episodes",
    "rollout_seconds",
    "update_seconds",
    "env_steps_per_second",
    "learning_rate",
    "return_low",
    "return_high",
    "gradient_squared_norm",
    "gradient_noise",
    "signal_to_noise",
    "effective_sample_size",
    "saturated_fraction",
    "exact_return",
    "exact_gradient_norm",
)
"""What the engine measures, beside what stands in every row; not all of it of each update, or of each kind of job."""

IN_EVERY_ROW = ("update", "env_steps", "attempt")
"""Columns of the row itself; what the engine measures under these names is the same number, and is left out."""


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


# --- reading ---------------------------------------------------------------------------------------------------------


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


def heads(session: Session, job_ids: Sequence[str], kind: JobKind | None = None) -> dict[str, Head]:
    """How far the events of each of these jobs are; jobs that do not exist, or are of another kind, are missing."""
    statement = select(Job.id, Job.next_seq, Job.status).where(Job.id.in_(job_ids))
    rows = session.execute(statement if kind is None else statement.where(Job.kind == kind))
    return {job_id: Head(next_seq - 1, status in TERMINAL_STATUSES) for job_id, next_seq, status in rows}


def metrics(
    session: Session,
    job_id: str,
    keys: Sequence[str] | None = None,
    from_update: int = 0,
    max_points: int = 1000,
) -> Curves:
    """Metrics of a job in columns, down-sampled to so many rows.

    All curves share their rows, so that they can be drawn over one axis and written as one table. When there are more
    updates than `max_points`, they are cut into buckets of equal size; of each bucket those rows stay in which one of
    the curves has its minimum or maximum, and the first and the last row stay too. So no peak is lost, and fewer curves
    are drawn in finer buckets. Where `max_points` has no room for two rows of each curve and the two ends, rows at even
    distances stay.

    Args:
        session: A transaction.
        job_id: The job.
        keys: Which metrics; None means all that were recorded. Those in every row are no curves of their own.
        from_update: First update of the range.
        max_points: Most rows, at least 2.
    """
    rows = session.execute(
        select(Metric.update, Metric.env_steps, Metric.attempt, Metric.values, Metric.nonfinite)
        .where(Metric.job_id == job_id, Metric.update >= from_update)
        .order_by(Metric.update)
    ).all()
    wanted = dict.fromkeys(keys if keys is not None else (name for row in rows for name in row[3]))
    curves = [name for name in wanted if name not in IN_EVERY_ROW]
    kept = [rows[i] for i in _peaks([row[3] for row in rows], curves, max_points)]
    return Curves(
        updates=[row[0] for row in kept],
        env_steps=[row[1] for row in kept],
        attempts=[row[2] for row in kept],
        values={name: [row[3].get(name) for row in kept] for name in curves},
        nonfinite={name: found for name in curves if (found := [row[0] for row in kept if name in (row[4] or ())])},
        recorded=len(rows),
    )


def names(session: Session, job_id: str) -> list[str]:
    """Names by which a job's metrics can be asked for: all that the engine may measure, and what this job has.

    What an update lacks is null there; diagnostics are not taken of each one.
    """
    newest: dict[str, Any] | None = session.scalar(
        select(Metric.values).where(Metric.job_id == job_id).order_by(Metric.update.desc()).limit(1)
    )
    return list(dict.fromkeys((*IN_EVERY_ROW, *METRICS, *(newest or ()))))


def last_checkpoint(session: Session, job: Job) -> dict[str, Any] | None:
    """What the job's newest checkpoint event says."""
    data: dict[str, Any] | None = session.scalar(
        select(Event.data).where(Event.job_id == job.id, Event.type == "checkpoint").order_by(Event.seq.desc()).limit(1)
    )
    return data


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


def _peaks(values: list[dict[str, Any]], curves: list[str], max_points: int) -> list[int]:
    """Indices of the rows that stay, in order."""
    count = len(values)
    if count <= max_points:
        return list(range(count))
    # two rows of each bucket for each curve, and the two ends
    buckets = (max_points - 2) // (2 * len(curves)) if curves else 0
    if buckets == 0:
        return [i * (count - 1) // (max_points - 1) for i in range(max_points)]
    kept = {0, count - 1}
    for bucket in range(buckets):
        inside = range(bucket * count // buckets, (bucket + 1) * count // buckets)
        for name in curves:
            known = [(value, i) for i in inside if (value := values[i].get(name)) is not None]
            if known:
                kept |= {min(known)[1], max(known)[1]}
    return sorted(kept)


# --- writing ---------------------------------------------------------------------------------------------------------


def emit(session: Session, job: Job, type_: str, data: dict[str, Any], instant: datetime) -> None:
    """Write an event down, with the next number of its job."""
    seq, job.next_seq = job.next_seq, job.next_seq + 1
    session.add(Event(job_id=job.id, seq=seq, type=type_, attempt=job.attempt, data=data, created_at=instant))


def record(session: Session, job: Job, measured: Sequence[Measured], instant: datetime) -> None:
    """Write metrics down, over those of an earlier attempt, and the event that names them."""
    _upsert(session, job, measured)
    emit(session, job, "metrics", {"from_update": measured[0].update, "to_update": measured[-1].update}, instant)


def forget_beyond(session: Session, job: Job, updates: int) -> None:
    """Remove the metrics of updates that are going to be repeated."""
    session.execute(delete_from(Metric).where(Metric.job_id == job.id, Metric.update > updates))


def thin(session: Session, job_id: str) -> None:
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
        "values": finite(measured.values),
        "nonfinite": nonfinite or None,
    }


def finite(value: Any) -> Any:
    """The same JSON with null where a number is infinite or not a number."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return value
