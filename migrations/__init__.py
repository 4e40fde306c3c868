"""The database's schema, revision by revision (alembic), found as package data and not by the working directory.

    migrate(database)             up to the newest revision
    migrate(database, "base")     down to nothing, or to any revision by name
    state(database)               where the database is and where this code expects it

On SQLite the foreign keys are off meanwhile and checked before the commit: a batch alter copies a table and drops the
old one, which with foreign keys on would delete every child row through ON DELETE CASCADE, silently.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, func, inspect, select, text

from server.database import Database, new_private_file

__all__ = ["MigrationError", "Move", "State", "configuration", "expected", "migrate", "state"]

_LOCK = 0x7067656E67696E65  # "pgengine": any constant that no other program locks in the same database


class MigrationError(Exception):
    """The database could not be brought to the wanted revision; it is as it was."""


@dataclass(frozen=True, slots=True)
class State:
    """Where a database is.

    Attributes:
        current: Its revision; None if it has no tables of ours.
        expected: The revision that this code works with.
        known: Whether this code knows the current revision; otherwise a newer one has migrated the database.
    """

    current: str | None
    expected: str
    known: bool

    @property
    def matches(self) -> bool:
        """Whether this code can work with the database as it is."""
        return self.current == self.expected

    @property
    def advice(self) -> str:
        """What is wrong and what to do, in one line for people."""
        if self.matches:
            return f"the database is at revision {self.current}"
        if not self.known:
            return f"the database is at revision {self.current}, made by a newer version: update this program"
        return (
            f"the database is at revision {self.current or 'none'} and revision {self.expected} is needed: "
            "run `python -m server migrate`"
        )


@dataclass(frozen=True, slots=True)
class Move:
    """What a migration did.

    Attributes:
        before: Revision before; None if there was none.
        after: Revision after.
        backup: Copy of the SQLite file as it was before; None if nothing had to be kept.
    """

    before: str | None
    after: str | None
    backup: Path | None


def configuration() -> Config:
    """Alembic's configuration, made here so that no file of the working directory matters."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    return config


@cache
def expected() -> str:
    """The newest revision, which this code works with."""
    head = ScriptDirectory.from_config(configuration()).get_current_head()
    assert head is not None, "migrations/versions is not in this installation"
    return head


def state(database: Database) -> State:
    """Where the database is, and where it should be."""
    with database.read() as session:
        return _state(session.connection())


def migrate(database: Database, to: str = "head") -> Move:
    """Bring a database to a revision: all steps in one transaction, one migrating program at a time.

    Args:
        database: Not used by others meanwhile, unless it is at that revision already.
        to: `head`, `base` or the name of a revision.

    Raises:
        MigrationError: if the revision is unknown, or rows would be left that refer to nothing.
    """
    with _transaction(database) as connection:
        before = _state(connection)
        if not before.known:
            raise MigrationError(before.advice)
        target = _target(to)
        if before.current == target:
            return Move(before.current, target, None)
        backup = _backup(database, before.current) if inspect(connection).get_table_names() else None
        _run(connection, before.current, target)
        return Move(before.current, target, backup)


def _state(connection: Connection) -> State:
    current = MigrationContext.configure(connection).get_current_revision()
    return State(current, expected(), current is None or current in _order())


def _order() -> list[str]:
    """All revisions, the oldest first."""
    return [script.revision for script in ScriptDirectory.from_config(configuration()).walk_revisions()][::-1]


def _target(to: str) -> str | None:
    if to == "base":
        return None
    if to == "head":
        return expected()
    if to not in _order():
        raise MigrationError(f"there is no revision {to!r}; there are base, {', '.join(_order())}")
    return to


def _run(connection: Connection, current: str | None, target: str | None) -> None:
    order = [None, *_order()]
    move = command.upgrade if order.index(target) > order.index(current) else command.downgrade
    config = configuration()
    config.attributes["connection"] = connection
    try:
        move(config, target or "base")
    except CommandError as error:
        raise MigrationError(str(error)) from error


@contextmanager
def _transaction(database: Database) -> Iterator[Connection]:
    with database.connect() as connection:
        if database.dialect == "postgresql":
            with connection.begin():
                connection.execute(select(func.pg_advisory_xact_lock(_LOCK)))
                yield connection
            return
        driver: Any = connection.connection.driver_connection
        driver.execute("PRAGMA foreign_keys = OFF")  # has no effect once a transaction has begun
        try:
            with connection.begin():
                yield connection
                _check_foreign_keys(connection)
        finally:
            driver.execute("PRAGMA foreign_keys = ON")


def _check_foreign_keys(connection: Connection) -> None:
    broken = connection.execute(text("PRAGMA foreign_key_check")).all()
    if broken:
        tables = ", ".join(sorted({f"{row[0]} → {row[2]}" for row in broken}))
        raise MigrationError(
            f"{len(broken)} rows would refer to rows that do not exist ({tables}); nothing was changed"
        )


def _backup(database: Database, revision: str | None) -> Path | None:
    """Copy a SQLite file beside itself; other databases have backups of their own kind."""
    if database.dialect != "sqlite":
        return None
    assert database.url.database is not None
    source = Path(database.url.database)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
    target = source.with_name(f"{source.name}.{revision or 'none'}.{stamp}.backup")
    new_private_file(target)
    with sqlite3.connect(source) as reader, sqlite3.connect(target) as writer:
        reader.backup(writer)
    reader.close()
    writer.close()
    return target
