"""Connections to SQLite and PostgreSQL that wait for nothing without end, and what their errors mean.

A worker that is stopped within a transaction, a lock that somebody holds, a network that swallows what is sent: each
has a limit, and all limits lie below the lease of a job, so that what one worker holds is free before another takes
the job over.
"""

import os
import sqlite3
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from sqlalchemy import URL, Engine, create_engine, event, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import ConnectionPoolEntry, NullPool, QueuePool

from server.health import Outage

if TYPE_CHECKING:
    from psycopg import Connection

__all__ = ["File", "Limits", "postgresql_engine", "sqlite_engine", "trouble"]

T = TypeVar("T")

PATIENT_SECONDS = 600.0
"""How long a migration waits for a lock. It may take longer than anything else, and there is one at a time."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a transaction waits, and for what.

    Attributes:
        lock_seconds: For a lock.
        pool_seconds: For a free connection, while others of the same process are at work.
        statement_seconds: For the end of one statement.
        idle_seconds: For its own next statement, before PostgreSQL ends it and frees what it holds.
        answer_seconds: For a single byte from PostgreSQL, however the network or the server came to be silent.
        connect_seconds: For a connection to PostgreSQL.
    """

    lock_seconds: float
    pool_seconds: float
    statement_seconds: float
    idle_seconds: float
    answer_seconds: float
    connect_seconds: int

    @classmethod
    def below(cls, lease_seconds: float) -> "Limits":
        """Those that fit a lease: together a lock, a statement and its answer take less."""
        half = min(lease_seconds / 2, 30.0)
        quarter = min(lease_seconds / 4, 5.0)
        return cls(
            lock_seconds=quarter,
            pool_seconds=half + quarter,
            statement_seconds=half,
            idle_seconds=half,
            answer_seconds=half + quarter,
            # libpq knows whole seconds, and none below two
            connect_seconds=max(2, int(quarter)),
        )


# --- SQLite -----------------------------------------------------------------------------------------------------------


class File:
    """The file of a SQLite database: whether what is open is still what has its name.

    A file that is deleted or replaced goes on taking writes of those that have it open, and nobody will ever read them.
    """

    def __init__(self) -> None:
        self._path: str | None = None
        self._identity: tuple[int, int] | None = None

    def opened(self, path: str) -> None:
        """Remember the file of the first connection."""
        if self._identity is None:
            self._path, self._identity = path, _identity(path)

    def check(self) -> None:
        """Whether the file is the one that was opened first.

        Raises:
            Outage: if it is not.
        """
        if self._path is None:
            return
        now = _identity(self._path)
        if now != self._identity:
            what = "was deleted" if now is None else "was replaced by another one"
            raise Outage(f"the file {self._path} {what}; nothing is written. Put it back, or start the server again")


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def sqlite_engine(
    url: URL,
    file: File,
    *,
    json_serializer: Callable[[Any], str],
    limits: Limits | None = None,
    pool_size: int = 1,
    query_only: bool = False,
) -> Engine:
    """Connections to a file.

    Args:
        url: `sqlite+pysqlite:///path`.
        file: Learns which file was opened.
        json_serializer: Writes the values of JSON columns.
        limits: How long they wait; None for a migration, which waits for much longer.
        pool_size: Most connections at once.
        query_only: Whether they can write; those that can take the only write lock as they begin.
    """
    lock_seconds, pool_seconds = (limits.lock_seconds, limits.pool_seconds) if limits else (PATIENT_SECONDS,) * 2
    engine = create_engine(
        url,
        poolclass=QueuePool,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=pool_seconds,
        connect_args={"timeout": lock_seconds, "check_same_thread": False},
        json_serializer=json_serializer,
    )
    event.listen(engine, "connect", _sqlite_setup(file, query_only))
    begin = text("BEGIN" if query_only else "BEGIN IMMEDIATE")
    event.listen(engine, "begin", lambda connection: connection.execute(begin))
    return engine


def _sqlite_setup(file: File, query_only: bool) -> Callable[[sqlite3.Connection, ConnectionPoolEntry], None]:
    def setup(connection: sqlite3.Connection, _: ConnectionPoolEntry) -> None:
        # the module of Python 3.11 begins transactions by itself, deferred and too late; the begin hook does it
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode = WAL")
        # FULL: an answered 201 survives a power cut too
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        if query_only:
            connection.execute("PRAGMA query_only = ON")
        file.opened(connection.execute("PRAGMA database_list").fetchone()[2])

    return setup


# --- PostgreSQL -------------------------------------------------------------------------------------------------------


