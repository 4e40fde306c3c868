"""The whole application on a real database, asked without a socket."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import fastapi.dependencies.models
import httpx
import pytest
import uvloop

from server.app import Application, create_app
from server.database import Database
from server.keys import store as keys
from server.settings import Settings

CARTPOLE = {"kind": "gymnasium", "id": "CartPole-v1"}


class Api:
    """A client of an application that lives on an event loop of its own, as under uvicorn.

    Attributes:
        app: The application.
        database: Its database.
        key: An admin key, sent unless a test names another one.
    """

    def __init__(self, app: Application, database: Database, run: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        self.app = app
        self.database = database
        self.key = self.new_key("admin")
        self._run = run
        self._client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost:8000")

    def new_key(self, *scopes: keys.Scope) -> str:
        """A key with these scopes."""
        with self.database.write() as session:
            return keys.create(session, "test", scopes)[1]

    def __call__(self, method: str, path: str, *, key: str | None = "", **more: Any) -> httpx.Response:
        """Send a request; `key=None` sends none."""
        headers = dict(more.pop("headers", {}))
        if key is not None:
            headers = {"authorization": f"Bearer {key or self.key}"} | headers
        response: httpx.Response = self._run(self._client.request(method, path, headers=headers, **more))
        return response

    def get(self, path: str, **more: Any) -> httpx.Response:
        return self("GET", path, **more)

    def post(self, path: str, json: Any = None, **more: Any) -> httpx.Response:
        return self("POST", path, json=json, **more)

    def delete(self, path: str, **more: Any) -> httpx.Response:
        return self("DELETE", path, **more)

    def created(self, path: str, json: Any) -> dict[str, Any]:
        """The object that a POST creates."""
        response = self.post(path, json)
        assert response.status_code == 201, response.text
        body: dict[str, Any] = response.json()
        return body


@contextmanager
def serving(settings: Settings, database: Database, clock: Callable[[], float] = time.monotonic) -> Iterator[Api]:
    """The application with its lifespan."""
    # the loop that uvicorn runs the server on: it differs from asyncio's own in what it takes
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(60)

    app = create_app(settings, database, clock=clock)
    lifespan = app.fastapi.router.lifespan_context(app.fastapi)
    try:
        run(lifespan.__aenter__())
        try:
            yield Api(app, database, run)
        finally:
            run(lifespan.__aexit__(None, None, None))
            run(loop.shutdown_default_executor())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        _forget_what_fastapi_remembers()


def _forget_what_fastapi_remembers() -> None:
    """FastAPI keeps the last functions that it has looked at, and with the pages of /docs whole applications.

    A program has one application; here each test has, and each would keep more than a megabyte.
    """
    for kept in vars(fastapi.dependencies.models).values():
        if hasattr(kept, "cache_clear"):
            kept.cache_clear()


@pytest.fixture
def serve() -> Callable[..., Any]:
    """Opens an application with settings of the test's own."""
    return serving


@pytest.fixture
def api(sqlite_database: Database) -> Iterator[Api]:
    """The application on SQLite."""
    with serving(Settings(), sqlite_database) as opened:
        yield opened


@pytest.fixture
def any_api(database: Database) -> Iterator[Api]:
    """The application; the test runs once on each kind of database."""
    with serving(Settings(), database) as opened:
        yield opened


@pytest.fixture
def problem() -> Callable[..., dict[str, Any]]:
    """Checks that a response is a problem document, and gives it."""

    def check(response: httpx.Response, status: int, code: str, *faults: Sequence[str]) -> dict[str, Any]:
        assert response.status_code == status, response.text
        assert response.headers["content-type"] == "application/problem+json"
        body: dict[str, Any] = response.json()
        assert set(body) == {"type", "title", "status", "detail", "code", "errors", "request_id"}
        assert (body["status"], body["code"]) == (status, code), body
        assert body["request_id"] == response.headers["x-request-id"]
        found = [(error["pointer"], error["code"]) for error in body["errors"]]
        assert sorted(found) == sorted(tuple(fault) for fault in faults)
        return body

    return check
