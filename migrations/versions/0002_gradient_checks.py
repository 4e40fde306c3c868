"""Gradient checks are jobs: their kind, jobs without a stored policy, the checkpoint that a job holds until it ends.

Revision 0002, after 0001.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

Id = sa.String(64)


def upgrade() -> None:
    with op.batch_alter_table("job") as batch:
        batch.alter_column("policy_id", existing_type=Id, nullable=True)
        batch.add_column(sa.Column("checkpoint_id", Id))
        batch.drop_constraint(op.f("ck_job_kind"), type_="check")
        batch.create_check_constraint(op.f("ck_job_kind"), "kind IN ('training', 'gradient_check')")
        batch.create_check_constraint(op.f("ck_job_policy"), "kind != 'training' OR policy_id IS NOT NULL")
        batch.create_check_constraint(op.f("ck_job_checkpoint"), "checkpoint_id IS NULL OR finished_at IS NULL")
        batch.create_foreign_key(
            "fk_job_checkpoint_id_checkpoint", "checkpoint", ["checkpoint_id"], ["id"], ondelete="RESTRICT"
        )
        batch.create_index("ix_job_checkpoint_id", ["checkpoint_id"])


def downgrade() -> None:
    # 0001 has no place for gradient checks. Nothing cascades here: on SQLite foreign keys are off during a migration
    checks = "SELECT id FROM job WHERE kind = 'gradient_check'"
    op.execute(f"DELETE FROM event WHERE job_id IN ({checks})")
    op.execute(f"DELETE FROM metric WHERE job_id IN ({checks})")
    op.execute("DELETE FROM job WHERE kind = 'gradient_check'")
    with op.batch_alter_table("job") as batch:
        batch.drop_index("ix_job_checkpoint_id")
        batch.drop_constraint("fk_job_checkpoint_id_checkpoint", type_="foreignkey")
        batch.drop_constraint(op.f("ck_job_checkpoint"), type_="check")
        batch.drop_constraint(op.f("ck_job_policy"), type_="check")
        batch.drop_constraint(op.f("ck_job_kind"), type_="check")
        batch.create_check_constraint(op.f("ck_job_kind"), "kind IN ('training')")
        batch.drop_column("checkpoint_id")
        batch.alter_column("policy_id", existing_type=Id, nullable=False)
