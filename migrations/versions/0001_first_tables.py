"""The first tables: keys, environments, policies, checkpoints, jobs with their events and metrics.

Revision 0001, the first.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

Time = sa.DateTime(timezone=True)
Id = sa.String(64)
Count = sa.BigInteger()
Json = sa.JSON()

TERMINAL = "status IN ('cancelled', 'succeeded', 'failed')"


def upgrade() -> None:
    op.create_table(
        "api_key",
        sa.Column("id", Id, nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("scopes", Json, nullable=False),
        sa.Column("created_at", Time, nullable=False),
        sa.Column("last_used_at", Time),
        sa.Column("revoked_at", Time),
        sa.PrimaryKeyConstraint("id", name="pk_api_key"),
        sa.UniqueConstraint("hash", name="uq_api_key_hash"),
    )
    op.create_table(
        "idempotency",
        sa.Column("key_id", Id, nullable=False),
        sa.Column("key", sa.String(255), nullable=False),
        sa.Column("route", sa.String(), nullable=False),
        sa.Column("body_hash", sa.String(64), nullable=False),
        sa.Column("status_code", sa.Integer(), nullable=False),
        sa.Column("response", Json, nullable=False),
        sa.Column("created_at", Time, nullable=False),
        sa.PrimaryKeyConstraint("key_id", "key", name="pk_idempotency"),
    )
    op.create_index("ix_idempotency_created_at", "idempotency", ["created_at"])
    op.create_table(
        "environment",
        sa.Column("id", Id, nullable=False),
        sa.Column("content_hash", sa.String(64), nullable=False),
        sa.Column("spec", Json, nullable=False),
        sa.Column("facts", Json, nullable=False),
        sa.Column("created_at", Time, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_environment"),
        sa.UniqueConstraint("content_hash", name="uq_environment_content_hash"),
    )
    op.create_table(
        "policy",
        sa.Column("id", Id, nullable=False),
        sa.Column("name", sa.String()),
        sa.Column("metadata", Json, nullable=False),
        sa.Column("environment_id", Id, nullable=False),
        sa.Column("spec", Json, nullable=False),
        sa.Column("seed", Count, nullable=False),
        sa.Column("updates", Count, nullable=False),
        sa.Column("created_at", Time, nullable=False),
        sa.CheckConstraint("seed >= 0", name=op.f("ck_policy_seed")),
        sa.CheckConstraint("updates >= 0", name=op.f("ck_policy_updates")),
        sa.PrimaryKeyConstraint("id", name="pk_policy"),
        sa.ForeignKeyConstraint(
            ["environment_id"], ["environment.id"], name="fk_policy_environment_id_environment", ondelete="RESTRICT"
        ),
    )
    op.create_index("ix_policy_environment_id", "policy", ["environment_id"])
    op.create_table(
        "job",
        sa.Column("id", Id, nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("name", sa.String()),
        sa.Column("metadata", Json, nullable=False),
        sa.Column("policy_id", Id, nullable=False),
        sa.Column("environment_id", Id, nullable=False),
        sa.Column("spec", Json, nullable=False),
        sa.Column("label", Json, nullable=False),
        sa.Column("status", sa.String(32), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("max_attempts", sa.Integer(), nullable=False),
        sa.Column("token", Count, nullable=False),
        sa.Column("worker", sa.String()),
        sa.Column("lease_expires_at", Time),
        sa.Column("cancel_requested_at", Time),
        sa.Column("start_updates", Count, nullable=False),
        sa.Column("updates", Count, nullable=False),
        sa.Column("env_steps", Count, nullable=False),
        sa.Column("episodes", Count, nullable=False),
        sa.Column("fraction", sa.Double(), nullable=False),
        sa.Column("fingerprint", Json),
        sa.Column("failure", Json),
        sa.Column("result", Json),
        sa.Column("next_seq", Count, nullable=False),
        sa.Column("created_at", Time, nullable=False),
        sa.Column("queued_at", Time, nullable=False),
        sa.Column("started_at", Time),
        sa.Column("finished_at", Time),
        sa.Column("last_progress_at", Time),
        sa.CheckConstraint("kind IN ('training')", name=op.f("ck_job_kind")),
        sa.CheckConstraint(
            "status IN ('queued', 'running', 'pausing', 'paused', 'cancelling', 'cancelled', 'succeeded', 'failed')",
            name=op.f("ck_job_status"),
        ),
        sa.CheckConstraint(f"({TERMINAL}) = (finished_at IS NOT NULL)", name=op.f("ck_job_finished")),
        sa.CheckConstraint("(worker IS NULL) = (lease_expires_at IS NULL)", name=op.f("ck_job_lease")),
        sa.CheckConstraint("attempt >= 1 AND max_attempts >= 1", name=op.f("ck_job_attempt")),
        sa.CheckConstraint("token >= 0 AND next_seq >= 1", name=op.f("ck_job_token")),
        sa.CheckConstraint("fraction >= 0 AND fraction <= 1", name=op.f("ck_job_fraction")),
        sa.PrimaryKeyConstraint("id", name="pk_job"),
        sa.ForeignKeyConstraint(["policy_id"], ["policy.id"], name="fk_job_policy_id_policy", ondelete="RESTRICT"),
        sa.ForeignKeyConstraint(
            ["environment_id"], ["environment.id"], name="fk_job_environment_id_environment", ondelete="RESTRICT"
        ),
    )
    op.create_index("ix_job_status_queued_at", "job", ["status", "queued_at"])
    op.create_index("ix_job_policy_id", "job", ["policy_id"])
    op.create_index("ix_job_environment_id", "job", ["environment_id"])
    op.create_index(
        "uq_job_policy_id_training_active",
        "job",
        ["policy_id"],
        unique=True,
        sqlite_where=sa.text(f"kind = 'training' AND NOT ({TERMINAL})"),
        postgresql_where=sa.text(f"kind = 'training' AND NOT ({TERMINAL})"),
    )
    op.create_table(
        "checkpoint",
        sa.Column("id", Id, nullable=False),
        sa.Column("policy_id", Id, nullable=False),
        sa.Column("job_id", Id),
        sa.Column("updates", Count, nullable=False),
        sa.Column("replica", sa.Integer(), nullable=False),
        sa.Column("size", Count, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("evaluation", Json),
        sa.Column("created_at", Time, nullable=False),
        sa.CheckConstraint("updates >= 0 AND replica >= 0 AND size >= 0", name=op.f("ck_checkpoint_counts")),
        sa.PrimaryKeyConstraint("id", name="pk_checkpoint"),
        sa.UniqueConstraint("policy_id", "updates", "replica", name="uq_checkpoint_policy_id_updates_replica"),
        sa.ForeignKeyConstraint(
            ["policy_id"], ["policy.id"], name="fk_checkpoint_policy_id_policy", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name="fk_checkpoint_job_id_job", ondelete="SET NULL"),
    )
    op.create_index("ix_checkpoint_job_id", "checkpoint", ["job_id"])
    op.create_table(
        "checkpoint_content",
        sa.Column("checkpoint_id", Id, nullable=False),
        sa.Column("policy_bytes", sa.LargeBinary(), nullable=False),
        sa.Column("state_bytes", sa.LargeBinary()),
        sa.Column("state_sha256", sa.String(64)),
        sa.PrimaryKeyConstraint("checkpoint_id", name="pk_checkpoint_content"),
        sa.ForeignKeyConstraint(
            ["checkpoint_id"],
            ["checkpoint.id"],
            name="fk_checkpoint_content_checkpoint_id_checkpoint",
            ondelete="CASCADE",
        ),
    )
    op.create_table(
        "event",
        sa.Column("job_id", Id, nullable=False),
        sa.Column("seq", Count, nullable=False, autoincrement=False),
        sa.Column("type", sa.String(32), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("data", Json, nullable=False),
        sa.Column("created_at", Time, nullable=False),
        sa.CheckConstraint(
            "type IN ('status', 'metrics', 'checkpoint', 'evaluation', 'log', 'rewind')", name=op.f("ck_event_type")
        ),
        sa.CheckConstraint("seq >= 1", name=op.f("ck_event_seq")),
        sa.PrimaryKeyConstraint("job_id", "seq", name="pk_event"),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name="fk_event_job_id_job", ondelete="CASCADE"),
    )
    op.create_table(
        "metric",
        sa.Column("job_id", Id, nullable=False),
        sa.Column("update", Count, nullable=False, autoincrement=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("env_steps", Count, nullable=False),
        sa.Column("values", Json, nullable=False),
        sa.Column("nonfinite", Json),
        sa.CheckConstraint('"update" >= 0', name=op.f("ck_metric_update")),
        sa.PrimaryKeyConstraint("job_id", "update", name="pk_metric"),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name="fk_metric_job_id_job", ondelete="CASCADE"),
    )


def downgrade() -> None:
    for table in (
        "metric",
        "event",
        "checkpoint_content",
        "checkpoint",
        "job",
        "policy",
        "environment",
        "idempotency",
        "api_key",
    ):
        op.drop_table(table)
