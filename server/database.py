"""The database: how to reach it, its two kinds of transaction, and its clock.

Knows SQLite and PostgreSQL; knows no table. Everything that differs between the two and is not SQL of a table is here
and in `engines`.

    with database.read() as session:     a snapshot; writing in it is an error on both databases
    with database.write() as session:    commits at the end, rolls back on an exception
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, cast

from sqlalchemy import (
    JSON,
    URL,
    Connection,
    DateTime,
    Dialect,
    MetaData,
    TypeDecorator,
    func,
    literal,
    make_url,
    select,
)
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Session
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import Float

from server.engines import File, Limits, postgresql_engine, sqlite_engine, trouble
from server.errors import Unavailable
from server.health import Health, Outage

__all__ = [
    "ESCAPES",
    "Database",
    "JsonText",
    "JsonValue",
    "NamingBase",
    "UtcDateTime",
    "exclusively",
    "make_private",
    "new_private_file",
    "now",
    "unescaped",
]

BUSY = "Others hold what is needed in the database, or it took too long there; try again."


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

    A transaction raises `Unavailable` where the database does not answer, or others hold what it needs for longer than
    the limits say. `health` has one view of that for the whole process.

    Args:
        url: `sqlite:///path` or `postgresql://user:password@host/name`.
        pool_size: How many readers, on PostgreSQL how many transactions, run at once; more wait.
        lease_seconds: All limits on waiting lie below it.
        health: What is known of this database, if another one in this process knows it.
    """

    def __init__(
        self, url: str, *, pool_size: int = 20, lease_seconds: float = 10.0, health: Health | None = None
    ) -> None:
        parsed = _parsed(url)
        backend = {"postgres": "postgresql"}.get(parsed.get_backend_name(), parsed.get_backend_name())
        self.health = health or Health()
        self._file = File()
        self._lease_seconds = lease_seconds
        limits = Limits.below(lease_seconds)
        if backend == "sqlite":
            if not parsed.database or parsed.database == ":memory:" or "mode=memory" in parsed.database:
                raise ValueError("a SQLite database must be a file: several processes share it")
            self.url = parsed.set(drivername="sqlite+pysqlite")
            self._reader = sqlite_engine(
                self.url, self._file, json_serializer=_dumps, limits=limits, pool_size=pool_size, query_only=True
            )
            self._writer = sqlite_engine(self.url, self._file, json_serializer=_dumps, limits=limits)
            self._patient = sqlite_engine(self.url, self._file, json_serializer=_dumps)
        elif backend == "postgresql":
            self.url = parsed.set(drivername="postgresql+psycopg")
            self._writer = postgresql_engine(self.url, limits=limits, pool_size=pool_size, json_serializer=_dumps)
            self._reader = self._writer.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            self._patient = postgresql_engine(self.url, limits=None, json_serializer=_dumps)
        else:
            raise ValueError(f"{backend!r} is not a database we know: sqlite:///path or postgresql://user@host/name")
        self.dialect: Literal["sqlite", "postgresql"] = cast(Literal["sqlite", "postgresql"], backend)

    def another(self, pool_size: int) -> "Database":
        """The same database with connections of its own, for work that must not wait for the others'."""
        url = self.url.render_as_string(hide_password=False)
        return Database(url, pool_size=pool_size, lease_seconds=self._lease_seconds, health=self.health)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that sees one snapshot and cannot write.

        Raises:
            Unavailable: if the database does not answer.
        """
        with self._watched(writing=False), Session(self._reader, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that is committed at the end of the block, and rolled back if the block raises.

        On SQLite it holds the only write lock from its first statement on, so what it has read stays true. Never open
        another one inside it.

        Raises:
            Unavailable: if the database does not answer, or others hold what the transaction needs. If it is raised at
                the end, the transaction may have been committed all the same.
        """
        with (
            self._watched(writing=True),
            Session(self._writer, expire_on_commit=False) as session,
            session.begin(),
        ):
            # SQLAlchemy begins at the first statement; the lock is wanted now
            session.connection()
            yield session

    @contextmanager
    def connect(self) -> Iterator[Connection]:
        """A bare connection without a transaction and without limits on its statements, for migrations."""
        with self._watched(writing=True), self._patient.connect() as connection:
            yield connection

    def ping(self) -> None:
        """Ask the database for an answer; raises `Unavailable` if there is none."""
        with self.read() as session:
            session.execute(select(literal(1)))

    def dispose(self) -> None:
        """Close all connections that are not in use."""
        for engine in (self._reader, self._writer, self._patient):
            engine.dispose()

    @contextmanager
    def _watched(self, *, writing: bool) -> Iterator[None]:
        with self.health.watching():
            self._file.check()
            try:
                yield
            except SQLAlchemyError as error:
                match trouble(error, writing=writing):
                    case "away":
                        raise Outage(_reason(error)) from error
                    case "busy":
                        raise Unavailable(BUSY) from error
                raise


