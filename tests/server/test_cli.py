import contextlib
import json
import os
import re
import signal
import socket
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from sqlalchemy import make_url
from typer.testing import CliRunner, Result

from migrations import expected, state
from server import __version__
from server.cli import program
from server.database import Database
from server.keys import store

HEADERS = {"content-type": "application/json"}


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(program, arguments)


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("PGENGINE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PGENGINE_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("PGENGINE_PORT", "0")
    return tmp_path / "data"


@contextlib.contextmanager
def _open(data_dir: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{data_dir / 'pgengine.db'}")
    yield database
    database.dispose()


# --- commands that end by themselves


def test_help_names_every_command_and_version_is_printed() -> None:
    text = _run("--help").output
    for name in ("serve", "api", "worker", "migrate", "keys", "--version"):
        assert name in text
    for name in ("create", "list", "revoke"):
        assert name in _run("keys", "--help").output
    assert _run("--version").output == f"{__version__}\n"
    assert "serve" in _run().output


def test_migrate_goes_up_and_down_and_keeps_a_copy(data_dir: Path) -> None:
    assert _run("migrate").output == f"migrated from revision none to {expected()}\n"
    assert _run("migrate").output == f"the database is at revision {expected()} already\n"
    with _open(data_dir) as database:
        assert state(database).matches
    down = _run("migrate", "--to", "base").output
    assert f"migrated from revision {expected()} to none" in down
    assert Path(down.split(": ")[1].strip()).is_file()
    unknown = _run("migrate", "--to", "0815")
    assert unknown.exit_code == 1
    assert unknown.stderr.startswith("error: there is no revision '0815'; there are base, 0001, 0002, ")
    assert unknown.stderr.endswith(f", {expected()}\n")


def test_keys_are_made_listed_and_revoked(data_dir: Path) -> None:
    _run("migrate")
    made = _run("keys", "create", "dashboard", "--scope", "read", "--scope", "act").output
    key_id, secret = made.split()[0], made.split()[-1]
    with _open(data_dir) as database, database.read() as session:
        identity = store.verify(session, secret)
        assert identity == store.Identity(key_id, frozenset({"read", "act"}))
    listed = _run("keys", "list").output
    assert key_id in listed
    assert "dashboard" in listed
    assert secret not in listed
    assert _run("keys", "revoke", key_id).output == f"{key_id} is revoked\n"
    assert "revoked" in _run("keys", "list").output
    with _open(data_dir) as database, database.read() as session:
        assert store.verify(session, secret) is None


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["keys", "create", "x", "--scope", "root"], 2, "root is no scope; there are read, act, train, admin"),
        (["keys", "create", "x"], 2, "Missing option"),
        (["keys", "create", "PGENGINE_API_KEY", "--scope", "read"], 2, "choose another name"),
        (["keys", "revoke", "../etc"], 2, "looks like key_"),
        (["keys", "revoke", "key_" + "0" * 32], 1, "no such key"),
        (["keys", "list", "--database-url", "mysql://root@localhost/x"], 2, "'mysql' is not a database we know"),
        (["api", "--database-url", "postgresql://u:geheim@127.0.0.1:1/x"], 1, "does not answer"),
        (["api", "--database-url", "postgresql://u:ge@heim@127.0.0.1/x"], 2, "@ is written %40"),
        (["api", "--database-url", "postgresql://u:ge@he:im/@127.0.0.1:1/x"], 2, "@ is written %40"),
        (["api", "--database-url", "postgresql://u:ge@he/im@127.0.0.1:1/x?sslmode=prefer"], 2, "@ is written %40"),
        (["api", "--database-url", "postgresql://u:ge?x@heim@127.0.0.1:1/x"], 2, "@ is written %40"),
        (["api", "--database-url", "postgresql://u:ge:heim@127.0.0.1:1/x"], 1, "(its password has : in it: "),
        (["api", "--database-url", "postgresql://u:ge/heim@127.0.0.1:1/x"], 1, "(its password has / in it: "),
        (["api", "--database-url", "postgresql://u:geheim@127.0.0.1:port/x"], 2, "this is no URL such as"),
        (["api", "--database-url", "geheim"], 2, "this is no URL such as"),
        (["serve", "--no-auth", "--host", "0.0.0.0"], 2, "PGENGINE_NO_AUTH works on a loopback PGENGINE_HOST only"),
        (["serve", "--port", "70000"], 2, "PGENGINE_PORT: Input should be less than or equal to 65535"),
        (["serve", "--host", "203.0.113.7"], 1, "203.0.113.7 is not an address of this machine"),
        (["serve", "--data-dir", "/dev/null/data"], 1, "cannot write to /dev/null/data: Not a directory"),
        (["worker", "--data-dir", "/dev/null/data"], 1, "cannot write to /dev/null/data: Not a directory"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(data_dir: Path, arguments: list[str], status: int, message: str) -> None:
    _run("migrate")
    with _signals_as_they_were():
        result = _run(*arguments)
    assert result.exit_code == status
    assert message in result.stderr
    assert "Traceback" not in result.output + result.stderr
    assert not re.search("geheim|heim@", result.output + result.stderr)


@pytest.mark.parametrize("command", ["serve", "api", "worker", "migrate"])
def test_a_file_that_is_no_database_is_named(data_dir: Path, tmp_path: Path, command: str) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("not a database, but long enough to be looked at as one " * 20)
    with _signals_as_they_were():
        result = _run(command, "--database-url", f"sqlite:///{file}")
    assert result.exit_code == 1
    assert result.stderr.endswith(f"{file} cannot be used: file is not a database\n")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["serve", "api", "worker"])
@pytest.mark.parametrize("module", ["no_such_module", "no_such_package.module", "."])
def test_a_module_that_is_missing_is_named(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, command: str, module: str
) -> None:
    _run("migrate")
    monkeypatch.setenv("PGENGINE_ENVIRONMENT_MODULES", module)
    with _signals_as_they_were():
        result = _run(command)
    assert result.exit_code == 2
    assert result.stderr == f"error: PGENGINE_ENVIRONMENT_MODULES: there is no module {module}\n"


def test_a_module_whose_package_fails_is_told_with_the_reason(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "failing_package").mkdir()
    (tmp_path / "failing_package" / "__init__.py").write_text("raise ValueError('no licence for the simulator')")
    monkeypatch.syspath_prepend(tmp_path)
    _run("migrate")
    monkeypatch.setenv("PGENGINE_ENVIRONMENT_MODULES", "failing_package.worlds")
    with _signals_as_they_were():
        result = _run("worker")
    assert result.exit_code == 2
    assert result.stderr.endswith(
        "failing_package.worlds cannot be imported: ValueError: no licence for the simulator\n"
    )


def test_a_module_that_fails_is_named(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "failing_environments.py").write_text("raise ValueError('no licence')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PGENGINE_ENVIRONMENT_MODULES", "failing_environments")
    _run("migrate")
    with _signals_as_they_were():
        result = _run("api")
    assert result.exit_code == 2
    message = "failing_environments cannot be imported: ValueError: no licence"
    assert result.stderr == f"error: PGENGINE_ENVIRONMENT_MODULES: {message}\n"


def _rights(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_database_and_its_copies_are_for_their_owner_alone(data_dir: Path) -> None:
    before = os.umask(0o022)
    try:
        _run("migrate")
        with _open(data_dir) as database, database.write() as session:
            store.create(session, "x", ["read"])
            # SQLite's log and index are there while the database is open
            files = {path.name: _rights(path) for path in data_dir.iterdir()}
            assert files == dict.fromkeys(("pgengine.db", "pgengine.db-wal", "pgengine.db-shm"), 0o600)
        _run("migrate", "--to", "base")
        assert len(list(data_dir.iterdir())) == 2
        assert all(_rights(path) == 0o600 for path in data_dir.iterdir())
        assert _rights(data_dir) == 0o700
    finally:
        os.umask(before)


def test_what_was_open_to_others_is_closed(data_dir: Path) -> None:
    _run("migrate")
    (data_dir / "pgengine.db.0001.backup").touch(0o644)
    for path, rights in ((data_dir, 0o755), (data_dir / "pgengine.db", 0o664)):
        path.chmod(rights)
    assert _run("keys", "list").exit_code == 0
    assert _rights(data_dir) == 0o700
    assert all(_rights(path) == 0o600 for path in data_dir.iterdir())


def test_a_directory_with_other_things_in_it_stays_as_it_is(data_dir: Path) -> None:
    data_dir.mkdir(mode=0o755)
    (data_dir / "notes.txt").touch(0o644)
    _run("migrate")
    assert (_rights(data_dir), _rights(data_dir / "notes.txt")) == (0o755, 0o644)
    assert _rights(data_dir / "pgengine.db") == 0o600


@contextlib.contextmanager
def _signals_as_they_were() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_taken_port_is_named(data_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, _signals_as_they_were():
        port = taken.getsockname()[1]
        result = _run("serve", "--port", str(port))
    assert result.exit_code == 1
    assert result.stderr == (f"error: port {port} of 127.0.0.1 is taken; choose another with --port or PGENGINE_PORT\n")


@pytest.mark.parametrize("command", ["serve", "api", "worker", "keys"])
def test_a_database_of_another_revision_is_left_alone(data_dir: Path, command: str) -> None:
    _run("migrate")
    with _open(data_dir) as database, database.write() as session:
        session.connection().exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with _signals_as_they_were():
        result = _run(*{"serve": ["serve", "--port", "0"], "keys": ["keys", "list"]}.get(command, [command]))
    assert result.exit_code == 1
    assert "revision 9999, made by a newer version" in result.stderr


@pytest.mark.parametrize("command", ["api", "worker"])
def test_api_and_worker_do_not_migrate(data_dir: Path, command: str) -> None:
    with _signals_as_they_were():
        result = _run(command)
    assert result.exit_code == 1
    assert "run `python -m server migrate`" in result.stderr


# --- programs that run until they are told to stop

slow = pytest.mark.slow


def _post_job(url: str, headers: dict[str, str], **stop: Any) -> dict[str, Any]:
    body = {"environment": {"kind": "gymnasium", "id": "CartPole-v1"}, "stop": {"target_return": None, **stop}}
    answer = httpx.post(f"{url}/v1/training-jobs", headers=headers, json=body)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def _event_types(url: str, headers: dict[str, str], job_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
    headers = headers | {"accept": "text/event-stream"}
    with httpx.stream("GET", f"{url}/v1/training-jobs/{job_id}/events", headers=headers, timeout=60) as stream:
        assert stream.status_code == 200
        for line in stream.iter_lines():
            if line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                yield event["type"], event["data"]


@slow
def test_serve_from_the_first_start_to_the_second(start: Any, tmp_path: Path) -> None:
    server = start("serve", PGENGINE_PORT="0")
    key = server.wait_for(r"^key +(pgk_\S+)")[1]
    url = server.wait_for(r"^API +(\S+)")[1]
    assert server.wait_for(r"^data +(\S+)")[1] == str(tmp_path / "data" / "pgengine.db")
    assert httpx.get(server.wait_for(r"^docs +(\S+)")[1]).status_code == 200
    curl = server.wait_for(r"^try +(curl .*)")[1]
    assert f"Bearer {key}" in curl
    assert httpx.get(f"{url}/v1/training-jobs").status_code == 401
    job = _post_job(url, {"authorization": f"Bearer {key}"}, updates=2)
    assert server.end(signal.SIGINT) == 0

    again = start("serve", PGENGINE_PORT="0")
    assert "one of those in the database" in again.wait_for("^key .*")[0]
    url = again.wait_for(r"^API +(\S+)")[1]
    again.wait_for("^try .*")
    assert key not in "\n".join(again.lines)
    kept = httpx.get(f"{url}/v1/training-jobs/{job['id']}", headers={"authorization": f"Bearer {key}"})
    assert kept.json()["id"] == job["id"]
    assert again.end() == 0


@slow
def test_on_postgresql_the_greeting_says_where_the_data_is_and_hides_the_password(
    start: Any, postgresql_url: str
) -> None:
    parsed = make_url(postgresql_url).set(password="geheim")
    url = parsed.update_query_dict({"connect_timeout": "5"}).render_as_string(hide_password=False)
    server = start("serve", PGENGINE_PORT="0", PGENGINE_WORKERS="0", PGENGINE_DATABASE_URL=url)
    shown = make_url(server.wait_for(r"^data +(\S+)")[1])
    assert (shown.drivername, shown.username, shown.database) == ("postgresql", parsed.username, parsed.database)
    # a server that listens at a socket is found by its directory alone
    assert shown.query == {"host": parsed.query["host"]}
    assert server.end() == 0
    assert "geheim" not in "\n".join(server.lines)


@slow
def test_a_start_behind_a_lock_that_is_not_freed_ends_with_one_line(start: Any, tmp_path: Path) -> None:
    settings = {"PGENGINE_PORT": "0", "PGENGINE_WORKERS": "0", "PGENGINE_LEASE_SECONDS": "5"}
    first = start("serve", **settings)
    first.wait_for("^try ")
    assert first.end() == 0
    lock = sqlite3.connect(tmp_path / "data" / "pgengine.db", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    second = start("serve", **settings)
    assert second.wait(timeout=240) == 1
    lock.close()
    assert len(second.lines) == 1
    assert re.fullmatch(r"error: the database \S+ cannot be used: Others hold what is needed .*", second.lines[0])


@slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_everything_before_any_grace_period_is_over_open_streams_too(start: Any, number: int) -> None:
    # what would have to be cut off, be it a stream or a trainer, would take five minutes
    server = start("serve", PGENGINE_PORT="0", PGENGINE_NO_AUTH="1", PGENGINE_GRACE_SECONDS="300")
    url = server.wait_for(r"^API +(\S+)")[1]
    job = _post_job(url, {}, updates=1_000_000)
    events = _event_types(url, {}, job["id"])
    for kind, _ in events:
        if kind == "metrics":
            break
    tree = server.tree()
    assert len(tree) >= 3  # the server, a worker, a trainer
    assert server.end(number, timeout=240) == 0
    with contextlib.suppress(httpx.RemoteProtocolError):
        for _ in events:  # the stream ends
            pass
    assert psutil.wait_procs(tree, timeout=60)[1] == []


@slow
def test_a_dead_worker_is_replaced_and_its_job_goes_on(start: Any) -> None:
    server = start(
        "serve", PGENGINE_PORT="0", PGENGINE_NO_AUTH="1", PGENGINE_LEASE_SECONDS="1", PGENGINE_RENEW_SECONDS="0.2"
    )
    url = server.wait_for(r"^API +(\S+)")[1]
    first = json.loads(server.wait_for(r'.*"worker_started".*')[0])["pid"]
    job = _post_job(url, {}, updates=1_000_000)
    events = _event_types(url, {}, job["id"])
    next(kind for kind, _ in events if kind == "metrics")
    seen = len(server.lines)
    os.kill(first, signal.SIGKILL)
    second = json.loads(server.wait_for(r'.*"worker_started".*', after=seen)[0])["pid"]
    assert second != first
    rewind = next(data for kind, data in events if kind == "rewind")
    assert rewind["to_update"] >= 0
    events.close()
    assert server.end() == 0


@slow
def test_workers_end_when_their_server_is_killed(start: Any) -> None:
    server = start("serve", PGENGINE_PORT="0", PGENGINE_NO_AUTH="1")
    server.wait_for(r'"trainer_started"')
    server.wait_for(r"^API +(\S+)")
    tree = server.tree()
    assert len(tree) >= 3
    server.process.kill()
    assert psutil.wait_procs(tree[1:], timeout=240)[1] == []


@slow
def test_the_operators_key_works_and_is_not_shown(start: Any) -> None:
    secret = "a-secret-of-the-operator"
    server = start("serve", PGENGINE_PORT="0", PGENGINE_API_KEY=f"{secret}\n", PGENGINE_WORKERS="1")
    url = server.wait_for(r"^API +(\S+)")[1]
    assert httpx.get(f"{url}/v1/policies", headers={"authorization": f"Bearer {secret}"}).status_code == 200
    server.wait_for(r"trainer_started")
    serving, *started = server.tree()
    assert secret in serving.environ()["PGENGINE_API_KEY"]
    assert len(started) >= 2
    assert all(secret not in " ".join(process.environ().values()) for process in started)
    assert server.end() == 0
    assert secret not in "\n".join(server.lines)


@slow
def test_another_key_of_the_operator_replaces_the_one_before(start: Any) -> None:
    old, new = "a-secret-of-the-operator", "another-one-of-the-operator"
    for secret, known in (
        (old, r"^key +the one in PGENGINE_API_KEY"),
        (new, r"key_revoked.*key_\w+.*the variable names another key"),
    ):
        server = start("serve", PGENGINE_PORT="0", PGENGINE_API_KEY=secret, PGENGINE_WORKERS="0")
        url = server.wait_for(r"^API +(\S+)")[1]
        server.wait_for(known)
        answers = [httpx.get(f"{url}/v1/policies", headers={"authorization": f"Bearer {key}"}) for key in (old, new)]
        assert [answer.status_code for answer in answers] == ([200, 401] if secret == old else [401, 200])
        assert server.end() == 0
    server = start("serve", PGENGINE_PORT="0", PGENGINE_WORKERS="0")
    server.wait_for(r"^key +the one that PGENGINE_API_KEY named at an earlier start; .* keys revoke key_\w+` ends it")
    assert server.end() == 0


@slow
def test_an_ipv6_address(start: Any) -> None:
    server = start("serve", "--host", "::1", "--port", "0", "--no-auth", PGENGINE_WORKERS="0")
    url = server.wait_for(r"^API +(\S+)")[1]
    assert url.startswith("http://[::1]:")
    assert httpx.get(f"{url}/readyz").status_code == 200
    assert server.end() == 0


@slow
def test_the_server_asks_the_engine_for_checks_and_explanations(start: Any) -> None:
    server = start("serve", PGENGINE_PORT="0", PGENGINE_NO_AUTH="1")
    url = server.wait_for(r"^API +(\S+)")[1]
    bandit = {"kind": "gymnasium", "id": "pgengine/Bandit-v0"}
    check = httpx.post(f"{url}/v1/gradient-checks", json={"environment": bandit, "batches": 8}, timeout=60)
    assert check.status_code == 201, check.text
    job = _post_job(url, {}, updates=1)
    assert [data["status"] for kind, data in _event_types(url, {}, job["id"]) if kind == "status"][-1] == "succeeded"
    explained = httpx.get(f"{url}/v1/training-jobs/{job['id']}/updates/1?episodes=1", timeout=60)
    assert explained.status_code == 200, explained.text
    path = f"{url}/v1/gradient-checks/{check.json()['id']}"
    # a stream ends with the check
    httpx.get(f"{path}/events", headers={"accept": "text/event-stream"}, timeout=60)
    assert httpx.get(path).json()["status"] == "succeeded"
    assert server.end() == 0
