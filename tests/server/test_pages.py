import pytest
from pydantic import ValidationError
from sqlalchemy import select

from server.database import Database
from server.errors import InvalidCursor
from server.ids import is_id, new_id, pattern
from server.pages import PageQuery, fetch
from server.tables import Environment


def _fill(database: Database, count: int) -> list[str]:
    ids = [new_id("env") for _ in range(count)]
    with database.write() as session:
        session.add_all(Environment(id=i, content_hash=i, spec={}, facts={}) for i in ids)
    return ids


def _walk(database: Database, **query: object) -> list[list[str]]:
    pages, after = [], None
    while True:
        with database.read() as session:
            page = fetch(
                session, select(Environment), Environment.id, "env", PageQuery.model_validate(query | {"after": after})
            )
        pages.append([row.id for row in page.rows])
        assert page.has_more == (page.next_cursor is not None)
        if not page.has_more:
            return pages
        after = page.next_cursor


@pytest.mark.parametrize(("count", "sizes"), [(0, [0]), (2, [2]), (3, [3]), (4, [3, 1]), (7, [3, 3, 1])])
def test_pages_join_to_the_whole_list(sqlite_database: Database, count: int, sizes: list[int]) -> None:
    ids = _fill(sqlite_database, count)
    for order, wanted in (("asc", ids), ("desc", ids[::-1])):
        pages = _walk(sqlite_database, limit=3, order=order)
        assert [len(page) for page in pages] == sizes
        assert [row for page in pages for row in page] == wanted


def test_a_page_continues_behind_an_object_that_was_deleted(database: Database) -> None:
    ids = _fill(database, 5)
    with database.write() as session:
        session.delete(session.get_one(Environment, ids[2]))
    with database.read() as session:
        page = fetch(session, select(Environment), Environment.id, "env", PageQuery(after=ids[2], order="asc"))
    assert [row.id for row in page.rows] == ids[3:]


@pytest.mark.parametrize(
    "after", ["", "env_", "pol_" + "0" * 32, "env_" + "G" * 32, "env_" + "0" * 32 + "\n", "' OR 1=1"]
)
def test_a_malformed_cursor_is_refused(sqlite_database: Database, after: str) -> None:
    with pytest.raises(InvalidCursor) as error, sqlite_database.read() as session:
        fetch(session, select(Environment), Environment.id, "env", PageQuery(after=after))
    assert error.value.errors[0].pointer == "/after"


@pytest.mark.parametrize("query", [{"limit": 0}, {"limit": 201}, {"order": "up"}, {"offset": 3}, {"after": "x" * 65}])
def test_the_bounds_of_a_page(query: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PageQuery.model_validate(query)


def test_ids_sort_by_time_and_have_their_shape() -> None:
    ids = [new_id("job") for _ in range(1000)]
    assert ids == sorted(ids)
    assert len(set(ids)) == 1000
    assert all(is_id("job", i) for i in ids)
    assert pattern("job") == "^job_[0-9a-f]{32}$"