def _reason(error: SQLAlchemyError) -> str:
    """What the driver says, in one line."""
    return " ".join(str(getattr(error, "orig", error)).split())


def _dumps(value: Any) -> str:
    # NaN is not JSON: PostgreSQL refuses it, SQLite would keep it, so neither gets it
    if isinstance(value, JsonText):
        return value
    return json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=False)


def exclusively(session: Session, name: str) -> None:
    """Wait until no other writing transaction has the same name for what it does, and keep them out until the end."""
    # on SQLite the transaction has the only write lock already
    if session.get_bind().dialect.name == "postgresql":
        digest = sha256(name.encode()).digest()
        session.execute(select(func.pg_advisory_xact_lock(int.from_bytes(digest[:8], signed=True))))


# --- where it is ------------------------------------------------------------------------------------------------------

ESCAPES = "in a password @ is written %40, : is %3A, / is %2F, and % itself is %25"
_QUERY = re.compile(r"\?[\w.]+=[^?]*$")


def unescaped(url: str) -> str:
    """Characters of the password that a URL has a meaning of its own for, as they stand in the URL; "" for none."""
    backend, _, rest = url.partition("://")
    user_and_password, _, _ = _QUERY.sub("", rest).rpartition("@")
    password = user_and_password.partition(":")[2]
    return "" if backend.startswith("sqlite") else "".join(sorted(set(password) & set("@:/?#[]")))


def _parsed(url: str) -> URL:
    """The parts of a URL.

    Raises:
        ValueError: if it can be read in several ways or in none; the message repeats nothing of it.
    """
    if "@" in unescaped(url):
        raise ValueError(f"there is more than one @ before the host: {ESCAPES}")
    try:
        return make_url(url)
    except (ValueError, ArgumentError):
        raise ValueError(
            f"this is no URL such as sqlite:///path or postgresql://user:password@host:5432/name; {ESCAPES}"
        ) from None


# --- files of SQLite --------------------------------------------------------------------------------------------------


def new_private_file(file: Path) -> None:
    """Make an empty file that only its owner can read. SQLite gives its log and its index the same rights."""
    os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def make_private(file: Path) -> list[Path]:
    """See to it that only the owner can read a SQLite database: a new one, and all files of one that exists.

    Its directory is made if it is missing, and closed to others too if it holds nothing else.

    Args:
        file: The database.

    Returns:
        What others may still read, because it belongs to another user.

    Raises:
        OSError: if the directory or the file cannot be made.
    """
    directory = file.parent
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not file.exists():
        try:
            new_private_file(file)
        except FileExistsError:
            pass  # another program has made it meanwhile
    inside = list(directory.iterdir())
    ours = [path for path in inside if path.name.startswith(file.name) and path.is_file()]
    open_still = []
    for path in [*ours, directory] if len(ours) == len(inside) else ours:
        try:
            if (mode := path.stat().st_mode) & 0o077:
                path.chmod(mode & 0o7700)
        except FileNotFoundError:
            pass  # a log of a database that was closed at this moment
        except PermissionError:
            open_still.append(path)
    return open_still
