import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.exc import DatabaseError, IntegrityError, StatementError
from sqlalchemy.orm import Session

import migrations
from server.database import Database, now
from server.engines import Limits
from server.errors import Unavailable
from server.ids import new_id
from server.tables import Checkpoint, Environment, Job, Policy


def _environment(**values: object) -> Environment:
    defaults = {"id": new_id("env"), "content_hash": new_id("env")[4:], "spec": {"kind": "gymnasium"}, "facts": {}}
    return Environment(**(defaults | values))


def _job(policy: Policy, **values: object) -> Job:
    defaults = {
        "id": new_id("job"),
        "kind": "training",
        "policy_id": policy.id,
        "environment_id": policy.environment_id,
        "spec": {},
        "label": {},
        "max_attempts": 3,
    }
    return Job(**(defaults | values))


def _add_policy(database: Database) -> Policy:
    environment = _environment()
    policy = Policy(id=new_id("pol"), environment_id=environment.id, spec={}, seed=2**53 - 1)
    with database.write() as session:
        session.add(environment)
        session.flush()
        session.add(policy)
    return policy


def test_write_commits_and_rolls_back(database: Database) -> None:
    kept, dropped = _environment(), _environment()
    with database.write() as session:
        session.add(kept)
    with pytest.raises(RuntimeError, match="stop"), database.write() as session:
        session.add(dropped)
        session.flush()
        raise RuntimeError("stop")
    with database.read() as session:
        assert [row.id for row in session.scalars(select(Environment))] == [kept.id]


def test_rows_can_be_read_after_the_transaction(database: Database) -> None:
    row = _environment()
    with database.write() as session:
        session.add(row)
    assert row.created_at.tzinfo is UTC


def test_read_cannot_write(database: Database) -> None:
    with pytest.raises(DatabaseError, match=r"(?i)read-?only"), database.read() as session:
        session.add(_environment())
        session.flush()
    with database.write() as session:  # the connection is not spoilt for those who may
        session.add(_environment())


def test_read_sees_one_snapshot(database: Database) -> None:
    with database.read() as session:
        assert session.scalars(select(Environment)).all() == []
        with database.write() as writer:
            writer.add(_environment())
        assert session.scalars(select(Environment)).all() == []


