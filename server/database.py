"""The database: how to reach it, its two kinds of transaction, and its clock.

Knows SQLite and PostgreSQL; knows no table. Everything that differs between the two and is not SQL of a table is here.

    with database.read() as session:     a snapshot; writing in it is an error on both databases
    with database.write() as session:    commits at the end, rolls back on an exception
"""

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Literal, cast

from sqlalchemy import (
    JSON,
    Connection,
    DateTime,
    Dialect,
    Engine,
    MetaData,
    TypeDecorator,
    create_engine,
    event,
    literal,
    make_url,
    select,
    text,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Session
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import Float

__all__ = ["Database", "JsonText", "JsonValue", "NamingBase", "UtcDateTime", "now"]

BUSY_SECONDS = 30.0
"""How long a transaction waits for another one's lock, or for a free connection, before it gives up."""


class UtcDateTime(TypeDecorator[datetime]):
    """An aware datetime in UTC on both databases; a naive one is refused.

    SQLite keeps text of fixed width, so that its order is the order of time.
    """

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a datetime without a time zone cannot be stored")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class JsonValue(TypeDecorator[Any]):
    """A JSON column: None is SQL NULL, and the order of keys is kept (PostgreSQL's `json`, not `jsonb`)."""

    impl = JSON(none_as_null=True)
    cache_ok = True


class JsonText(str):
    """JSON that is written out already; a JSON column stores it as it is.

    Writing out megabytes takes long, so it is done before the writing transaction and not in it.
    """


class _Now(FunctionElement[datetime]):
    type = UtcDateTime()
    name = "database_now"
    inherit_cache = True


def now(plus_seconds: float = 0.0) -> _Now:
    """The database's clock in milliseconds when the statement runs, some seconds later or (negative) earlier.

    Every time that is stored or compared comes from here: the clocks of API and worker machines may disagree.
    """
    return _Now(literal(float(plus_seconds), Float()))


@compiles(_Now, "sqlite")
def _now_sqlite(element: _Now, compiler: SQLCompiler, **kw: Any) -> str:
    # the three zeros make the text as wide as the one SQLAlchemy writes for a datetime
    seconds = compiler.process(element.clauses, **kw)
    return f"strftime('%Y-%m-%d %H:%M:%f000', 'now', printf('%+.3f seconds', {seconds}))"


@compiles(_Now, "postgresql")
def _now_postgresql(element: _Now, compiler: SQLCompiler, **kw: Any) -> str:
    # clock_timestamp, not now(): a transaction that waited for a lock must not judge leases by its beginning
    seconds = compiler.process(element.clauses, **kw)
    return f"date_trunc('milliseconds', clock_timestamp() + make_interval(secs => {seconds}))"


class NamingBase(DeclarativeBase):
    """Base of all tables; every constraint has a name that migrations on both databases can refer to."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {datetime: UtcDateTime, dict[str, Any]: JsonValue, list[str]: JsonValue}


class Database:
    """One database and its connections. Safe to share between threads, not between processes.

    On SQLite there is exactly one writing connection for each process: writers of one process queue for it, which is
    fair, instead of polling the file's lock, which is not.

    Args:
        url: `sqlite:///path` or `postgresql://user:password@host/name`.
        pool_size: How many readers, on PostgreSQL how many transactions, run at once; more wait.
    """

    def __init__(self, url: str, *, pool_size: int = 10) -> None:
        parsed = make_url(url)
        backend = {"postgres": "postgresql"}.get(parsed.get_backend_name(), parsed.get_backend_name())
        if backend == "sqlite":
            if not parsed.database or parsed.database == ":memory:" or "mode=memory" in parsed.database:
                raise ValueError("a SQLite database must be a file: several processes share it")
            self.url = parsed.set(drivername="sqlite+pysqlite")
        elif backend == "postgresql":
            self.url = parsed.set(drivername="postgresql+psycopg")
        else:
            raise ValueError(f"{backend!r} is not a database we know: sqlite:///path or postgresql://user@host/name")
        self.dialect: Literal["sqlite", "postgresql"] = cast(Literal["sqlite", "postgresql"], backend)
        if self.dialect == "sqlite":
            self._reader = _sqlite_engine(self.url, pool_size, begin="BEGIN", query_only=True)
            self._writer = _sqlite_engine(self.url, 1, begin="BEGIN IMMEDIATE", query_only=False)
        else:
            self._writer = _engine(self.url, pool_size, pool_pre_ping=True)
            self._reader = self._writer.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that sees one snapshot and cannot write."""
        with Session(self._reader, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that is committed at the end of the block, and rolled back if the block raises.

        On SQLite it holds the only write lock from its first statement on, so what it has read stays true. Never open
        another one inside it.
        """
        with Session(self._writer, expire_on_commit=False) as session, session.begin():
            # SQLAlchemy begins at the first statement; the lock is wanted now
            session.connection()
            yield session

    @contextmanager
    def connect(self) -> Iterator[Connection]:
        """A bare connection without a transaction, for migrations."""
        with self._writer.connect() as connection:
            yield connection

    def ping(self) -> None:
        """Ask the database for an answer; raises `sqlalchemy.exc.SQLAlchemyError` if there is none."""
        with self.read() as session:
            session.execute(select(literal(1)))

    def dispose(self) -> None:
        """Close all connections that are not in use."""
        self._reader.dispose()
        self._writer.dispose()


def _engine(url: Any, pool_size: int, **more: Any) -> Engine:
    return create_engine(
        url,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=BUSY_SECONDS,
        # NaN is not JSON: PostgreSQL refuses it, SQLite would keep it, so neither gets it
        json_serializer=_dumps,
        **more,
    )


def _dumps(value: Any) -> str:
    if isinstance(value, JsonText):
        return value
    return json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=False)


def _sqlite_engine(url: Any, pool_size: int, *, begin: str, query_only: bool) -> Engine:
    engine = _engine(url, pool_size, connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False})
    event.listen(engine, "connect", _sqlite_setup(query_only))
    event.listen(engine, "begin", lambda connection: connection.execute(text(begin)))
    return engine


def _sqlite_setup(query_only: bool) -> Callable[[sqlite3.Connection, ConnectionPoolEntry], None]:
    def setup(connection: sqlite3.Connection, _: ConnectionPoolEntry) -> None:
        # the module of Python 3.11 begins transactions by itself, deferred and too late; the begin hook does it
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode = WAL")
        # FULL: an answered 201 survives a power cut too
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        if query_only:
            connection.execute("PRAGMA query_only = ON")

    return setup
