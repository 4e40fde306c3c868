"""Jobs say which key asked for them.

Revision 0004, after 0003.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("job", sa.Column("key_id", sa.String(64)))
    op.create_index("ix_job_key_id_status", "job", ["key_id", "status"])


def downgrade() -> None:
    op.drop_index("ix_job_key_id_status", "job")
    op.drop_column("job", "key_id")