def test_writers_of_many_threads_lose_nothing(database: Database) -> None:
    row = _environment(facts={"count": 0})
    with database.write() as session:
        session.add(row)

    def add_ten() -> None:
        for _ in range(10):
            with database.write() as session:
                locked = session.scalars(select(Environment).where(Environment.id == row.id).with_for_update()).one()
                locked.facts = {"count": locked.facts["count"] + 1}

    threads = [threading.Thread(target=add_ten) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as session:
        assert session.scalars(select(Environment)).one().facts == {"count": 200}


def test_sqlite_writers_of_two_processes_wait_for_each_other(sqlite_database: Database) -> None:
    other = Database(str(sqlite_database.url))  # connections of its own, as another process has
    first_is_in, first_may_leave = threading.Event(), threading.Event()

    def first() -> None:
        with sqlite_database.write() as session:
            session.add(_environment())
            first_is_in.set()
            first_may_leave.wait(10)

    def second() -> None:
        # reads before it writes: a deferred transaction would fail at once with SQLITE_BUSY when upgraded
        with other.write() as session:
            assert len(session.scalars(select(Environment)).all()) == 1
            session.add(_environment())

    one, two = threading.Thread(target=first), threading.Thread(target=second)
    one.start()
    assert first_is_in.wait(10)
    two.start()
    first_may_leave.set()
    one.join()
    two.join()
    with other.read() as session:
        assert len(session.scalars(select(Environment)).all()) == 2
    other.dispose()


def test_sqlite_is_set_up_for_several_processes(sqlite_database: Database) -> None:
    with sqlite_database.read() as session:
        assert session.scalar(text("PRAGMA journal_mode")) == "wal"
        assert session.scalar(text("PRAGMA foreign_keys")) == 1
        assert session.scalar(text("PRAGMA busy_timeout")) == 2_500


def test_now_has_milliseconds_and_orders_with_stored_times(database: Database) -> None:
    with database.read() as session:
        earlier, at, later = session.execute(select(now(-10), now(), now(0.25))).one()
    assert at.tzinfo is UTC
    assert abs(at - datetime.now(UTC)) < timedelta(seconds=5)
    assert at.microsecond % 1000 == 0
    assert timedelta(seconds=9.9) < at - earlier < timedelta(seconds=10.1)
    assert timedelta(seconds=0.2) < later - at < timedelta(seconds=0.5)
    row = _environment()
    with database.write() as session:
        session.add(row)
    with database.write() as session:  # a time that Python wrote and one that the database wrote compare as times
        session.execute(update(Environment).values(created_at=row.created_at))
        assert session.scalar(select(Environment.created_at <= now()))
        assert session.scalar(select(Environment.created_at > now(-5)))
        assert session.scalar(select(Environment.created_at == row.created_at))


def test_times_need_a_zone_and_come_back_in_utc(database: Database) -> None:
    noon = datetime(2030, 1, 1, 12, tzinfo=timezone(timedelta(hours=2)))
    row = _environment(created_at=noon)
    with database.write() as session:
        session.add(row)
    with database.read() as session:
        stored = session.scalars(select(Environment)).one().created_at
    assert (stored, stored.tzinfo) == (noon, UTC)
    with pytest.raises(StatementError, match="time zone"), database.write() as session:
        session.add(_environment(created_at=datetime(2030, 1, 1)))


def test_json_keeps_order_floats_and_large_integers_and_refuses_nan(database: Database) -> None:
    spec = {"z": 0.1 + 0.2, "a": 2**53 - 1, "text": "Grüße 漢字", "none": None}
    with database.write() as session:
        session.add(_environment(spec=spec))
    with database.read() as session:
        stored = session.scalars(select(Environment)).one().spec
    assert stored == spec
    assert list(stored) == list(spec)
    with pytest.raises((StatementError, ValueError), match="not JSON compliant"), database.write() as session:
        session.add(_environment(spec={"value": float("nan")}))


def test_an_environment_in_use_cannot_be_deleted(database: Database) -> None:
    policy = _add_policy(database)
    with pytest.raises(IntegrityError), database.write() as session:
        session.delete(session.get_one(Environment, policy.environment_id))


def test_one_training_job_of_a_policy_is_at_work(database: Database) -> None:
    policy = _add_policy(database)
    first = _job(policy)
    with database.write() as session:
        session.add(first)
    with pytest.raises(IntegrityError, match="policy_id"), database.write() as session:
        session.add(_job(policy))
    with database.write() as session:
        session.execute(update(Job).values(status="succeeded", finished_at=now()))
        session.add(_job(policy))


@pytest.mark.parametrize(
    "values",
    [
        {"status": "finished"},
        {"kind": "dance"},
        {"status": "failed"},
        {"finished_at": datetime(2030, 1, 1, tzinfo=UTC)},
        {"worker": "somebody"},
        {"attempt": 0},
        {"fraction": 1.5},
    ],
)
def test_the_database_refuses_impossible_jobs(sqlite_database: Database, values: dict[str, object]) -> None:
    policy = _add_policy(sqlite_database)
    with pytest.raises(IntegrityError, match="ck_job_"), sqlite_database.write() as session:
        session.add(_job(policy, **values))


def test_a_checkpoint_survives_its_job_and_goes_with_its_policy(database: Database) -> None:
    policy = _add_policy(database)
    job = _job(policy)
    checkpoint = Checkpoint(
        id=new_id("ckpt"), policy_id=policy.id, job_id=job.id, updates=0, size=1, sha256="0" * 64, evaluation=None
    )
    with database.write() as session:
        session.add(job)
        session.flush()
        session.add(checkpoint)
    with database.write() as session:
        session.delete(session.get_one(Job, job.id))
    with database.write() as session:
        kept = session.scalars(select(Checkpoint)).one()
        assert kept.job_id is None
        session.delete(session.get_one(Policy, policy.id))
    with database.read() as session:
        assert session.scalars(select(Checkpoint)).all() == []


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "mysql://root@localhost/x"])
def test_databases_that_cannot_be_shared_or_are_not_known_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="database"):
        Database(url)


