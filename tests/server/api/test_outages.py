"""A database that is away, silent, locked or loses its answers: real servers, sockets and processes."""

import json
import os
import selectors
import signal
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import httpx
import psutil
import pytest
from sqlalchemy import make_url, text

from server.database import Database
from server.jobs import history
from server.keys import store as keys
from server.settings import Settings

pytestmark = pytest.mark.slow

BANDIT = {"kind": "tabular", "transitions": [[[1.0], [1.0]]], "rewards": [[0.0, 1.0]], "initial": [1.0], "horizon": 1}
ENDLESS = {"environment": BANDIT, "stop": {"updates": 10_000_000}}
OBSERVATION = {"observation": 0}


def until(condition: Callable[[], Any], what: str, seconds: float = 120.0) -> Any:
    """The first true value of the condition, which other programs bring about."""
    deadline = monotonic() + seconds
    while not (value := condition()):
        assert monotonic() < deadline, f"{what} did not happen within {seconds} s"
        sleep(0.02)
    return value


class Wire:
    """A proxy before a PostgreSQL server that can be cut, fall silent, or lose every second answer to a COMMIT.

    Attributes:
        url: Where the database is found through it.
        lost: How many answers to a COMMIT were lost.
    """

    def __init__(self, server: str) -> None:
        parsed = make_url(server)
        self._target = str(next(Path(str(parsed.query["host"])).glob(".s.PGSQL.*[0-9]")))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._port = self._listener.getsockname()[1]
        self.url = parsed.set(host="127.0.0.1", port=self._port, query={}).render_as_string(hide_password=False)
        self.lost = 0
        self.loses_answers = False
        self._commits = 0
        self._is_silent = threading.Event()
        self._is_cut = False
        self._lock = threading.Lock()
        self._ends: set[socket.socket] = set()
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        """From here on nothing listens, and what was open is closed."""
        self._is_cut = True
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for end in self._ends:
                end.shutdown(socket.SHUT_RDWR)

    def silence(self) -> None:
        """From here on everything is taken and nothing is handed on."""
        self._is_silent.set()

    def mend(self) -> None:
        """Make it work again."""
        self._is_silent.clear()
        if self._is_cut:
            self._is_cut = False
            self._listener = socket.create_server(("127.0.0.1", self._port))
            threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        try:
            while True:
                client, _ = listener.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(self._target)
                threading.Thread(target=self._carry, args=(client, server), daemon=True).start()
        except OSError:
            pass  # it was cut

    def _carry(self, client: socket.socket, server: socket.socket) -> None:
        other = {client: server, server: client}
        with self._lock:
            self._ends |= other.keys()
        loses = False
        with client, server, selectors.DefaultSelector() as ready:
            for end in other:
                ready.register(end, selectors.EVENT_READ)
            try:
                while True:
                    for key, _ in ready.select():
                        end = key.fileobj
                        assert isinstance(end, socket.socket)
                        data = end.recv(65_536)
                        if not data or (loses and end is server):
                            return
                        if self._is_silent.is_set():
                            continue
                        loses = end is client and b"COMMIT\0" in data and self._is_lost()
                        other[end].sendall(data)
            except OSError:
                pass
            finally:
                with self._lock:
                    self._ends -= other.keys()

    def _is_lost(self) -> bool:
        with self._lock:
            self._commits += self.loses_answers
            lost = self.loses_answers and self._commits % 2 == 1
            self.lost += lost
            return lost


@pytest.fixture
def wire(postgresql_database: Database) -> Iterator[Wire]:
    """A way to the PostgreSQL database of the test that can fail."""
    made = Wire(postgresql_database.url.set(drivername="postgresql").render_as_string(hide_password=False))
    yield made
    made.cut()


@pytest.fixture
def far_database(wire: Wire) -> Iterator[Database]:
    """The PostgreSQL database of the test, reached through the wire; it waits for no answer longer than 1.5 seconds."""
    database = Database(wire.url, lease_seconds=2.0)
    yield database
    database.dispose()


def events_of(database: Database, job_id: str) -> list[dict[str, Any]]:
    with database.read() as session:
        return history.events(session, job_id, 0, 10_000)


