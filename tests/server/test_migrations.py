import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError

import migrations
from migrations import MigrationError, expected, migrate, state
from server.checkpoints import store as checkpoints
from server.database import Database, NamingBase, now
from server.ids import new_id
from server.jobs.blocks import Columns
from server.tables import (
    ApiKey,
    Checkpoint,
    CheckpointContent,
    Environment,
    Event,
    Idempotency,
    Job,
    Metric,
    MetricBlock,
    Policy,
)

ALL_TABLES = [ApiKey, Idempotency, Environment, Policy, Job, Checkpoint, CheckpointContent, Event, Metric, MetricBlock]


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_database(request: pytest.FixtureRequest) -> Any:
    database = Database(request.getfixturevalue(f"{request.param}_url"))
    yield database
    database.dispose()


_ROWS: list[dict[str, Any]] = [
    {"update": 2, "env_steps": 5, "attempt": 1, "values": {"a": 0.1}, "nonfinite": None},
    {"update": 3, "env_steps": 9, "attempt": 2, "values": {"b": None, "a": -3.0}, "nonfinite": ["b"]},
]
_BLOCK = Columns.of_rows(_ROWS).to_bytes()


def _fill(database: Database) -> None:
    environment = Environment(id=new_id("env"), content_hash="0" * 64, spec={"id": "CartPole-v1"}, facts={})
    policy = Policy(id=new_id("pol"), environment_id=environment.id, spec={}, seed=2**53 - 1, metadata_={"a": [1]})
    job = Job(
        id=new_id("job"),
        kind="training",
        policy_id=policy.id,
        environment_id=environment.id,
        spec={},
        label={},
        max_attempts=3,
        status="failed",
        finished_at=now(),
        failure={"code": "internal"},
    )
    checkpoint = Checkpoint(
        id=new_id("ckpt"), policy_id=policy.id, job_id=job.id, updates=3, size=2, sha256="0" * 64, evaluation=None
    )
    with database.write() as session:
        for row in (
            ApiKey(id=new_id("key"), name="k", hash="0" * 64, scopes=["read"]),
            Idempotency(key_id="k", key="i", route="r", body_hash="0" * 64, status_code=201, response={}),
            environment,
            policy,
            job,
            checkpoint,
            CheckpointContent(checkpoint_id=checkpoint.id, policy_bytes=b"\0\xff", state_bytes=None),
            Event(job_id=job.id, seq=1, type="log", attempt=1, data={}),
            Metric(job_id=job.id, update=1, attempt=1, env_steps=5, values={"mean_return": None}, nonfinite=["x"]),
            MetricBlock(job_id=job.id, first_update=2, last_update=3, count=2, content=_BLOCK),
        ):
            session.add(row)
            session.flush()


def _counts(database: Database) -> dict[str, int]:
    with database.read() as session:
        return {
            table.__tablename__: session.scalars(select(sa.func.count()).select_from(table)).one()
            for table in ALL_TABLES
        }


def test_up_down_and_up_again_on_filled_tables(empty_database: Database) -> None:
    assert state(empty_database).current is None
    assert migrate(empty_database) == migrations.Move(None, expected(), None)
    assert state(empty_database).matches
    _fill(empty_database)
    assert set(_counts(empty_database).values()) == {1}
    down = migrate(empty_database, "base")
    assert (down.before, down.after) == (expected(), None)
    with empty_database.connect() as connection:
        assert sa.inspect(connection).get_table_names() == ["alembic_version"]
    assert migrate(empty_database).after == expected()
    assert set(_counts(empty_database).values()) == {0}
    _fill(empty_database)


def test_0003_gives_every_update_a_row_again_on_the_way_down(empty_database: Database) -> None:
    migrate(empty_database)
    _fill(empty_database)
    migrate(empty_database, "0002")
    columns = (Metric.update, Metric.env_steps, Metric.attempt, Metric.values, Metric.nonfinite)
    with empty_database.read() as session:
        rows = session.execute(select(*columns).where(Metric.update > 1).order_by(Metric.update)).mappings().all()
    assert [dict(row) for row in rows] == _ROWS


def test_0004_keeps_all_rows_both_ways(empty_database: Database) -> None:
    migrate(empty_database)
    _fill(empty_database)
    migrate(empty_database, "0003")
    with empty_database.read() as session:
        assert session.execute(text("SELECT count(*) FROM job")).scalar() == 1
    migrate(empty_database)
    assert set(_counts(empty_database).values()) == {1}
    with empty_database.read() as session:
        assert session.scalars(select(Job.key_id)).all() == [None]


def _gradient_check(**changes: Any) -> Job:
    """A check whose policy is described and not stored."""
    given = {"kind": "gradient_check", "policy_id": None, "spec": {}, "label": {}, "max_attempts": 3}
    return Job(id=new_id("job"), **(given | changes))


