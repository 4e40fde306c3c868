"""Workers as real processes on real databases, and what happens to jobs when something goes wrong."""

import importlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
from sqlalchemy import select

import pgengine
from pgengine.checking import check_steps
from pgengine.spec import (
    AlgorithmSpec,
    EnvironmentSpec,
    EvaluationSpec,
    GradientCheckSpec,
    GymnasiumSpec,
    MlpPolicySpec,
    SgdSpec,
    StopSpec,
    TabularSpec,
    TrainingSpec,
)
from server.checkpoints import store as checkpoints
from server.database import Database, NamingBase
from server.ids import new_id
from server.jobs import history, store
from server.memory import LEAST_BYTES
from server.tables import TERMINAL_STATUSES, Environment, Job, Policy
from server.worker.stop import EXIT_WITH_STDIN

pytestmark = pytest.mark.slow

CHECKPOINT_SECONDS = 0.3
START_SECONDS = 600.0
"""When a test gives up; a busy machine takes long to import torch."""

HANGING = "an environment hangs"

ROOM = 4 * 2**30
"""Memory of a trainer whose jobs take little."""

PROGRAM = """
from server.database import Database
from server.settings import Settings
from server.worker.supervisor import run_supervisor

settings = Settings()
run_supervisor(Database(settings.database_url), settings)
"""


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true value of the condition, which other processes bring about."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.02)
    return value


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Worker:
    """A supervisor process with its trainer."""

    def __init__(self, database: Database, log: Path, *, stdin: int | None = None, **settings: object) -> None:
        self._log = log
        here = str(Path(__file__).parent)
        url = database.url.render_as_string(hide_password=False)
        defaults = {"lease_seconds": 3, "renew_seconds": 0.5, "checkpoint_seconds": CHECKPOINT_SECONDS, "threads": 1}
        named = {
            "database_url": url,
            "environment_modules": "misbehaving_environments",
            "poll_seconds": 0.1,
            "grace_seconds": 1,
            **defaults,
            **settings,
        }
        environment = {f"PGENGINE_{name.upper()}": str(value) for name, value in named.items()}
        parent = {EXIT_WITH_STDIN: "1"} if stdin is not None else {}
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM],
                env={**os.environ, "PYTHONPATH": here, **environment, **parent},
                stdin=subprocess.DEVNULL if stdin is None else stdin,
                stderr=stderr,
            )

    def text(self) -> str:
        """All that it has logged."""
        return self._log.read_text()

    def log(self, event: str) -> list[dict[str, Any]]:
        """The lines of this kind that it has logged."""
        lines = [line for line in self.text().splitlines() if line.startswith("{") and line.endswith("}")]
        return [line for line in map(json.loads, lines) if line["event"] == event]

    def trainer(self) -> int:
        """Process id of the newest trainer."""
        started = until(lambda: self.log("trainer_started"), START_SECONDS, "the start of a trainer")
        return int(started[-1]["trainer"])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def start_worker(database: Database, tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """Starts workers, and ends those that live after the test."""
    workers: list[Worker] = []

    def start(**settings: Any) -> Worker:
        workers.append(Worker(database, tmp_path / f"worker-{len(workers)}.log", **settings))
        return workers[-1]

    yield start
    for worker in workers:
        worker.kill()
        print(worker.text())


@pytest.fixture(scope="module")
def steady_database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """A database for jobs that leave their worker well."""
    database = Database(f"sqlite:///{tmp_path_factory.mktemp('steady') / 'pgengine.db'}")
    with database.connect() as connection:
        NamingBase.metadata.create_all(connection)
        connection.commit()
    yield database
    database.dispose()


@pytest.fixture(scope="module")
def steady_worker(steady_database: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """A worker that serves one job after another."""
    log = tmp_path_factory.mktemp("worker") / "log"
    worker = Worker(steady_database, log, stall_seconds=10, grace_seconds=3, trainer_memory_bytes=ROOM)
    yield worker
    worker.kill()
    print(worker.text())


@pytest.fixture(autouse=True)
def _known_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    importlib.import_module("misbehaving_environments")


def cartpole(updates: int = 300, seed: int = 3) -> TrainingSpec:
    """A few seconds of training that end after a fixed number of updates."""
    return TrainingSpec(
        environment=GymnasiumSpec(id="CartPole-v1"),
        policy=MlpPolicySpec(hidden=[16]),
        # slow to learn, so that episodes stay short
        algorithm=AlgorithmSpec(trajectories=8, optimizer=SgdSpec(learning_rate=1e-6)),
        stop=StopSpec(updates=updates, target_return=None),
        evaluation=EvaluationSpec(episodes=4),
        seed=seed,
    )


def misbehaving(environment_id: str) -> TrainingSpec:
    return TrainingSpec(
        environment=GymnasiumSpec(id=environment_id),
        policy=MlpPolicySpec(hidden=[4]),
        algorithm=AlgorithmSpec(trajectories=2),
        stop=StopSpec(updates=10_000_000, target_return=None),
    )


def submit(database: Database, spec: TrainingSpec, *, max_attempts: int = 3) -> str:
    """Queue a job on a policy of its own."""
    facts = pgengine.describe(spec.environment)
    resolved = pgengine.resolve(spec, facts)
    policy = pgengine.create_policy(resolved.policy, spec.environment, facts, seed=spec.seed)
    with database.write() as session:
        environment = Environment(id=new_id("env"), content_hash=new_id("env"), spec=_json(spec.environment), facts={})
        session.add(environment)
        session.flush()
        row = Policy(id=new_id("pol"), environment_id=environment.id, spec=_json(resolved.policy), seed=spec.seed)
        session.add(row)
        session.flush()
        checkpoints.put(session, row.id, 0, policy.to_bytes())
        job = store.create(
            session,
            policy_id=row.id,
            environment_id=environment.id,
            start_updates=0,
            spec=_json(resolved),
            label={},
            max_attempts=max_attempts,
        )
    return job.id


def _json(spec: EnvironmentSpec | Any) -> dict[str, Any]:
    return dict(spec.model_dump(mode="json"))


def job_of(database: Database, job_id: str) -> Job:
    with database.read() as session:
        return store.get(session, job_id)


def events_of(database: Database, job_id: str, type_: str | None = None) -> list[dict[str, Any]]:
    with database.read() as session:
        found = history.events(session, job_id, 0, 10_000)
    return [event for event in found if type_ in (None, event["type"])]


def statuses_of(database: Database, job_id: str) -> list[tuple[str, int]]:
    return [(event["data"]["status"], event["attempt"]) for event in events_of(database, job_id, "status")]


def ended(database: Database, job_id: str, seconds: float = START_SECONDS) -> Job:
    def end() -> Job | None:
        job = job_of(database, job_id)
        return job if job.status in TERMINAL_STATUSES else None

    return until(end, seconds, "the end of the job")  # type: ignore[no-any-return]


def final_policy(database: Database, job: Job) -> bytes:
    with database.read() as session:
        latest = checkpoints.latest(session, job.policy_id)
        assert job.result is not None
        assert job.result["checkpoint_id"] == latest.id
        return checkpoints.content(session, latest.id)


def await_progress(database: Database, job_id: str, minimum: int = 8) -> None:
    """Wait until the job has a checkpoint, and updates beyond it."""

    def gone_on() -> bool:
        written = events_of(database, job_id, "checkpoint")
        updates = job_of(database, job_id).updates
        return bool(written) and updates > max(minimum, written[-1]["data"]["updates"])

    until(gone_on, START_SECONDS, "progress beyond a checkpoint")


def await_hanging(worker: Worker, before: int = 0) -> None:
    """Wait until an environment hangs; what it prints is in the worker's log."""
    until(lambda: worker.text().count(HANGING) > before, START_SECONDS, "an environment's hanging")


def assert_went_on(database: Database, job_id: str) -> None:
    """Attempt 2 began above update 0 and repeated at most what one interval of checkpoints holds."""
    events = events_of(database, job_id)
    (rewind,) = [event for event in events if event["type"] == "rewind"]
    before = [event for event in events if event["seq"] < rewind["seq"]]
    assert rewind["data"]["to_update"] > 0
    measured = [event for event in before if event["type"] == "metrics"]
    last = measured[-1]
    kept = [event for event in before if event["type"] == "checkpoint"][-1]
    assert kept["data"]["updates"] == rewind["data"]["to_update"]
    # what lies between the two was made after the checkpoint: one interval, and the time that a report and an update
    # take, which this machine has shown
    gaps = [(b["created_at"] - a["created_at"]).total_seconds() for a, b in itertools.pairwise(measured)]
    between = (last["created_at"] - kept["created_at"]).total_seconds()
    assert between < CHECKPOINT_SECONDS + 2 * max(gaps)
    # nothing is missing and nothing is there twice
    with database.read() as session:
        curves = history.metrics(session, job_id, ["mean_return"], max_points=100_000)
    assert curves.updates == list(range(1, curves.updates[-1] + 1))
    assert set(curves.attempts) == {1, 2}


def lost_at(database: Database, job_id: str) -> datetime:
    """When the job was taken from the holder of its first attempt, by the database's clock."""
    first = next(event for event in events_of(database, job_id, "status") if event["attempt"] == 2)
    assert first["data"]["status"] == "queued"
    return cast(datetime, first["created_at"])


# --- crashes ---------------------------------------------------------------------------------------------------------


def test_a_killed_trainer_costs_an_interval_and_no_bit(database: Database, start_worker: Any) -> None:
    # the supervisor sees its trainer die: nobody waits for the end of a lease, which would be an hour
    worker = start_worker(lease_seconds=3600)
    undisturbed = submit(database, cartpole())
    expected = final_policy(database, ended(database, undisturbed))
    disturbed = submit(database, cartpole())
    await_progress(database, disturbed)
    os.kill(worker.trainer(), signal.SIGKILL)
    job = ended(database, disturbed)
    assert statuses_of(database, disturbed) == [
        ("queued", 1),
        ("running", 1),
        ("queued", 2),
        ("running", 2),
        ("succeeded", 2),
    ]
    assert_went_on(database, disturbed)
    assert final_policy(database, job) == expected
    assert worker.process.poll() is None


def test_a_killed_supervisor_costs_an_interval_and_no_bit(database: Database, start_worker: Any) -> None:
    # the lease of the default settings
    worker = start_worker(lease_seconds=10, renew_seconds=2)
    undisturbed = submit(database, cartpole())
    expected = final_policy(database, ended(database, undisturbed))
    disturbed = submit(database, cartpole())
    await_progress(database, disturbed)
    orphan = worker.trainer()
    worker.kill()
    over_at = job_of(database, disturbed).lease_expires_at
    assert over_at is not None
    # the next worker is started at once, as `serve` does it
    heir = start_worker(lease_seconds=10, renew_seconds=2)
    until(lambda: not is_alive(orphan), START_SECONDS, "the orphan's end")
    job = ended(database, disturbed)
    assert (job.status, job.attempt) == ("succeeded", 2)
    # the job was taken as soon as its lease was over and somebody was there: another lease later would be too late
    (started,) = heir.log("worker_started")
    late = lost_at(database, disturbed) - max(over_at, datetime.fromisoformat(started["at"]))
    assert (lost_at(database, disturbed) - over_at).total_seconds() > 0
    assert late.total_seconds() < 10
    assert_went_on(database, disturbed)
    assert final_policy(database, job) == expected


def test_an_orphan_exits_in_the_middle_of_an_endless_update(sqlite_database: Database, tmp_path: Path) -> None:
    worker = Worker(sqlite_database, tmp_path / "log")
    submit(sqlite_database, misbehaving("Hanging-v0"))
    await_hanging(worker)
    orphan = worker.trainer()
    worker.kill()
    until(lambda: not is_alive(orphan), START_SECONDS, "the orphan's end")


def test_a_supervisor_that_was_asleep_writes_nothing(database: Database, start_worker: Any) -> None:
    sleeper = start_worker()
    undisturbed = submit(database, cartpole())
    expected = final_policy(database, ended(database, undisturbed))
    disturbed = submit(database, cartpole())
    await_progress(database, disturbed)
    asleep = sleeper.trainer()
    os.kill(sleeper.process.pid, signal.SIGSTOP)
    heir = start_worker()
    until(lambda: ("running", 2) in statuses_of(database, disturbed), START_SECONDS, "the second attempt")
    os.kill(sleeper.process.pid, signal.SIGCONT)
    (lost,) = until(lambda: sleeper.log("lease_lost"), START_SECONDS, "the loss of the lease")
    assert lost["reason"]
    until(lambda: not is_alive(asleep), START_SECONDS, "the end of the trainer that worked for nothing")
    job = ended(database, disturbed)
    assert (job.status, job.attempt) == ("succeeded", 2)
    assert_went_on(database, disturbed)
    assert final_policy(database, job) == expected
    assert heir.process.poll() is None
    assert sleeper.process.poll() is None


def test_an_environment_that_crashes_its_process_fails_after_the_last_attempt(
    sqlite_database: Database, tmp_path: Path
) -> None:
    worker = Worker(sqlite_database, tmp_path / "log")
    try:
        job = ended(sqlite_database, submit(sqlite_database, misbehaving("Crashing-v0"), max_attempts=2))
    finally:
        worker.kill()
    assert (job.status, job.attempt) == ("failed", 2)
    assert job.failure is not None
    assert job.failure["code"] == "worker_lost"
    assert f"signal {int(signal.SIGSEGV)}" in job.failure["message"]


# --- stopping in order -----------------------------------------------------------------------------------------------


def test_a_stopped_worker_gives_its_job_back(database: Database, start_worker: Any) -> None:
    # what does not end in order would end after five minutes, and without a last checkpoint
    worker = start_worker(grace_seconds=300)
    undisturbed = submit(database, cartpole())
    expected = final_policy(database, ended(database, undisturbed))
    job_id = submit(database, cartpole())
    await_progress(database, job_id)
    trainer = worker.trainer()
    worker.process.send_signal(signal.SIGTERM)
    assert worker.process.wait(240) == 0
    assert not is_alive(trainer)
    released = job_of(database, job_id)
    assert (released.status, released.attempt, released.worker) == ("queued", 1, None)
    # it was asked for a last checkpoint, so nothing is repeated
    with database.read() as session:
        assert checkpoints.latest(session, released.policy_id).updates == released.updates
    start_worker()
    job = ended(database, job_id)
    assert (job.status, job.attempt) == ("succeeded", 1)
    assert final_policy(database, job) == expected


def test_a_worker_whose_trainer_does_not_listen_stops_in_order_too(sqlite_database: Database, tmp_path: Path) -> None:
    worker = Worker(sqlite_database, tmp_path / "log")
    try:
        job_id = submit(sqlite_database, misbehaving("Hanging-v0"))
        await_hanging(worker)
        trainer = worker.trainer()
        worker.process.terminate()
        assert worker.process.wait(240) == 0
        assert not is_alive(trainer)
        released = job_of(sqlite_database, job_id)
        assert (released.status, released.attempt, released.worker) == ("queued", 1, None)
        assert worker.log("worker_stopped")
        assert "Traceback" not in worker.text()
    finally:
        worker.kill()


def test_a_worker_stops_when_its_parent_is_gone(sqlite_database: Database, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    worker = Worker(sqlite_database, tmp_path / "log", stdin=reader, grace_seconds=300)
    os.close(reader)
    trainer = worker.trainer()
    os.close(writer)
    assert worker.process.wait(240) == 0
    assert not is_alive(trainer)


# --- jobs that end otherwise -----------------------------------------------------------------------------------------


def cancel(database: Database, job_id: str) -> None:
    with database.write() as session:
        store.request_cancel(session, job_id)


def test_a_job_is_cancelled_at_the_next_update(steady_database: Database, steady_worker: Worker) -> None:
    job_id = submit(steady_database, cartpole(updates=10_000_000))
    await_progress(steady_database, job_id)
    trainer = steady_worker.trainer()
    cancel(steady_database, job_id)
    job = ended(steady_database, job_id)
    assert job.status == "cancelled"
    # the last checkpoint is of the last update, and the trainer is still warm
    with steady_database.read() as session:
        assert checkpoints.latest(session, job.policy_id).updates == job.updates
    assert steady_worker.trainer() == trainer
    assert is_alive(trainer)


def test_an_environment_that_raises_ends_its_job_alone(steady_database: Database, steady_worker: Worker) -> None:
    job = ended(steady_database, submit(steady_database, misbehaving("Raising-v0")))
    trainer = steady_worker.trainer()
    assert job.status == "failed"
    assert job.failure is not None
    assert job.failure["code"] == "environment_error"
    assert "Raising-v0" in job.failure["message"]
    assert "Traceback" not in job.failure["message"]
    assert "\0" not in job.failure["message"]
    # what had been measured is not lost
    assert job.updates > 0
    (logged,) = [line for line in steady_worker.log("job_failed") if line["job_id"] == job.id]
    assert "misbehaving_environments.py" in logged["traceback"]
    assert ended(steady_database, submit(steady_database, cartpole(3))).status == "succeeded"
    assert steady_worker.trainer() == trainer


def test_too_little_memory_fails_the_job_and_replaces_the_trainer(
    steady_database: Database, steady_worker: Worker
) -> None:
    before = steady_worker.trainer()
    job = ended(steady_database, submit(steady_database, misbehaving("Greedy-v0")))
    assert job.status == "failed"
    assert job.failure is not None
    assert job.failure["code"] == "out_of_memory"
    until(lambda: not is_alive(before), START_SECONDS, "the end of the trainer that had too little memory")
    assert ended(steady_database, submit(steady_database, cartpole(3))).status == "succeeded"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no /proc")
def test_a_trainer_is_bounded_and_ends_before_those_that_answer(
    steady_database: Database, steady_worker: Worker
) -> None:
    assert ended(steady_database, submit(steady_database, cartpole(3))).status == "succeeded"
    trainer = Path(f"/proc/{steady_worker.trainer()}")
    limits = (trainer / "limits").read_text()
    assert re.search(rf"^Max data size +{ROOM} +{ROOM} ", limits, re.MULTILINE), limits
    own = int(Path(f"/proc/{steady_worker.process.pid}/oom_score_adj").read_text())
    assert int((trainer / "oom_score_adj").read_text()) > own


@pytest.mark.parametrize("environment_id", ["Swelling-v0", "Starved-v0"])
def test_a_job_that_wants_too_much_memory_fails_at_once(
    sqlite_database: Database, tmp_path: Path, environment_id: str
) -> None:
    worker = Worker(sqlite_database, tmp_path / "log", trainer_memory_bytes=LEAST_BYTES)
    try:
        job = ended(sqlite_database, submit(sqlite_database, misbehaving(environment_id)))
        assert (job.status, job.attempt) == ("failed", 1)
        assert job.failure is not None
        assert job.failure["code"] == "out_of_memory"
        assert "a trainer may take 1.0 GiB (PGENGINE_TRAINER_MEMORY_BYTES)" in job.failure["message"]
        # the next job has all the memory again
        assert ended(sqlite_database, submit(sqlite_database, cartpole(3))).status == "succeeded"
    finally:
        worker.kill()
        print(worker.text())


def test_parameters_that_are_not_finite_are_said_to_diverge(steady_database: Database, steady_worker: Worker) -> None:
    spec = TrainingSpec(
        environment=TabularSpec(transitions=[[[1.0], [1.0]]], rewards=[[1e300, -1e300]], initial=[1.0], horizon=1),
        algorithm=AlgorithmSpec(trajectories=4, optimizer=SgdSpec(learning_rate=1e6)),
        stop=StopSpec(updates=50, target_return=None),
    )
    job = ended(steady_database, submit(steady_database, spec))
    assert job.status == "failed"
    assert job.failure is not None
    assert job.failure["code"] == "diverged"


def test_a_finished_job_says_what_came_of_it(steady_database: Database, steady_worker: Worker) -> None:
    job = ended(steady_database, submit(steady_database, cartpole(12)))
    assert job.status == "succeeded"
    assert job.result is not None
    assert (job.result["stopped_by"], job.result["target_reached"]) == ("updates", None)
    assert job.result["evaluation"]["episodes"] == 4
    assert (job.updates, job.fraction, job.episodes) == (12, 1.0, 96)
    assert job.fingerprint is not None
    assert job.fingerprint["threads"] == 1
    with steady_database.read() as session:
        curves = history.metrics(session, job.id)
        written = events_of(steady_database, job.id, "checkpoint")
        stored = checkpoints.get(session, job.result["checkpoint_id"])
        policy = pgengine.load(checkpoints.content(session, stored.id))
    assert curves.updates == list(range(1, 13))
    assert len({event["data"]["checkpoint_id"] for event in written}) == len(written)
    assert stored.evaluation == job.result["evaluation"]
    assert policy.updates == 12


def test_a_trainer_without_progress_times_out(steady_database: Database, steady_worker: Worker) -> None:
    job_id = submit(steady_database, misbehaving("Hanging-v0"))
    job = ended(steady_database, job_id)
    assert job.status == "failed"
    assert job.failure is not None
    assert job.failure["code"] == "timeout"


def test_a_trainer_that_does_not_listen_is_killed(steady_database: Database, steady_worker: Worker) -> None:
    before = steady_worker.text().count(HANGING)
    job_id = submit(steady_database, misbehaving("Hanging-v0"))
    await_hanging(steady_worker, before)
    trainer = steady_worker.trainer()
    cancel(steady_database, job_id)
    # a grace period until SIGTERM, and another one until SIGKILL
    assert ended(steady_database, job_id).status == "cancelled"
    assert not is_alive(trainer)
    assert ended(steady_database, submit(steady_database, cartpole(3))).status == "succeeded"


def test_two_workers_share_a_queue(sqlite_database: Database, tmp_path: Path) -> None:
    jobs = [submit(sqlite_database, cartpole(6, seed)) for seed in range(6)]
    workers = [Worker(sqlite_database, tmp_path / f"log-{number}") for number in range(2)]
    try:
        assert [ended(sqlite_database, job_id).status for job_id in jobs] == ["succeeded"] * 6
        assert [job_of(sqlite_database, job_id).token for job_id in jobs] == [1] * 6
    finally:
        for worker in workers:
            worker.kill()
    with sqlite_database.read() as session:
        assert list(session.scalars(select(Job.attempt))) == [1] * 6


# --- gradient checks


def checked(batches: int = 20_000) -> GradientCheckSpec:
    """A few seconds of work whose result is known."""
    world = TabularSpec(
        transitions=[[[0.5, 0.5], [0.9, 0.1]], [[0.0, 1.0], [0.0, 1.0]]],
        rewards=[[0.0, 1.0], [0.0, 0.0]],
        initial=[1.0, 0.0],
        terminal=[1],
        horizon=20,
    )
    return GradientCheckSpec(environment=world, batches=batches, seed=4)


def submit_check(database: Database, spec: GradientCheckSpec) -> str:
    """Queue a check of a policy that its spec describes."""
    with database.write() as session:
        environment = Environment(id=new_id("env"), content_hash=new_id("env"), spec=_json(spec.environment), facts={})
        session.add(environment)
        session.flush()
        job = store.create(
            session,
            kind="gradient_check",
            policy_id=None,
            environment_id=environment.id,
            start_updates=0,
            spec=_json(spec) | {"checkpoint_id": None},
            label={},
            max_attempts=3,
        )
    return job.id


def await_fraction(database: Database, job_id: str) -> None:
    until(lambda: 0.0 < job_of(database, job_id).fraction < 1.0, START_SECONDS, "progress of the check")


def undisturbed(spec: GradientCheckSpec) -> dict[str, Any]:
    """What the engine says here, without the time that it took."""
    (last,) = [step.result for step in check_steps(spec) if step.result is not None]
    return _json(last) | {"seconds": None}


@pytest.mark.parametrize("how", ["the trainer is killed", "the worker is stopped"])
def test_a_check_that_is_disturbed_begins_again_and_comes_to_the_same(
    database: Database, start_worker: Callable[..., Worker], how: str
) -> None:
    spec = checked()
    job_id = submit_check(database, spec)
    worker = start_worker()
    await_fraction(database, job_id)
    if how == "the trainer is killed":
        os.kill(worker.trainer(), signal.SIGKILL)
    else:
        worker.process.terminate()
        worker.process.wait(START_SECONDS)
        start_worker()
    job = ended(database, job_id)
    assert (job.status, job.attempt) == ("succeeded", 1 if how == "the worker is stopped" else 2)
    assert job.result is not None
    assert job.result | {"seconds": None} == undisturbed(spec)
    assert {event["type"] for event in events_of(database, job_id)} <= {"status", "log"}


def test_a_running_check_is_cancelled(steady_database: Database, steady_worker: Worker) -> None:
    job_id = submit_check(steady_database, checked(10_000_000))
    await_fraction(steady_database, job_id)
    with steady_database.write() as session:
        store.request_cancel(session, job_id)
    job = ended(steady_database, job_id)
    assert (job.status, job.result) == ("cancelled", None)
    # the trainer is well and serves the next one
    assert ended(steady_database, submit_check(steady_database, checked(100))).status == "succeeded"
