"""All tables, and the rules that the database itself keeps.

Stores own the statements on their tables; migrations/ makes them. Times are the database's own (`now()`).
"""

from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Double,
    ForeignKey,
    Index,
    LargeBinary,
    String,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import Mapped, mapped_column

from server.database import JsonValue, NamingBase, now

__all__ = [
    "JOB_KINDS",
    "JOB_STATUSES",
    "TERMINAL_STATUSES",
    "ApiKey",
    "Checkpoint",
    "CheckpointContent",
    "Environment",
    "Event",
    "Idempotency",
    "Job",
    "Metric",
    "MetricBlock",
    "Policy",
]

JOB_KINDS = ("training", "gradient_check")
JOB_STATUSES = ("queued", "running", "pausing", "paused", "cancelling", "cancelled", "succeeded", "failed")
TERMINAL_STATUSES = ("cancelled", "succeeded", "failed")
EVENT_TYPES = ("status", "metrics", "checkpoint", "evaluation", "log", "rewind")


def _among(column: str, values: tuple[str, ...]) -> str:
    return f"{column} IN ({', '.join(repr(value) for value in values)})"


class ApiKey(NamingBase):
    """A key to the API; only the hash of its secret is kept."""

    __tablename__ = "api_key"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str]
    hash: Mapped[str] = mapped_column(String(64), unique=True)
    scopes: Mapped[list[str]]
    created_at: Mapped[datetime] = mapped_column(default=now())
    last_used_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class Idempotency(NamingBase):
    """The answer to a creating request, kept for those who repeat it.

    `key_id` is no foreign key: a server without authentication has no keys, and a removed key's answers expire anyway.
    """

    __tablename__ = "idempotency"
    __table_args__ = (Index(None, "created_at"),)

    key_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    route: Mapped[str]
    body_hash: Mapped[str] = mapped_column(String(64))
    status_code: Mapped[int]
    response: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=now())


class Environment(NamingBase):
    """What policies learn in; identical ones are one row."""

    __tablename__ = "environment"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    content_hash: Mapped[str] = mapped_column(String(64), unique=True)
    # megabytes, where it holds the tables of a finite MDP: read only by who asks for it
    spec: Mapped[dict[str, Any]] = mapped_column(deferred=True)
    facts: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=now())


class Policy(NamingBase):
    """What is trained and asked for actions; its parameters are in its checkpoints."""

    __tablename__ = "policy"
    __table_args__ = (
        CheckConstraint("seed >= 0", name="seed"),
        CheckConstraint("updates >= 0", name="updates"),
        Index(None, "environment_id"),
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str | None]
    metadata_: Mapped[dict[str, Any]] = mapped_column("metadata", default=dict)
    environment_id: Mapped[str] = mapped_column(ForeignKey("environment.id", ondelete="RESTRICT"))
    spec: Mapped[dict[str, Any]]
    seed: Mapped[int] = mapped_column(BigInteger)
    updates: Mapped[int] = mapped_column(BigInteger, default=0)
    created_at: Mapped[datetime] = mapped_column(default=now())