def test_0002_keeps_all_rows_on_the_way_up(empty_database: Database) -> None:
    migrate(empty_database, "0001")
    with empty_database.write() as session:
        for statement in _FILLED_AT_0001:
            session.execute(text(statement))
    migrate(empty_database)
    counts = _counts(empty_database)
    assert [counts[name] for name in ("environment", "policy", "job", "checkpoint", "event", "metric")] == [1] * 6
    with empty_database.read() as session:
        job = session.scalars(select(Job)).one()
        assert (job.kind, job.policy_id, job.checkpoint_id, job.status) == ("training", "pol_1", None, "running")


def test_0007_calls_what_the_best_was_found_by_a_selection(empty_database: Database) -> None:
    migrate(empty_database, "0001")
    with empty_database.write() as session:
        for statement in _FILLED_AT_0001:
            session.execute(text(statement))
    migrate(empty_database)
    with empty_database.read() as session:
        kept = session.scalars(select(Checkpoint)).one()
        assert (kept.selection, kept.evaluation) == ({"mean_return": 7.5}, None)
        best = checkpoints.best(session, "pol_1")
        assert best is not None
        assert best.id == "ckpt_1"
    migrate(empty_database, "0006")
    with empty_database.connect() as connection:
        assert "7.5" in str(connection.scalar(text("SELECT evaluation FROM checkpoint")))


def test_0002_takes_what_0001_cannot_keep_on_the_way_down(empty_database: Database) -> None:
    migrate(empty_database)
    _fill(empty_database)
    with empty_database.write() as session:
        environment_id = session.scalars(select(Environment.id)).one()
        checkpoint_id = session.scalars(select(Checkpoint.id)).one()
        check = _gradient_check(environment_id=environment_id, checkpoint_id=checkpoint_id)
        session.add(check)
        session.flush()
        session.add(Event(job_id=check.id, seq=1, type="log", attempt=1, data={}))
    migrate(empty_database, "0001")
    with empty_database.connect() as connection:
        assert connection.scalars(text("SELECT kind FROM job")).all() == ["training"]
        assert connection.scalar(text("SELECT count(*) FROM event")) == 1
        assert "checkpoint_id" not in {column["name"] for column in sa.inspect(connection).get_columns("job")}
    migrate(empty_database)
    # a block has become the rows that it was made from
    assert _counts(empty_database) == dict.fromkeys(_counts(empty_database), 1) | {"metric": 3, "metric_block": 0}


@pytest.mark.parametrize(
    ("changes", "constraint"),
    [
        ({"kind": "training"}, "ck_job_policy"),
        ({"kind": "evaluation"}, "ck_job_kind"),
        ({"checkpoint_id": "the one", "status": "failed", "finished_at": now()}, "ck_job_checkpoint"),
        ({"checkpoint_id": "ckpt_0"}, "foreign key"),
    ],
)
def test_the_database_keeps_the_rules_of_jobs(
    empty_database: Database, changes: dict[str, Any], constraint: str
) -> None:
    migrate(empty_database)
    _fill(empty_database)
    with empty_database.read() as session:
        environment_id = session.scalars(select(Environment.id)).one()
        checkpoint_id = session.scalars(select(Checkpoint.id)).one()
    if changes.get("checkpoint_id") == "the one":
        changes = changes | {"checkpoint_id": checkpoint_id}
    with pytest.raises(IntegrityError, match=f"(?i){constraint}"), empty_database.write() as session:
        session.add(_gradient_check(environment_id=environment_id, **changes))
    with empty_database.write() as session:
        session.add(_gradient_check(environment_id=environment_id, checkpoint_id=checkpoint_id))
    with pytest.raises(IntegrityError), empty_database.write() as session:
        session.execute(sa.delete(Checkpoint).where(Checkpoint.id == checkpoint_id))


_TIME = "'2026-11-01 00:00:00.000000'"
_FILLED_AT_0001 = [
    f"INSERT INTO environment VALUES ('env_1', 'h', '{{}}', '{{}}', {_TIME})",
    f"INSERT INTO policy VALUES ('pol_1', NULL, '{{}}', 'env_1', '{{}}', 1, 3, {_TIME})",
    "INSERT INTO job (id, kind, metadata, policy_id, environment_id, spec, label, status, attempt, max_attempts, token,"
    " worker, lease_expires_at, start_updates, updates, env_steps, episodes, fraction, next_seq, created_at, queued_at)"
    " VALUES ('job_1', 'training', '{}', 'pol_1', 'env_1', '{}', '{}', 'running', 1, 3, 1, "
    f"'w', {_TIME}, 0, 3, 3, 3, 0.5, 2, {_TIME}, {_TIME})",
    f"INSERT INTO checkpoint VALUES ('ckpt_1', 'pol_1', 'job_1', 3, 0, 2, 's', '{{\"mean_return\": 7.5}}', {_TIME})",
    f"INSERT INTO event VALUES ('job_1', 1, 'log', 1, '{{}}', {_TIME})",
    "INSERT INTO metric VALUES ('job_1', 1, 1, 5, '{}', NULL)",
]