# --- answers that are lost -------------------------------------------------------------------------------------------


def test_lost_answers_to_commits_of_a_worker_double_nothing_and_cost_no_attempt(
    postgresql_database: Database, wire: Wire, serve: Any, start: Any
) -> None:
    with serve(Settings(), postgresql_database) as api:
        job = api.created("/v1/training-jobs", {"environment": BANDIT, "stop": {"updates": 60}, "seed": 1})
        wire.loses_answers = True
        start("worker", PGENGINE_DATABASE_URL=wire.url, PGENGINE_THREADS="1")
        ended = until(
            lambda: (found := api.get(f"/v1/training-jobs/{job['id']}").json())["is_terminal"] and found, "end"
        )
    assert (ended["status"], ended["attempt"]) == ("succeeded", 1)
    # the claim, reports and the end: each was lost once, and sent again
    assert wire.lost >= 3
    events = events_of(postgresql_database, job["id"])
    assert [event["data"]["status"] for event in events if event["type"] == "status"] == [
        "queued",
        "running",
        "succeeded",
    ]
    measured = [
        (event["data"]["from_update"], event["data"]["to_update"]) for event in events if event["type"] == "metrics"
    ]
    assert [update for first, last in measured for update in range(first, last + 1)] == list(range(1, 61))
    written = [event["data"]["checkpoint_id"] for event in events if event["type"] == "checkpoint"]
    assert len(set(written)) == len(written)


def test_a_creation_whose_answer_was_lost_is_repeated_with_its_key_and_a_cancellation_without(
    wire: Wire, far_database: Database, serve: Any, problem: Any
) -> None:
    with serve(Settings(), far_database) as api:
        until(lambda: api.get("/readyz").status_code == 200, "readiness")
        wire.loses_answers = True
        sent = {"json": ENDLESS | {"seed": 1}, "headers": {"idempotency-key": "once"}}
        answers = [api("POST", "/v1/training-jobs", **sent)]
        while answers[-1].status_code != 201:
            assert problem(answers[-1], 503, "unavailable")
            assert answers[-1].headers["retry-after"]
            answers.append(api("POST", "/v1/training-jobs", **sent))
        job = answers[-1].json()
        assert answers[-1].headers["idempotency-replayed"] == "true"
        cancelled = until(
            lambda: (answer := api.post(f"/v1/training-jobs/{job['id']}/cancel")).status_code == 200 and answer,
            "cancel",
        )
        assert cancelled.json()["status"] == "cancelled"
        wire.loses_answers = False
        jobs = until(lambda: (page := api.get("/v1/training-jobs")).status_code == 200 and page, "list").json()["data"]
        assert [one["id"] for one in jobs] == [job["id"]]
        assert [event["type"] for event in events_of(far_database, job["id"])] == ["status", "status"]