def postgresql_engine(
    url: URL, *, limits: Limits | None, json_serializer: Callable[[Any], str], pool_size: int = 1
) -> Engine:
    """Connections to a server.

    Args:
        url: `postgresql+psycopg://user:password@host/name`.
        limits: How long they wait; None for a single one that waits for as long as it takes.
        json_serializer: Writes the values of JSON columns.
        pool_size: Most connections at once.
    """
    # what the operator's URL says wins, and the program's name says who holds a lock
    settings: dict[str, Any] = {"application_name": f"pgengine {os.getpid()}"}
    if limits is None:
        return create_engine(
            url, poolclass=NullPool, json_serializer=json_serializer, connect_args=_unsaid(url, settings)
        )
    settings |= {
        "connect_timeout": limits.connect_seconds,
        "tcp_user_timeout": _milliseconds(limits.answer_seconds),
        "keepalives_idle": max(1, int(limits.lock_seconds)),
        "keepalives_interval": 1,
        "keepalives_count": 3,
    }
    engine = create_engine(
        url,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=limits.pool_seconds,
        pool_pre_ping=True,
        json_serializer=json_serializer,
        connect_args=_unsaid(url, settings),
    )
    event.listen(engine, "do_connect", _connector(limits.answer_seconds))
    event.listen(engine, "connect", _postgresql_setup(limits))
    return engine


def _unsaid(url: URL, settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in url.query}


def _postgresql_setup(limits: Limits) -> Callable[["Connection", ConnectionPoolEntry], None]:
    values = {
        "lock_timeout": limits.lock_seconds,
        "statement_timeout": limits.statement_seconds,
        "idle_in_transaction_session_timeout": limits.idle_seconds,
    }
    statement = "; ".join(f"SET {name} = {_milliseconds(seconds)}" for name, seconds in values.items())

    def setup(connection: "Connection", _: ConnectionPoolEntry) -> None:
        # what is set within a transaction ends with it when that is rolled back
        connection.autocommit = True
        connection.execute(statement)
        connection.autocommit = False

    return setup


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _connector(answer_seconds: float) -> Callable[..., "Connection"]:
    # not every installation has the driver
    import psycopg

    class Bounded(psycopg.Connection[Any]):
        """A connection that gives up a server from which nothing comes.

        Timeouts of the server are worth nothing where the server hangs, and those of TCP where a proxy or the kernel
        of the other machine still acknowledges what nobody reads.
        """

        def wait(self, gen: Generator[Any, Any, T], *arguments: Any, **more: Any) -> T:
            return super().wait(_heard(gen, answer_seconds, self), *arguments, **more)

    def connect(_dialect: Any, _record: Any, arguments: Any, parameters: Any) -> "Connection":
        return Bounded.connect(*arguments, **parameters)

    return connect


def _heard(gen: Generator[Any, Any, T], seconds: float, connection: "Connection") -> Generator[Any, Any, T]:
    """What goes on between driver and server, ended when it has been silent for so long."""
    import psycopg

    heard_at = time.monotonic()
    try:
        waits_for = next(gen)
        while True:
            ready = yield waits_for
            if ready:
                heard_at = time.monotonic()
            elif time.monotonic() - heard_at > seconds:
                # whatever still comes belongs to a statement that nobody waits for
                connection.pgconn.finish()
                raise psycopg.OperationalError(f"nothing came from the server for {seconds:g} seconds")
            waits_for = gen.send(ready)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


# --- errors -----------------------------------------------------------------------------------------------------------

_SQLITE_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}
_SQLITE_AWAY = {
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_NOMEM,
}
# lock_timeout, statement_timeout, the two timeouts of transactions, serialization failure, deadlock
_POSTGRESQL_BUSY = ("55P03", "57014", "25P03", "25P04", "40001", "40P01")
# connections, too little of something, a server that stops or starts, its files, its users, its databases, no tables
_POSTGRESQL_AWAY = ("08", "53", "57P", "58", "28", "3D000", "42P01")


def trouble(error: SQLAlchemyError, *, writing: bool) -> Literal["away", "busy"] | None:
    """What an error says of the database: it is away, or it is busy with others; None for a mistake of ours.

    Args:
        error: What a transaction raised.
        writing: Whether the transaction may write.
    """
    if isinstance(error, PoolTimeout):
        return "busy"
    if not isinstance(error, DBAPIError):
        return None
    if isinstance(error.orig, sqlite3.Error):
        return _sqlite_trouble(error.orig, writing=writing)
    state = getattr(error.orig, "sqlstate", None)
    # first of all: a server that ends a transaction for its idleness closes the connection, and answers all others
    if state is not None and state.startswith(_POSTGRESQL_BUSY):
        return "busy"
    if error.connection_invalidated:
        return "away"
    if state is None:
        # errors of the driver itself: there is no connection, or it is closed
        return "away" if type(error.orig).__name__ in ("OperationalError", "ConnectionTimeout") else None
    return "away" if state.startswith(_POSTGRESQL_AWAY) else None


def _sqlite_trouble(error: sqlite3.Error, *, writing: bool) -> Literal["away", "busy"] | None:
    # errors of the module itself have no code
    extended: int | None = getattr(error, "sqlite_errorcode", None)
    if extended is None:
        return None
    code = extended & 0xFF
    if code in _SQLITE_BUSY:
        return "busy"
    if code in _SQLITE_AWAY or (code == sqlite3.SQLITE_ERROR and "no such table" in str(error)):
        return "away"
    # a reading transaction that writes is a mistake; one that may write meets a file that it may not
    return "away" if code == sqlite3.SQLITE_READONLY and (writing or extended != code) else None