def test_at_the_wanted_revision_nothing_is_changed(empty_database: Database) -> None:
    migrate(empty_database)
    _fill(empty_database)
    assert migrate(empty_database) == migrations.Move(expected(), expected(), None)
    assert set(_counts(empty_database).values()) == {1}


def test_the_migrated_schema_is_the_one_that_the_code_declares(empty_database: Database) -> None:
    migrate(empty_database)
    with empty_database.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, NamingBase.metadata) == []


def test_checks_and_partial_indexes_are_those_that_the_code_declares(empty_database: Database) -> None:
    # alembic compares no CHECK constraints and no conditions of partial indexes, so this does
    migrate(empty_database)
    migrated = _definitions(empty_database)
    migrate(empty_database, "base")
    with empty_database.connect() as connection:
        NamingBase.metadata.create_all(connection)
        connection.commit()
    assert _definitions(empty_database) == migrated


def _definitions(database: Database) -> set[str]:
    if database.dialect == "sqlite":
        statements = ["SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND tbl_name != 'alembic_version'"]
    else:
        statements = [
            "SELECT conrelid::regclass || ' ' || conname || ' ' || pg_get_constraintdef(oid) FROM pg_constraint"
            " WHERE connamespace = 'public'::regnamespace AND conrelid != coalesce(to_regclass('alembic_version'), 0)",
            "SELECT indexdef FROM pg_indexes WHERE schemaname = 'public' AND tablename != 'alembic_version'",
        ]
    with database.connect() as connection:
        found = [row for statement in statements for row in connection.scalars(text(statement))]
    # the order within CREATE TABLE does not matter, and neither do white space and needless quotes
    found = [re.sub(r'^CREATE TABLE "(\w+)"', r"CREATE TABLE \1", row) for row in found]
    return {" ".join(sorted(re.split(r",?\s*\n\s*", row.strip().removesuffix(")")))) for row in found}


def test_migrators_at_the_same_time_wait_for_each_other(empty_database: Database) -> None:
    others = [Database(str(empty_database.url)) for _ in range(4)]
    barrier = threading.Barrier(4)

    def start(database: Database) -> migrations.Move:
        barrier.wait()
        return migrate(database)

    with ThreadPoolExecutor(4) as threads:
        moves = list(threads.map(start, others))
    for other in others:
        other.dispose()
    assert sorted(move.before or "" for move in moves) == ["", *[expected()] * 3]


def test_a_database_of_a_newer_version_is_left_alone(empty_database: Database) -> None:
    migrate(empty_database)
    with empty_database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    found = state(empty_database)
    assert not found.matches
    assert not found.known
    assert "newer" in found.advice
    with pytest.raises(MigrationError, match="newer"):
        migrate(empty_database)
    with pytest.raises(MigrationError, match="newer"):
        migrate(empty_database, "base")


def test_an_unknown_revision_is_named(empty_database: Database) -> None:
    with pytest.raises(MigrationError, match="there are base, 0001"):
        migrate(empty_database, "0815")


def test_a_sqlite_file_is_copied_before_it_is_changed(sqlite_url: str, tmp_path: Path) -> None:
    database = Database(sqlite_url)
    assert migrate(database).backup is None
    _fill(database)
    backup = migrate(database, "base").backup
    assert backup is not None
    assert backup.parent == tmp_path
    saved = Database(f"sqlite:///{backup}")
    assert set(_counts(saved).values()) == {1}
    assert state(saved).matches
    saved.dispose()
    database.dispose()


def test_a_batch_alter_keeps_child_rows(sqlite_url: str) -> None:
    """SQLite alters by copying and dropping; with foreign keys on the drop deleted every child row, silently."""
    database = Database(sqlite_url)
    migrate(database)
    _fill(database)
    with migrations._transaction(database) as connection:
        operations = Operations(MigrationContext.configure(connection, opts={"target_metadata": NamingBase.metadata}))
        with operations.batch_alter_table("job") as batch:
            batch.add_column(sa.Column("extra", sa.Integer()))
            batch.alter_column("name", type_=sa.Text())
            batch.drop_constraint(operations.f("ck_job_kind"), type_="check")
    assert set(_counts(database).values()) == {1}
    with database.read() as session:
        assert session.scalar(text("PRAGMA foreign_keys")) == 1
        assert session.scalars(text("SELECT extra FROM job")).one() is None
    database.dispose()


def test_a_migration_that_breaks_a_reference_is_undone(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    migrate(database)
    _fill(database)
    with pytest.raises(MigrationError, match="event → job"), migrations._transaction(database) as connection:
        connection.execute(text("DELETE FROM job"))
    assert set(_counts(database).values()) == {1}
    database.dispose()


def test_revisions_are_found_from_any_directory(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    database = Database(sqlite_url)
    migrate(database)
    assert state(database).matches
    database.dispose()