# --- outages ---------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("how", ["cut", "silence"])
def test_acting_goes_on_in_an_outage_and_all_else_says_so_at_once(
    wire: Wire, far_database: Database, serve: Any, problem: Any, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    clock = Clock()
    caplog.set_level("INFO", "server")

    def lines(event: str) -> int:
        return sum(record.getMessage() == event for record in caplog.records)

    with serve(Settings(), far_database, clock) as api:
        policy = api.created("/v1/policies", {"environment": BANDIT, "seed": 1})
        act = f"/v1/policies/{policy['id']}/act"
        reader = api.new_key("read")
        before = api.post(act, OBSERVATION | {"seed": 3})
        assert before.status_code == 200
        assert "policy-age-seconds" not in before.headers
        assert api.get("/v1/policies", key=reader).status_code == 200
        getattr(wire, how)()
        clock.now += 6  # what was known of the keys is old now
        old = until(
            lambda: "policy-age-seconds" in (answer := api.post(act, OBSERVATION | {"seed": 3})).headers and answer,
            "age",
        )
        assert old.status_code == 200
        assert old.json() == before.json()
        assert int(old.headers["policy-age-seconds"]) >= 2
        for answer in (
            api.get("/v1/policies", key=reader),
            api.post("/v1/policies", {"environment": BANDIT}),
            api.get("/readyz"),
            api.post(act, OBSERVATION, key="pgk_nobody_knows_whose_key_this_may_be"),
            api.post(f"/v1/policies/pol_{'0' * 32}/act", OBSERVATION),
        ):
            problem(answer, 503, "unavailable")
            assert answer.headers["retry-after"]
        assert "pgengine_database_up 0.0" in api.get("/metrics").text
        # a key is trusted for a time, not for ever
        clock.now += 300
        problem(api.post(act, OBSERVATION), 503, "unavailable")
        clock.now -= 300
        assert api.post(act, OBSERVATION).status_code == 200
        assert (lines("database_away"), lines("database_back")) == (1, 0)
        wire.mend()
        until(lambda: api.get("/readyz").status_code == 200, "the end of the outage")
        until(lambda: "policy-age-seconds" not in api.post(act, OBSERVATION).headers, "new knowledge")
        assert api.get("/v1/policies", key=reader).status_code == 200
        assert (lines("database_away"), lines("database_back")) == (1, 1)
        assert not [record for record in caplog.records if record.exc_info]


def test_a_stream_outlives_an_outage_and_misses_nothing(wire: Wire, postgresql_database: Database, start: Any) -> None:
    with postgresql_database.write() as session:
        _, key = keys.create(session, "test", ["admin"])
    api = start("api", "--port", "0", PGENGINE_DATABASE_URL=wire.url, PGENGINE_LEASE_SECONDS="5")
    url = api.wait_for(r"API +(http://\S+)").group(1)
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=60) as client:
        job = client.post("/v1/training-jobs", json=ENDLESS).json()
        path = f"/v1/training-jobs/{job['id']}/events"
        with client.stream("GET", path, headers={"accept": "text/event-stream"}) as stream:
            received = stream.iter_lines()
            next(line for line in received if line.startswith("data:") and '"queued"' in line)
            wire.cut()
            api.wait_for("database_away")
            wire.mend()
            api.wait_for("database_back")
            until(lambda: client.post(f"/v1/training-jobs/{job['id']}/cancel").status_code == 200, "cancel")
            next(line for line in received if line.startswith("data:") and '"cancelled"' in line)
    assert api.end() == 0
    events = [json.loads(line)["event"] for line in api.lines if line.startswith("{")]
    assert (events.count("database_away"), events.count("database_back")) == (1, 1)
    assert "Traceback" not in "\n".join(api.lines)


# --- locks that others hold ------------------------------------------------------------------------------------------


def test_a_worker_stopped_within_a_transaction_stops_nobody_else_and_its_job_heals(
    postgresql_database: Database, serve: Any, start: Any
) -> None:
    url = postgresql_database.url.set(drivername="postgresql").render_as_string(hide_password=False)
    lease = {"PGENGINE_LEASE_SECONDS": "10", "PGENGINE_RENEW_SECONDS": "1"}
    database = Database(url, lease_seconds=10)
    with serve(Settings(lease_seconds=10, renew_seconds=1), database) as api:
        job = api.created("/v1/training-jobs", ENDLESS)
        path = f"/v1/training-jobs/{job['id']}"
        worker = start("worker", PGENGINE_DATABASE_URL=url, PGENGINE_THREADS="1", **lease)
        until(lambda: api.get(path).json()["progress"]["updates"] > 0, "progress")
        name = f"pgengine {worker.process.pid}"
        _stop_within_a_transaction(postgresql_database, worker.process.pid, name)
        with ThreadPoolExecutor(9) as threads:
            cancelling = [threads.submit(api.post, f"{path}/cancel") for _ in range(8)]
            while not all(answer.done() for answer in cancelling):
                assert api.get(path).status_code == 200
                assert api.get("/readyz").status_code == 200
                assert api.get("/v1/policies", key=api.new_key("read")).status_code == 200
        for answer in cancelling:
            assert answer.result().status_code in (200, 503)
            assert answer.result().status_code == 200 or answer.result().headers["retry-after"]
        # the server has ended the session that held the row, so the job can be cancelled, and its lease runs out
        until(lambda: api.post(f"{path}/cancel").status_code == 200, "a cancellation")
        until(lambda: api.get(path).json()["status"] == "cancelled", "the end of the lease")
    worker.process.send_signal(signal.SIGCONT)
    database.dispose()