# --- limits and outages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lease_seconds", [2.0, 10.0, 60.0, 3600.0])
def test_all_that_a_transaction_waits_for_ends_before_a_lease_does(lease_seconds: float) -> None:
    limits = Limits.below(lease_seconds)
    assert limits.lock_seconds < limits.statement_seconds < limits.answer_seconds < lease_seconds
    assert limits.idle_seconds < lease_seconds
    assert limits.answer_seconds + limits.pool_seconds <= 75


def test_postgresql_ends_what_takes_too_long_but_for_migrations(postgresql_database: Database) -> None:
    names = ("lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout")
    for transaction in (postgresql_database.read, postgresql_database.write):
        with transaction() as session:
            assert [session.scalar(text(f"SHOW {name}")) for name in names] == ["2500ms", "5s", "5s"]
    with postgresql_database.connect() as connection:
        assert [connection.scalar(text(f"SHOW {name}")) for name in names] == ["0", "0", "0"]


@pytest.mark.slow
def test_a_lock_that_is_not_freed_is_not_waited_for_and_is_no_outage(database: Database) -> None:
    row = _environment()
    with database.write() as session:
        session.add(row)
    other = Database(database.url.render_as_string(hide_password=False), lease_seconds=0.4)
    with database.write() as session:
        session.scalars(select(Environment).with_for_update()).one()
        with pytest.raises(Unavailable, match="Others hold"), other.write() as waiting:
            waiting.scalars(select(Environment).with_for_update()).one()
        assert not other.health.is_away
        with other.read() as reading:
            assert reading.scalars(select(Environment.id)).all() == [row.id]
    other.dispose()


@pytest.mark.slow
def test_a_transaction_that_does_nothing_is_ended_and_frees_what_it_held_and_is_no_outage(
    postgresql_database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    with postgresql_database.write() as session:
        session.add(_environment())
    forgetful = Database(postgresql_database.url.render_as_string(hide_password=False), lease_seconds=0.4)
    forgetful.ping()
    with pytest.raises(Unavailable, match="took too long"), forgetful.write() as session:
        session.scalars(select(Environment).with_for_update()).one()
        # waits for the lock until the server has ended the other transaction
        with postgresql_database.write() as other:
            other.execute(update(Environment).values(facts={"count": 1}))
        session.execute(update(Environment).values(facts={"count": 2}))
    with postgresql_database.read() as session:
        assert session.scalars(select(Environment)).one().facts == {"count": 1}
    # the server answers all others, so nobody is turned away and nothing is logged
    assert not forgetful.health.is_away
    forgetful.ping()
    assert not caplog.records
    forgetful.dispose()


@pytest.mark.parametrize("how", ["deleted", "replaced", "replaced by an empty one", "its directory was deleted"])
def test_a_sqlite_file_that_is_not_the_one_that_was_opened_takes_no_write(
    sqlite_database: Database, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    caplog.set_level("INFO", "server")
    file = Path(sqlite_database.url.database or "")
    kept = _environment()
    with sqlite_database.write() as session:
        session.add(kept)
    moved = file.parent if how == "its directory was deleted" else file
    aside = tmp_path_factory.mktemp("aside") / moved.name
    moved.rename(aside)
    if how == "replaced":
        shutil.copy(aside, file)
    elif how == "replaced by an empty one":
        file.touch()
    for _ in range(3):
        with pytest.raises(Unavailable), sqlite_database.write() as session:
            session.add(_environment())
        with pytest.raises(Unavailable), sqlite_database.read() as session:
            session.scalars(select(Environment)).all()
    with pytest.raises(Unavailable):
        migrations.state(sqlite_database)
    (line,) = [record for record in caplog.records if record.getMessage() == "database_away"]
    assert str(file) in line.__dict__["fields"]["reason"]
    # nothing was made where the file had been
    assert file.exists() == how.startswith("replaced")
    aside.rename(moved)
    with until_answered(sqlite_database) as session:
        assert [row.id for row in session.scalars(select(Environment))] == [kept.id]
    assert [record.getMessage() for record in caplog.records].count("database_back") == 1


@contextmanager
def until_answered(database: Database) -> Iterator[Session]:
    """A reading transaction as soon as the database is asked again."""
    while True:
        try:
            with database.read() as session:
                yield session
                return
        except Unavailable:
            time.sleep(0.05)
