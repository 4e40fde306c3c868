import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from server.database import Database, now
from server.errors import NotFound
from server.keys import store
from server.pages import PageQuery
from server.tables import ApiKey


def test_a_key_is_recognised_by_its_secret_only(database: Database) -> None:
    with database.write() as session:
        row, secret = store.create(session, "trainer", ["train", "read"])
    assert secret.startswith("pgk_")
    assert len(secret) >= 40
    with database.read() as session:
        assert store.verify(session, secret) == store.Identity(row.id, frozenset({"read", "train"}))
        assert store.verify(session, secret + "x") is None
        assert store.verify(session, row.hash) is None
        assert store.verify(session, "\ud800\0") is None
        stored = session.scalars(select(ApiKey)).one()
        assert secret not in str(vars(stored))


def test_scopes() -> None:
    assert store.Identity("key_a", frozenset({"read"})).allows("read")
    assert not store.Identity("key_a", frozenset({"read"})).allows("act")
    assert all(store.Identity("key_a", frozenset({"admin"})).allows(scope) for scope in store.SCOPES)
    assert all(store.ANYBODY.allows(scope) for scope in store.SCOPES)


SECRET = "the-operators-own-secret"


def test_the_operators_own_secret_is_one_key_however_often_the_server_starts(database: Database) -> None:
    for _ in range(2):
        with database.write() as session:
            assert store.ensure(session, SECRET, "settings") == []
    with database.write() as session:
        [row] = store.list_(session, PageQuery()).rows
        store.revoke(session, row.id)
    with database.write() as session:
        store.ensure(session, SECRET, "settings")
    with database.read() as session:
        identity = store.verify(session, SECRET)
        assert identity is not None
        assert identity.allows("admin")
        assert len(store.list_(session, PageQuery()).rows) == 1


def test_another_secret_of_the_operator_replaces_the_one_before(database: Database) -> None:
    with database.write() as session:
        _, generated = store.create(session, "first start", ["read"])
        store.create(session, "dashboard", ["read"])
    # the second one is a key that was there before: it is the operator's now, and replaced like any other
    for number, secret in enumerate((SECRET, generated, "yet-another-of-the-operator")):
        with database.write() as session:
            replaced = store.ensure(session, secret, "settings")
            assert len(replaced) == min(number, 1)
            assert all(row.revoked_at is not None for row in replaced)
        with database.read() as session:
            identity = store.verify(session, secret)
            assert identity is not None
            assert identity.allows("admin")
            mine = store.valid(session, "settings")
            assert mine is not None
            assert mine.id == identity.key_id
    with database.read() as session:
        assert store.verify(session, SECRET) is None
        assert store.verify(session, generated) is None
        valid = [row.name for row in store.list_(session, PageQuery()).rows if row.revoked_at is None]
        assert sorted(valid) == ["dashboard", "settings"]


def test_a_revoked_key_is_unknown_and_stays_listed(database: Database) -> None:
    with database.write() as session:
        row, secret = store.create(session, "old", ["read"])
    with database.write() as session:
        first = store.revoke(session, row.id).revoked_at
    with database.write() as session:
        assert store.revoke(session, row.id).revoked_at == first
    with database.read() as session:
        assert store.verify(session, secret) is None
        assert [key.name for key in store.list_(session, PageQuery()).rows] == ["old"]
    with pytest.raises(NotFound), database.write() as session:
        store.revoke(session, "key_" + "0" * 32)


def test_use_is_noted_to_the_minute(database: Database) -> None:
    with database.write() as session:
        row, _ = store.create(session, "k", ["read"])

    def used_at() -> object:
        with database.write() as session:
            store.touch(session, row.id)
        with database.read() as session:
            return session.get_one(ApiKey, row.id).last_used_at

    first = used_at()
    assert first is not None
    assert used_at() == first
    with database.write() as session:
        session.execute(update(ApiKey).values(last_used_at=now(-61)))
    assert used_at() != first


# --- several programs that start at once -----------------------------------------------------------------------------


def at_once(database: Database, make: Callable[[Session], Any]) -> list[Any]:
    """What eight programs that start at once get."""
    others = [Database(database.url.render_as_string(hide_password=False)) for _ in range(8)]
    barrier = threading.Barrier(len(others))

    def start(other: Database) -> Any:
        other.ping()
        barrier.wait(60)
        with other.write() as session:
            return make(session)

    with ThreadPoolExecutor(len(others)) as threads:
        made = list(threads.map(start, others))
    for other in others:
        other.dispose()
    return made


def test_of_several_first_starts_at_once_one_makes_a_key(database: Database) -> None:
    for _ in range(3):
        made = at_once(database, lambda session: store.create_first(session, "first start"))
        assert sum(found is not None for found in made) == 1
        with database.write() as session:
            (row,) = session.scalars(select(ApiKey)).all()
            session.delete(row)


def test_several_starts_at_once_with_the_same_secret_make_one_key(database: Database) -> None:
    at_once(database, lambda session: store.ensure(session, SECRET, "PGENGINE_API_KEY"))
    with database.read() as session:
        assert len(session.scalars(select(ApiKey)).all()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_several_servers_that_start_at_once_on_nothing_show_one_key(
    request: pytest.FixtureRequest, start: Any, kind: str
) -> None:
    url = request.getfixturevalue(f"{kind}_url")
    servers = [start("serve", "--port", "0", PGENGINE_WORKERS="0", PGENGINE_DATABASE_URL=url) for _ in range(3)]
    said = [server.wait_for(r"^key +(.*)", timeout=200.0).group(1) for server in servers]
    assert sum("shown only now" in one for one in said) == 1
    assert sum("one of those in the database" in one for one in said) == 2
    for server in servers:
        assert server.end() == 0
