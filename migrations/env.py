"""What alembic runs; `migrations.migrate` hands it a connection within a transaction."""

from typing import Any, Literal

from alembic import context

from server import tables
from server.database import JsonValue, NamingBase, UtcDateTime

assert tables.__all__, "tables make themselves known to the metadata when they are imported"

connection = context.config.attributes.get("connection")
if connection is None:
    raise SystemExit("run `python -m server migrate`, or `python -m migrations` to draft a revision")


def render_item(kind: str, item: Any, _: object) -> str | Literal[False]:
    """Write our column types as the plain ones they are: a revision must not change when the code does."""
    if kind == "type" and isinstance(item, UtcDateTime):
        return "sa.DateTime(timezone=True)"
    if kind == "type" and isinstance(item, JsonValue):
        return "sa.JSON()"
    return False


context.configure(
    connection=connection,
    target_metadata=NamingBase.metadata,
    render_as_batch=True,
    transactional_ddl=True,
    compare_server_default=True,
    render_item=render_item,
)
with context.begin_transaction():
    context.run_migrations()
