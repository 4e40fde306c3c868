import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from server.database import Database, now
from server.errors import IdempotencyKeyReused, NotFound
from server.idempotency import KEPT_SECONDS, LARGEST_KEPT, Reply, once
from server.ids import new_id
from server.tables import Environment, Idempotency

ROUTE = "POST /v1/environments"


def _create(
    database: Database, key: str | None, body: bytes = b"{}", *, key_id: str = "key_a", route: str = ROUTE
) -> Reply:
    with database.write() as session:

        def create() -> Reply:
            row = Environment(id=new_id("env"), content_hash=new_id("env"), spec={}, facts={})
            session.add(row)
            session.flush()
            return Reply(201, {"z": 1, "id": row.id}, {"location": f"/v1/environments/{row.id}"})

        return once(session, key_id, key, route, body, create)


def _environments(database: Database) -> int:
    with database.read() as session:
        return session.scalars(select(func.count()).select_from(Environment)).one()


def test_the_same_request_gets_the_same_answer_and_creates_once(database: Database) -> None:
    first, second = _create(database, "a"), _create(database, "a")
    assert _environments(database) == 1
    assert (second.status, list(second.body.items())) == (201, list(first.body.items()))
    assert second.headers == first.headers | {"idempotency-replayed": "true"}


def test_without_a_key_or_with_another_one_it_creates_again(database: Database) -> None:
    for key in (None, None, "a", "b"):
        _create(database, key)
    _create(database, "a", key_id="key_b")
    assert _environments(database) == 5


@pytest.mark.parametrize("changed", [{"body": b'{"name":"x"}'}, {"route": "POST /v1/policies"}])
def test_another_request_with_the_same_key_is_refused(database: Database, changed: dict[str, object]) -> None:
    _create(database, "a")
    with pytest.raises(IdempotencyKeyReused):
        _create(database, "a", **changed)  # type: ignore[arg-type]
    assert _environments(database) == 1


def test_a_refused_request_is_not_kept(database: Database) -> None:
    def refuse() -> Reply:
        raise NotFound("no such policy")

    with pytest.raises(NotFound), database.write() as session:
        once(session, "key_a", "a", ROUTE, b"{}", refuse)
    assert "idempotency-replayed" not in _create(database, "a").headers


def test_a_concurrent_twin_waits_and_gets_the_answer(database: Database) -> None:
    inside, leave = threading.Event(), threading.Event()

    def slow() -> Reply:
        with database.write() as session:

            def create() -> Reply:
                inside.set()
                leave.wait(10)
                return Reply(201, {"id": "env_slow"})

            return once(session, "key_a", "a", ROUTE, b"{}", create)

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(slow)
        assert inside.wait(10)
        second = threads.submit(_create, database, "a")
        with pytest.raises(TimeoutError):
            second.result(timeout=0.2)
        leave.set()
        assert first.result(10).body == second.result(10).body == {"id": "env_slow"}
        assert second.result().headers["idempotency-replayed"] == "true"
    assert _environments(database) == 0


def test_many_twins_create_once(database: Database) -> None:
    with ThreadPoolExecutor(16) as threads:
        replies = list(threads.map(lambda _: _create(database, "a"), range(32)))
    assert _environments(database) == 1
    assert len({reply.body["id"] for reply in replies}) == 1
    assert sum("idempotency-replayed" in reply.headers for reply in replies) == 31


def test_answers_are_forgotten_after_a_day(database: Database) -> None:
    for key in ("a", "b"):
        _create(database, key)
    with database.write() as session:
        session.execute(update(Idempotency).values(created_at=now(-KEPT_SECONDS - 1)))
    assert "idempotency-replayed" not in _create(database, "a", b'{"other": 1}').headers
    with database.read() as session:
        assert session.scalars(select(Idempotency.key)).all() == ["a"]


# --- large answers

LARGE = "x" * LARGEST_KEPT


def _create_large(database: Database, key: str, table: str) -> Reply:
    def today(session: Session, environment_id: str) -> dict[str, Any]:
        row = session.get(Environment, environment_id)
        if row is None:
            raise NotFound
        return {"id": row.id, "table": row.spec["table"], "state": row.facts["state"]}

    with database.write() as session:

        def create() -> Reply:
            row = Environment(
                id=new_id("env"), content_hash=new_id("env"), spec={"table": table}, facts={"state": "new"}
            )
            session.add(row)
            session.flush()
            return Reply(201, today(session, row.id), lasting=("table",))

        return once(session, "key_a", key, ROUTE, b"{}", create, today)


def _kept_characters(database: Database) -> int:
    with database.read() as session:
        return sum(len(json.dumps(response)) for response in session.scalars(select(Idempotency.response)))


@pytest.mark.parametrize("table", ["small", LARGE])
def test_what_may_change_is_answered_as_it_was(database: Database, table: str) -> None:
    first = _create_large(database, "a", table)
    with database.write() as session:
        session.execute(update(Environment).values(facts={"state": "old"}))
    again = _create_large(database, "a", table)
    assert (list(again.body.items()), again.status) == (list(first.body.items()), first.status)


def test_large_answers_are_not_stored_once_more_for_each_request(database: Database) -> None:
    for key in "abcdefgh":
        assert _create_large(database, key, LARGE).body["table"] == LARGE
    assert _kept_characters(database) < 8 * 200


def test_a_large_answer_is_gone_with_its_object(database: Database) -> None:
    large, small = _create_large(database, "a", LARGE), _create_large(database, "b", "small")
    with database.write() as session:
        session.execute(delete(Environment))
    with pytest.raises(NotFound, match=f"{large.body['id']}, which this request has created, was deleted"):
        _create_large(database, "a", LARGE)
    assert _create_large(database, "b", "small").body == small.body
    assert _environments(database) == 0
