"""Jobs keep the notices that they were created with.

Revision 0006, after 0005.
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # made anew on SQLite, as the first revision writes tables: one column to a line
    with op.batch_alter_table("job", recreate="always" if op.get_bind().dialect.name == "sqlite" else "never") as batch:
        batch.add_column(sa.Column("notices", sa.JSON(none_as_null=True)))


def downgrade() -> None:
    with op.batch_alter_table("job") as batch:
        batch.drop_column("notices")
