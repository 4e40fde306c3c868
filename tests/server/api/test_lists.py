"""Lists cost as many statements for two hundred objects as for one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Engine, event, insert, select

from server.database import Database, NamingBase
from server.ids import Prefix, new_id
from server.keys import store as keys
from server.pages import PageQuery
from server.settings import Settings
from server.tables import ApiKey, Checkpoint, Environment, Job, Policy

BANDIT = {"kind": "tabular", "transitions": [[[1.0], [1.0]]], "rewards": [[0.0, 1.0]], "initial": [1.0], "horizon": 1}
CARTPOLE = {"kind": "gymnasium", "id": "CartPole-v1"}
LARGEST = 200


@contextmanager
def counted() -> Iterator[list[str]]:
    """The statements that are run meanwhile, by whatever connection."""
    statements: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith(("SELECT", "WITH")):
            statements.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield statements
    finally:
        event.remove(Engine, "before_cursor_execute", note)


def multiply(database: Database, table: type[NamingBase], prefix: Prefix, id_: str, to: int, change: Any) -> None:
    """Store as many rows like this one as there are to be."""
    columns = table.__table__
    with database.write() as session:
        row = dict(session.execute(select(columns).where(columns.c.id == id_)).one()._mapping)
        have = len(session.scalars(select(columns.c.id)).all())
        rows = [row | {"id": new_id(prefix)} | change(number) for number in range(have, to)]
        if rows:
            session.execute(insert(columns), rows)


def statements_of(database: Database, ask: Callable[[], int], grow: Callable[[int], None]) -> list[int]:
    """How many statements a list takes with 1, 10 and 200 rows; `ask` answers how many it gave."""
    found = []
    for rows in (1, 10, LARGEST):
        grow(rows)
        with counted() as statements:
            assert ask() == rows
        found.append(len(statements))
    return found


def test_a_list_takes_as_many_statements_for_two_hundred_rows_as_for_one(database: Database, serve: Any) -> None:
    # nothing else asks the database meanwhile: no key is looked up, and no lease is looked after
    with serve(Settings(no_auth=True, lease_seconds=3600, renew_seconds=1000), database) as api:

        def listed(path: str) -> Callable[[], int]:
            return lambda: len(api.get(f"{path}?limit={LARGEST}").json()["data"])

        job = api.created("/v1/training-jobs", {"environment": CARTPOLE, "seed": 1})
        check = _queued_check(database, job["id"])
        environment_id, policy_id, checkpoint_id = job["environment_id"], job["policy_id"], _checkpoint(database)

        def environments(to: int) -> None:
            multiply(database, Environment, "env", environment_id, to, lambda n: {"content_hash": f"{n:064}"})

        def policies(to: int) -> None:
            multiply(database, Policy, "pol", policy_id, to, lambda n: {})
            with database.write() as session:
                without = select(Policy.id).where(Policy.id.not_in(select(Checkpoint.policy_id)))
                row = dict(session.execute(select(Checkpoint.__table__).limit(1)).one()._mapping)
                rows = [row | {"id": new_id("ckpt"), "policy_id": policy_id} for policy_id in session.scalars(without)]
                if rows:
                    session.execute(insert(Checkpoint.__table__), rows)

        def jobs(to: int) -> None:
            with database.read() as session:
                free = session.scalars(select(Policy.id).where(Policy.id != policy_id)).all()
            with database.write() as session:
                row = dict(session.execute(select(Job.__table__).where(Job.id == job["id"])).one()._mapping)
                have = len(session.scalars(select(Job.id).where(Job.kind == "training")).all())
                rows = [row | {"id": new_id("job"), "policy_id": free[number]} for number in range(have - 1, to - 1)]
                if rows:
                    session.execute(insert(Job.__table__), rows)

        def checks(to: int) -> None:
            with database.write() as session:
                row = dict(session.execute(select(Job.__table__).where(Job.id == check)).one()._mapping)
                have = len(session.scalars(select(Job.id).where(Job.kind == "gradient_check")).all())
                rows = [row | {"id": new_id("job")} for _ in range(have, to)]
                if rows:
                    session.execute(insert(Job.__table__), rows)

        def checkpoints(to: int) -> None:
            multiply(
                database,
                Checkpoint,
                "ckpt",
                checkpoint_id,
                to + LARGEST - 1,
                lambda n: {"updates": n, "policy_id": policy_id},
            )

        def keys_(to: int) -> None:
            with database.read() as session:
                one = session.scalars(select(ApiKey.id).limit(1)).one()
            multiply(database, ApiKey, "key", one, to, lambda n: {"hash": f"{n:064}"})

        def list_keys() -> int:
            with database.read() as session:
                return len(keys.list_(session, PageQuery(limit=LARGEST)).rows)

        for ask, grow in (
            (listed("/v1/environments"), environments),
            (listed("/v1/policies"), policies),
            (listed("/v1/training-jobs"), jobs),
            (listed("/v1/gradient-checks"), checks),
            (listed(f"/v1/policies/{policy_id}/checkpoints"), checkpoints),
            (list_keys, keys_),
        ):
            one, ten, many = statements_of(database, ask, grow)
            assert one == ten == many <= 6, grow.__name__
        # and what they say of the queue is right: the jobs of one moment are ordered by their ids
        places = [body["queue_position"] for body in api.get("/v1/training-jobs?order=asc&limit=200").json()["data"]]
        assert places == sorted(places)
        assert len(set(places)) == LARGEST


def _checkpoint(database: Database) -> str:
    with database.read() as session:
        return session.scalars(select(Checkpoint.id)).one()


def _queued_check(database: Database, job_id: str) -> str:
    """A gradient check that waits, made from a training job: the list reads what both have."""
    with database.write() as session:
        row = dict(session.execute(select(Job.__table__).where(Job.id == job_id)).one()._mapping)
        settings = {"policy": {"kind": "linear"}, "checkpoint_id": None, "estimators": [row["spec"]["algorithm"]]}
        settings |= {"mode": "sample", "batches": 10, "false_alarm": 0.01, "values": False, "seed": 1}
        check = row | {"id": new_id("job"), "kind": "gradient_check", "policy_id": None, "spec": settings}
        session.execute(insert(Job.__table__), [check | {"label": {"estimators": [row["label"]]}}])
        return str(check["id"])
