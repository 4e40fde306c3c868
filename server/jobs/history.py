"""What a job has reported, and how it is read: its events, and its metrics by update.

Every event takes its number from the job's row, which the writing transaction has locked: the order of commits is the
order of `seq`, and a reader that asks for what follows the last number it has seen misses nothing. A metrics event
names a range of updates and is joined with what is recorded of them when it is read.

The newest updates are rows. When there are enough, they are packed into a block in columns (`blocks`), which takes a
quarter of the room and is read without parsing each update: a curve over 50,000 updates costs little more than its
points.

Written by `store` alone, within its transactions; read by streams and routes.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

import numpy as np
from sqlalchemy import ColumnElement, Select, Table, func, insert, select
from sqlalchemy import delete as delete_from
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from server.jobs.blocks import Columns, peaks
from server.jobs.reports import JobKind, Measured
from server.tables import EVENT_TYPES, TERMINAL_STATUSES, Event, Job, Metric, MetricBlock

__all__ = [
    "BLOCK",
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
    "recorded",
    "thin",
]

RECORDED_UPDATES = 100_000
"""With more updates recorded than this, a job drops every second one of them."""

BLOCK = 256
"""Updates of a block. Fewer than two blocks of the newest updates are rows."""

EVENT_UPDATES = 1000
"""Most updates that one event names: after a pause of the database a report may bring very many."""

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


def events(
    session: Session, job_id: str, after: int = 0, limit: int = 200, most_updates: int | None = None
) -> list[dict[str, Any]]:
    """The events that follow a number, oldest first, as they are published; none of an unknown job.

    A metrics event names a range of updates and is joined with what is recorded of them now: where a later attempt
    has repeated an update its values are shown, and what the job has thinned out is missing.

    Args:
        session: A transaction.
        job_id: The job.
        after: Number of the event before the first one.
        limit: Most events.
        most_updates: Updates from which on no further event is taken: a quick job names thousands of them in one event.
    """
    rows = session.scalars(
        select(Event).where(Event.job_id == job_id, Event.seq > after).order_by(Event.seq).limit(limit)
    ).all()
    ranges, named = [], 0
    for place, row in enumerate(rows):
        if row.type == "metrics":
            ranges.append((row.data["from_update"], row.data["to_update"]))
            named += 1 + row.data["to_update"] - row.data["from_update"]
        if most_updates is not None and named >= most_updates:
            rows = rows[: place + 1]
            break
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
    recorded = _recorded(session, job_id, from_update)
    wanted = dict.fromkeys(recorded.names if keys is None else keys)
    curves = [name for name in wanted if name not in IN_EVERY_ROW]
    kept = recorded.taken(peaks(recorded.named(curves), max_points))
    return Curves(
        updates=kept.numbers[0].tolist(),
        env_steps=kept.numbers[1].tolist(),
        attempts=kept.numbers[2].tolist(),
        values={
            name: [value if math.isfinite(value) else None for value in column]
            for name, column in zip(curves, kept.named(curves).tolist(), strict=True)
        },
        nonfinite={name: kept.nonfinite[name] for name in curves if name in kept.nonfinite},
        recorded=len(recorded),
    )


def names(session: Session, job_id: str) -> list[str]:
    """Names by which a job's metrics can be asked for: all that the engine may measure, and what this job has.

    What an update lacks is null there; diagnostics are not taken of each one.
    """
    newest: dict[str, Any] | None = session.scalar(
        select(Metric.values).where(Metric.job_id == job_id).order_by(Metric.update.desc()).limit(1)
    )
    # a job whose newest updates are all packed has no rows
    packed = None if newest is not None else session.scalar(_blocks(job_id).order_by(MetricBlock.last_update.desc()))
    measured = newest or (() if packed is None else Columns.from_bytes(packed).names)
    return list(dict.fromkeys((*IN_EVERY_ROW, *METRICS, *measured)))


def recorded(session: Session, job_id: str, first: int, last: int) -> dict[int, dict[str, float | None]]:
    """What was measured of a range of updates, by update and metric; None where it was not finite."""
    found = _recorded(session, job_id, first, last).published()
    return {
        number: {name: value for name, value in measured.items() if name not in ("update", "nonfinite")}
        for number, measured in found.items()
    }


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
    return _recorded(session, job_id, lowest, highest).published()


def _recorded(session: Session, job_id: str, first: int, last: int | None = None) -> Columns:
    """All that is recorded of a range of updates, in order."""
    within = [Metric.job_id == job_id, Metric.update >= first]
    blocks = _blocks(job_id).where(MetricBlock.last_update >= first).order_by(MetricBlock.first_update)
    if last is not None:
        within.append(Metric.update <= last)
        blocks = blocks.where(MetricBlock.first_update <= last)
    packed = [Columns.from_bytes(content) for content in session.scalars(blocks)]
    found = Columns.joined([*packed, _loose(session, *within)])
    updates = found.updates
    inside = (updates >= first) if last is None else (updates >= first) & (updates <= last)
    return found if inside.all() else found.taken(inside)


def _blocks(job_id: str) -> Select[bytes]:
    return select(MetricBlock.content).where(MetricBlock.job_id == job_id)


def _loose(session: Session, *which: ColumnElement[bool]) -> Columns:
    """Updates that are rows, in order."""
    columns = (Metric.update, Metric.env_steps, Metric.attempt, Metric.values, Metric.nonfinite)
    rows = session.execute(select(*columns).where(*which).order_by(Metric.update)).mappings()
    return Columns.of_rows([dict(row) for row in rows])


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


# --- writing ---------------------------------------------------------------------------------------------------------


def emit(session: Session, job: Job, type_: str, data: dict[str, Any], instant: datetime) -> None:
    """Write an event down, with the next number of its job."""
    seq, job.next_seq = job.next_seq, job.next_seq + 1
    session.add(Event(job_id=job.id, seq=seq, type=type_, attempt=job.attempt, data=data, created_at=instant))


def record(session: Session, job: Job, measured: Sequence[Measured], instant: datetime) -> None:
    """Write metrics down, over those of an earlier attempt, and the events that name them."""
    rows = [_metric_row(job, each) for each in measured]
    if _count_loose(session, job.id) + len(rows) >= 2 * BLOCK:
        rows = _pack(session, job.id, rows)
    _upsert(session, rows)
    for part in (measured[at : at + EVENT_UPDATES] for at in range(0, len(measured), EVENT_UPDATES)):
        emit(session, job, "metrics", {"from_update": part[0].update, "to_update": part[-1].update}, instant)


def forget_beyond(session: Session, job: Job, updates: int) -> None:
    """Remove the metrics of updates that are going to be repeated."""
    session.execute(delete_from(Metric).where(Metric.job_id == job.id, Metric.update > updates))
    beyond = (MetricBlock.job_id == job.id, MetricBlock.last_update > updates)
    cut = [Columns.from_bytes(content) for content in session.scalars(select(MetricBlock.content).where(*beyond))]
    session.execute(delete_from(MetricBlock).where(*beyond))
    _write_blocks(session, job.id, [part.taken(part.updates <= updates) for part in cut])


def thin(session: Session, job_id: str) -> None:
    """Drop every second recorded update once there are too many; the newest stays.

    What is left counts half, so the history gets sparser the older it is, and what is kept of the job stays bounded.
    """
    packed = session.scalar(select(func.sum(MetricBlock.count)).where(MetricBlock.job_id == job_id)) or 0
    if packed + _count_loose(session, job_id) <= RECORDED_UPDATES:
        return
    recorded = _recorded(session, job_id, 0)
    kept = recorded.taken(np.arange((len(recorded) - 1) % 2, len(recorded), 2))
    for table in (Metric, MetricBlock):
        session.execute(delete_from(table).where(table.job_id == job_id))
    _write_blocks(session, job_id, [kept.taken(slice(at, at + BLOCK)) for at in range(0, len(kept), BLOCK)])


def _count_loose(session: Session, job_id: str) -> int:
    return session.scalar(select(func.count()).select_from(Metric).where(Metric.job_id == job_id)) or 0


def _pack(session: Session, job_id: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pack all whole blocks of the job's rows and of new ones; returns the new ones that are to be rows."""
    together = Columns.joined(
        [_loose(session, Metric.job_id == job_id, Metric.update < rows[0]["update"]), Columns.of_rows(rows)]
    )
    whole = len(together) // BLOCK
    last = int(together.updates[whole * BLOCK - 1])
    session.execute(delete_from(Metric).where(Metric.job_id == job_id, Metric.update <= last))
    _write_blocks(session, job_id, [together.taken(slice(n * BLOCK, (n + 1) * BLOCK)) for n in range(whole)])
    return [row for row in rows if row["update"] > last]


def _write_blocks(session: Session, job_id: str, blocks: Iterable[Columns]) -> None:
    rows = [
        {
            "job_id": job_id,
            "first_update": int(block.updates[0]),
            "last_update": int(block.updates[-1]),
            "count": len(block),
            "content": block.to_bytes(),
        }
        for block in blocks
        if len(block)
    ]
    if rows:
        session.execute(insert(MetricBlock), rows)


def _upsert(session: Session, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    of_dialect = sqlite.insert if session.get_bind().dialect.name == "sqlite" else postgresql.insert
    statement = of_dialect(cast(Table, Metric.__table__))
    repeated = ("attempt", "env_steps", "values", "nonfinite")
    statement = statement.on_conflict_do_update(
        index_elements=["job_id", "update"], set_={name: statement.excluded[name] for name in repeated}
    )
    session.execute(statement, rows)


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
