"""What the holder of a job writes has a number, so that a write whose answer was lost is known when it is repeated.

Revision 0005, after 0004.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("job") as batch:
        batch.add_column(sa.Column("reported", sa.BigInteger, nullable=False, server_default=sa.text("0")))
        batch.create_check_constraint(op.f("ck_job_reported"), "reported >= 0")


def downgrade() -> None:
    with op.batch_alter_table("job") as batch:
        batch.drop_constraint(op.f("ck_job_reported"), type_="check")
        batch.drop_column("reported")
