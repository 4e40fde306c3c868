"""What decided which checkpoint is the best stands apart from its evaluation; jobs say why figures are missing.

Revision 0007, after 0006. All evaluations that are there by now were used to find the best checkpoint, whatever they
were made for, so all of them become selections. A job's result keeps its own evaluation.
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def _recreated() -> str:
    """SQLite writes an added column behind the table's rules, unlike the table that the code declares."""
    return "always" if op.get_bind().dialect.name == "sqlite" else "never"


def upgrade() -> None:
    with op.batch_alter_table("job", recreate=_recreated()) as batch:
        batch.add_column(sa.Column("exact_absent", sa.JSON()))
    with op.batch_alter_table("checkpoint", recreate=_recreated()) as batch:
        batch.add_column(sa.Column("selection", sa.JSON()))
    op.execute("UPDATE checkpoint SET selection = evaluation, evaluation = NULL WHERE evaluation IS NOT NULL")


def downgrade() -> None:
    op.execute("UPDATE checkpoint SET evaluation = selection WHERE evaluation IS NULL")
    with op.batch_alter_table("checkpoint", recreate=_recreated()) as batch:
        batch.drop_column("selection")
    with op.batch_alter_table("job", recreate=_recreated()) as batch:
        batch.drop_column("exact_absent")