class Job(NamingBase):
    """A request to work: the queue, the lease and the progress in one row."""

    __tablename__ = "job"
    __table_args__ = (
        CheckConstraint(_among("kind", JOB_KINDS), name="kind"),
        CheckConstraint(_among("status", JOB_STATUSES), name="status"),
        # an ended job has its time of ending, and no other job has one
        CheckConstraint(f"({_among('status', TERMINAL_STATUSES)}) = (finished_at IS NOT NULL)", name="finished"),
        # who works has a name and a time by which to be heard of again
        CheckConstraint("(worker IS NULL) = (lease_expires_at IS NULL)", name="lease"),
        CheckConstraint("attempt >= 1 AND max_attempts >= 1", name="attempt"),
        CheckConstraint("token >= 0 AND next_seq >= 1", name="token"),
        CheckConstraint("reported >= 0", name="reported"),
        CheckConstraint("fraction >= 0 AND fraction <= 1", name="fraction"),
        # what trains is a policy; a gradient check may describe one that is not stored
        CheckConstraint("kind != 'training' OR policy_id IS NOT NULL", name="policy"),
        # an ended job holds no checkpoint
        CheckConstraint("checkpoint_id IS NULL OR finished_at IS NULL", name="checkpoint"),
        Index(None, "status", "queued_at"),
        Index(None, "policy_id"),
        Index(None, "environment_id"),
        Index(None, "checkpoint_id"),
        Index(None, "key_id", "status"),
        # at most one training job of a policy is at work
        Index(
            "uq_job_policy_id_training_active",
            "policy_id",
            unique=True,
            sqlite_where=text(f"kind = 'training' AND NOT ({_among('status', TERMINAL_STATUSES)})"),
            postgresql_where=text(f"kind = 'training' AND NOT ({_among('status', TERMINAL_STATUSES)})"),
        ),
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    kind: Mapped[str] = mapped_column(String(32))
    # who asked for it; no foreign key: a server without authentication has no keys
    key_id: Mapped[str | None] = mapped_column(String(64))
    name: Mapped[str | None]
    metadata_: Mapped[dict[str, Any]] = mapped_column("metadata", default=dict)
    policy_id: Mapped[str | None] = mapped_column(ForeignKey("policy.id", ondelete="RESTRICT"))
    environment_id: Mapped[str] = mapped_column(ForeignKey("environment.id", ondelete="RESTRICT"))
    # what it reads beside its policy's latest one; held until it ends. Checkpoints refer to jobs too, so one of the
    # two references is made after the tables
    checkpoint_id: Mapped[str | None] = mapped_column(ForeignKey("checkpoint.id", ondelete="RESTRICT", use_alter=True))
    spec: Mapped[dict[str, Any]]
    label: Mapped[dict[str, Any]]
    # {code, message} each; NULL of a job that an earlier version has stored
    notices: Mapped[list[dict[str, Any]] | None] = mapped_column(JsonValue)
    exact_absent: Mapped[dict[str, Any] | None] = mapped_column(JsonValue)
    status: Mapped[str] = mapped_column(String(32), default="queued")
    attempt: Mapped[int] = mapped_column(default=1)
    max_attempts: Mapped[int]
    token: Mapped[int] = mapped_column(BigInteger, default=0)
    # number of the last write of the token's holder: one that is sent again, since its answer was lost, is known by it
    reported: Mapped[int] = mapped_column(BigInteger, default=0, server_default=text("0"))
    worker: Mapped[str | None]
    lease_expires_at: Mapped[datetime | None]
    cancel_requested_at: Mapped[datetime | None]
    start_updates: Mapped[int] = mapped_column(BigInteger, default=0)
    updates: Mapped[int] = mapped_column(BigInteger, default=0)
    env_steps: Mapped[int] = mapped_column(BigInteger, default=0)
    episodes: Mapped[int] = mapped_column(BigInteger, default=0)
    fraction: Mapped[float] = mapped_column(Double, default=0.0)
    fingerprint: Mapped[dict[str, Any] | None] = mapped_column(JsonValue)
    failure: Mapped[dict[str, Any] | None] = mapped_column(JsonValue)
    result: Mapped[dict[str, Any] | None] = mapped_column(JsonValue)
    next_seq: Mapped[int] = mapped_column(BigInteger, default=1)
    created_at: Mapped[datetime] = mapped_column(default=now())
    queued_at: Mapped[datetime] = mapped_column(default=now())
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    last_progress_at: Mapped[datetime | None]


class Checkpoint(NamingBase):
    """A policy as it was after so many updates. It belongs to the policy and survives the job that wrote it."""

    __tablename__ = "checkpoint"
    __table_args__ = (
        UniqueConstraint("policy_id", "updates", "replica"),
        CheckConstraint("updates >= 0 AND replica >= 0 AND size >= 0", name="counts"),
        Index(None, "job_id"),
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    policy_id: Mapped[str] = mapped_column(ForeignKey("policy.id", ondelete="CASCADE"))
    job_id: Mapped[str | None] = mapped_column(ForeignKey("job.id", ondelete="SET NULL"))
    updates: Mapped[int] = mapped_column(BigInteger)
    replica: Mapped[int] = mapped_column(default=0)
    size: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    # what decided that it is the best; a mean that was selected is too high, so it is no evaluation
    selection: Mapped[dict[str, Any] | None] = mapped_column(JsonValue)
    evaluation: Mapped[dict[str, Any] | None] = mapped_column(JsonValue)
    created_at: Mapped[datetime] = mapped_column(default=now())


class CheckpointContent(NamingBase):
    """The bytes of a checkpoint, apart from it so that lists never read them."""

    __tablename__ = "checkpoint_content"

    checkpoint_id: Mapped[str] = mapped_column(ForeignKey("checkpoint.id", ondelete="CASCADE"), primary_key=True)
    policy_bytes: Mapped[bytes] = mapped_column(LargeBinary)
    state_bytes: Mapped[bytes | None] = mapped_column(LargeBinary)
    state_sha256: Mapped[str | None] = mapped_column(String(64))


class Event(NamingBase):
    """One entry of a job's stream; `seq` comes from the job's row, so the order of commits is the order of events."""

    __tablename__ = "event"
    __table_args__ = (
        CheckConstraint(_among("type", EVENT_TYPES), name="type"),
        CheckConstraint("seq >= 1", name="seq"),
    )

    job_id: Mapped[str] = mapped_column(ForeignKey("job.id", ondelete="CASCADE"), primary_key=True)
    seq: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    type: Mapped[str] = mapped_column(String(32))
    attempt: Mapped[int]
    data: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=now())


class Metric(NamingBase):
    """What was measured in one update of a job; repeating the update overwrites it."""

    __tablename__ = "metric"
    __table_args__ = (CheckConstraint('"update" >= 0', name="update"),)

    job_id: Mapped[str] = mapped_column(ForeignKey("job.id", ondelete="CASCADE"), primary_key=True)
    update: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    attempt: Mapped[int]
    env_steps: Mapped[int] = mapped_column(BigInteger)
    values: Mapped[dict[str, Any]]
    nonfinite: Mapped[list[str] | None] = mapped_column(JsonValue)


class MetricBlock(NamingBase):
    """Many updates of a long job in columns (`server.jobs.blocks`), in the place of as many rows of `metric`."""

    __tablename__ = "metric_block"
    __table_args__ = (
        CheckConstraint("first_update >= 0 AND last_update >= first_update AND count >= 1", name="range"),
    )

    job_id: Mapped[str] = mapped_column(ForeignKey("job.id", ondelete="CASCADE"), primary_key=True)
    first_update: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    last_update: Mapped[int] = mapped_column(BigInteger)
    count: Mapped[int]
    content: Mapped[bytes] = mapped_column(LargeBinary)
