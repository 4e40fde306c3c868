"""Long histories of metrics are kept in blocks of many updates.

Revision 0003, after 0002.
"""

import json
import math
import struct
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "metric_block",
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("first_update", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("last_update", sa.BigInteger(), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.CheckConstraint(
            "first_update >= 0 AND last_update >= first_update AND count >= 1", name=op.f("ck_metric_block_range")
        ),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_metric_block_job_id_job"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "first_update", name=op.f("pk_metric_block")),
    )


def downgrade() -> None:
    # 0002 knows rows alone, so each block becomes the rows that it was made from
    connection = op.get_bind()
    blocks = sa.table("metric_block", sa.column("job_id"), sa.column("first_update"), sa.column("content"))
    row = sa.table(
        "metric",
        *(sa.column(name) for name in ("job_id", "update", "attempt", "env_steps")),
        *(sa.column(name, sa.JSON(none_as_null=True)) for name in ("values", "nonfinite")),
    )
    for job_id, first in connection.execute(sa.select(blocks.c.job_id, blocks.c.first_update)).all():
        this = (blocks.c.job_id == job_id, blocks.c.first_update == first)
        content = connection.scalar(sa.select(blocks.c.content).where(*this))
        connection.execute(sa.insert(row), [{"job_id": job_id, **each} for each in _rows(content)])
    op.drop_table("metric_block")


def _rows(data: bytes) -> Iterator[dict[str, Any]]:
    (length,) = struct.unpack_from("<I", data)
    header = json.loads(data[4 : 4 + length])
    n, names = header["count"], header["names"]
    numbers = struct.unpack_from(f"<{3 * n}q", data, 4 + length)
    values = struct.unpack_from(f"<{len(names) * n}d", data, 4 + length + 24 * n)
    for i in range(n):
        update, env_steps, attempt = numbers[i::n]
        infinite = [name for name, found in header["nonfinite"].items() if update in found]
        known = {name: value for name, value in zip(names, values[i::n], strict=True) if not math.isnan(value)}
        yield {
            "update": update,
            "env_steps": env_steps,
            "attempt": attempt,
            "values": known | dict.fromkeys(infinite),
            "nonfinite": infinite or None,
        }