def _stop_within_a_transaction(database: Database, pid: int, name: str) -> None:
    """Stop a worker, with SIGSTOP, while its transaction holds the row of its job."""
    for _ in range(100):
        with database.connect() as blocking:
            blocking.execute(text("LOCK TABLE event IN SHARE MODE"))
            # the row is locked before an event is written, which waits for us now
            until(lambda: _in_state(database, name, "active", locked=True), "a report")
            os.kill(pid, signal.SIGSTOP)
            blocking.rollback()
            try:
                until(lambda: _in_state(database, name, "idle in transaction"), "a stopped transaction", 1.0)
                return
            except AssertionError:
                os.kill(pid, signal.SIGCONT)
    raise AssertionError("the worker was never stopped within a transaction")


def _in_state(database: Database, name: str, state: str, *, locked: bool = False) -> bool:
    """Whether a connection of this program is in this state, and waits for a lock."""
    found = text("SELECT wait_event_type FROM pg_stat_activity WHERE application_name = :name AND state = :state")
    with database.read() as session:
        waits_for = session.scalars(found, {"name": name, "state": state}).all()
    return "Lock" in waits_for if locked else bool(waits_for)


@pytest.fixture
def held(tmp_path: Path) -> Callable[[Path], sqlite3.Connection]:
    """Takes the write lock of a SQLite file, as another program would."""

    def hold(file: Path) -> sqlite3.Connection:
        connection = sqlite3.connect(file, isolation_level=None, timeout=60)
        connection.execute("BEGIN IMMEDIATE")
        return connection

    return hold


def test_writers_behind_a_held_lock_stop_no_reader_and_are_told_to_come_again(
    sqlite_database: Database, serve: Any, held: Any, problem: Any
) -> None:
    with serve(Settings(), sqlite_database) as api:
        job = api.created("/v1/training-jobs", ENDLESS)
        reader = api.new_key("read")
        lock = held(sqlite_database.url.database)
        with ThreadPoolExecutor(8) as threads:
            writing: list[Future[httpx.Response]] = [
                threads.submit(api.post, "/v1/policies", {"environment": BANDIT}) for _ in range(8)
            ]
            reads = 0
            while not all(answer.done() for answer in writing):
                assert api.get(f"/v1/training-jobs/{job['id']}", key=reader).status_code == 200
                assert api.get("/readyz").status_code == 200
                reads += 1
        assert reads >= 3
        for answer in writing:
            problem(answer.result(), 503, "unavailable")
            assert answer.result().headers["retry-after"]
        lock.execute("ROLLBACK")
        lock.close()
        assert api.post("/v1/policies", {"environment": BANDIT}).status_code == 201


def test_a_stop_waits_for_no_thread_that_waits_for_a_lock(start: Any, held: Any, tmp_path: Path) -> None:
    server = start(
        "serve", "--port", "0", PGENGINE_WORKERS="0", PGENGINE_GRACE_SECONDS="0.1", PGENGINE_LEASE_SECONDS="3600"
    )
    url = server.wait_for(r"API +(http://\S+)").group(1)
    key = server.wait_for(r"key +(pgk_\S+)").group(1)
    lock = held(tmp_path / "data" / "pgengine.db")
    with (
        ThreadPoolExecutor(4) as threads,
        httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=60) as client,
    ):

        def post() -> int | None:
            try:
                return client.post("/v1/policies", json={"environment": BANDIT}).status_code
            except httpx.TransportError:
                return None

        process = psutil.Process(server.process.pid)
        assert client.get("/readyz").status_code == 200
        before = process.num_threads()
        writing = [threads.submit(post) for _ in range(4)]
        # each of them takes a thread of the server, which waits for the lock
        until(lambda: process.num_threads() >= before + len(writing), "requests that wait")
        assert server.end() == 0
        assert {answer.result() for answer in writing} <= {None, 503}
    lock.close()
    assert any("threads_abandoned" in line for line in server.lines)
