"""Draft a revision: `python -m migrations "what changes"`, then read and correct the file it names.

It compares server/tables.py with the schema that the existing revisions make in a fresh SQLite file.
"""

import sys
import tempfile
from pathlib import Path

from alembic import command
from alembic.script import ScriptDirectory

from migrations import configuration, migrate
from server.database import Database
from server.settings import sqlite_url

__all__: list[str] = []


def draft(message: str) -> Path:
    """Write a new file in migrations/versions and return its path."""
    config = configuration()
    number = len(list(ScriptDirectory.from_config(config).walk_revisions())) + 1
    with tempfile.TemporaryDirectory() as directory:
        database = Database(sqlite_url(Path(directory) / "draft.db"))
        migrate(database)
        with database.connect() as connection, connection.begin():
            config.attributes["connection"] = connection
            script = command.revision(config, message, autogenerate=True, rev_id=f"{number:04d}")
        database.dispose()
    assert script is not None
    assert not isinstance(script, list)
    return Path(script.path)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(draft(sys.argv[1]))
