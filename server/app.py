"""The application: which parts there are, and how they hang together."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any, cast

import anyio.to_thread
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse
from fastapi_offline import FastAPIOffline
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import migrations
from pgengine.errors import SpecError
from server import __version__
from server.checkpoints import routes as checkpoints
from server.database import Database
from server.environments import routes as environments
from server.environments.types import AllowList
from server.errors import (
    PROBLEM_MEDIA_TYPE,
    ApiError,
    FieldError,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    Unavailable,
    problem,
)
from server.faults import field_errors
from server.jobs import checks, updates
from server.jobs import routes as jobs
from server.jobs import store as job_store
from server.jobs.engine import Engine
from server.jobs.tail import Tail
from server.keys import store as keys
from server.lanes import THREADS, Lanes
from server.logs import AccessLog
from server.metrics import CONTENT_TYPE, JobFigures, Metrics
from server.middleware import Gate
from server.openapi import describe
from server.policies import routes as policies
from server.policies.act import ActEndpoint
from server.request import Db, Threads
from server.settings import Settings

__all__ = ["Application", "create_app"]

_log = logging.getLogger(__name__)


class Application(Gate):
    """The gate with everything behind it.

    Attributes:
        fastapi: The application behind the gate.
    """

    def __init__(self, settings: Settings, database: Database, clock: Callable[[], float] = monotonic) -> None:
        """Builds all parts; nothing runs before the lifespan begins."""
        metrics = Metrics(__version__)
        self._tail = Tail(
            database, metrics=metrics, max_streams=settings.max_streams, poll_seconds=settings.poll_seconds
        )
        act = ActEndpoint(
            database, metrics=metrics, max_batch=settings.max_act_batch, max_depth=settings.max_body_depth
        )
        access = AccessLog()
        upkeep = _Upkeep(database, settings)
        self._engine = Engine(settings)
        self.fastapi = _fastapi(_lifespan(self._tail, act, upkeep, access))
        state = self.fastapi.state
        state.settings, state.database, state.metrics, state.tail = settings, database, metrics, self._tail
        state.engine, state.lanes = self._engine, Lanes()
        state.environments = AllowList(settings.environments, settings.environment_modules)
        super().__init__(
            self.fastapi,
            act,
            settings=settings,
            metrics=metrics,
            access=access,
            verify=upkeep.verify,
            anyone=keys.ANYBODY if settings.no_auth else None,
            clock=clock,
        )

    def stop(self) -> None:
        """End at once what could go on for long: event streams, and questions to the engine.

        May be called from a signal handler or another thread.
        """
        self._tail.close()
        self._engine.close()


def create_app(settings: Settings, database: Database, *, clock: Callable[[], float] = monotonic) -> Application:
    """The application of one server.

    Args:
        settings: Its settings.
        database: Its database, migrated.
        clock: Seconds that only rise, by which known keys grow old.
    """
    return Application(settings, database, clock)


# --- what runs beside the requests ------------------------------------------------------------------------------------


class _Upkeep:
    """What an API process does without being asked: ends expired leases, notes which keys are used."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._pause = settings.renew_seconds
        self._used: set[str] = set()

    def verify(self, secret: str) -> keys.Identity | None:
        """Whose secret it is. That the key is used is noted later: reading must not wait for the write lock."""
        with self._database.read() as session:
            identity = keys.verify(session, secret)
        if identity is not None:
            self._used.add(identity.key_id)
        return identity

    async def run(self) -> None:
        """Goes on until it is cancelled."""
        while True:
            try:
                await run_in_threadpool(self._once)
            except Unavailable:
                pass  # expired leases wait
            except SQLAlchemyError:
                _log.exception("expired leases could not be looked for")
            # an outage is noticed to be over even while nobody asks for anything
            await asyncio.sleep(min(self._pause, 1.0) if self._database.health.is_away else self._pause)

    def _once(self) -> None:
        with self._database.read() as session:
            expired = job_store.any_expired(session)
        used, self._used = self._used, set()
        if not expired and not used:
            return
        with self._database.write() as session:
            job_store.reap(session)
            for key_id in used:
                keys.touch(session, key_id)


def _lifespan(tail: Tail, act: ActEndpoint, upkeep: _Upkeep, access: AccessLog) -> Any:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
        await tail.start()
        task = asyncio.create_task(upkeep.run(), name="upkeep")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await tail.stop()
            await act.stop()
            await asyncio.to_thread(access.close)

    return lifespan


# --- routes -----------------------------------------------------------------------------------------------------------

_probes = APIRouter()


@_probes.get("/", include_in_schema=False)
async def root() -> Response:
    """Where a person who types the address alone finds out what is here."""
    return RedirectResponse("/docs")


@_probes.api_route("/livez", methods=["GET", "HEAD"], include_in_schema=False)
async def livez() -> dict[str, str]:
    """Whether the process answers; asks nobody else."""
    return {"status": "alive"}


@_probes.api_route("/readyz", methods=["GET", "HEAD"], include_in_schema=False)
async def readyz(database: Db, threads: Threads) -> dict[str, str]:
    """Whether requests can be served: the database answers and has the schema that this version works with."""
    state = await threads.probes.run(migrations.state, database)
    if not state.matches:
        raise Unavailable(state.advice)
    return {"status": "ready"}


@_probes.get("/metrics", include_in_schema=False)
async def metrics(request: Request, database: Db, threads: Threads) -> Response:
    """The server's numbers for Prometheus."""

    def read() -> JobFigures:
        with database.read() as session:
            return job_store.figures(session)

    try:
        figures = await threads.reading.run(read)
    except Unavailable:
        figures = None  # it is among the numbers that the database does not answer
    exposition = cast(Metrics, request.app.state.metrics).exposition(figures)
    return Response(exposition, media_type=CONTENT_TYPE)


def _fastapi(lifespan: Any) -> FastAPI:
    app = FastAPIOffline(
        docs_url="/docs",
        redoc_url=None,
        static_url="/docs/assets",
        swagger_ui_oauth2_redirect_url="/docs/oauth2-redirect",
        title="pgengine",
        version=__version__,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    for router in (
        environments.router,
        policies.router,
        jobs.router,
        updates.router,
        checks.router,
        checkpoints.router,
        _probes,
    ):
        app.include_router(router)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(SpecError, _on_spec_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _on_mistake)
    describe(app)
    return app


# --- errors -----------------------------------------------------------------------------------------------------------


def _problem(request: Request, error: ApiError) -> Response:
    body = problem(error, request.state.request_id)
    return JSONResponse(body, error.status, error.headers, media_type=PROBLEM_MEDIA_TYPE)


async def _on_api_error(request: Request, error: Exception) -> Response:
    return _problem(request, cast(ApiError, error))


async def _on_spec_error(request: Request, error: Exception) -> Response:
    spec_error = cast(SpecError, error)
    fault = FieldError(spec_error.pointer, spec_error.code, spec_error.message)
    return _problem(request, InvalidRequest(errors=[fault]))


async def _on_invalid(request: Request, error: Exception) -> Response:
    invalid = cast(RequestValidationError, error)
    return _problem(request, InvalidRequest(errors=field_errors(invalid.errors(), invalid.body, _body_type(request))))


def _body_type(request: Request) -> Any:
    """What the body of a request to this route is; None if it has none."""
    field = getattr(request.scope.get("route"), "body_field", None)
    return None if field is None else field.field_info.annotation


async def _on_http_error(request: Request, error: Exception) -> Response:
    """What the router answers by itself."""
    http_error = cast(HTTPException, error)
    if http_error.status_code == 404:
        return _problem(request, NotFound("There is no such route."))
    if http_error.status_code == 405 and request.method == "OPTIONS":
        return Response(status_code=204, headers={"allow": ", ".join(_methods(request))})
    if http_error.status_code == 405:
        return _problem(request, MethodNotAllowed(headers={"allow": ", ".join(_methods(request))}))
    if http_error.status_code == 413:
        return _problem(request, PayloadTooLarge())
    return _problem(request, InvalidRequest() if http_error.status_code < 500 else InternalError())


def _methods(request: Request) -> list[str]:
    """All methods of a path; the router knows only those of the first route that fits."""
    template = getattr(request.scope.get("route"), "path", "")
    documented = cast(FastAPI, request.app).openapi()["paths"].get(template, {})
    methods = {method.upper() for method in documented} or {"GET"}
    return sorted(methods | {"OPTIONS"} | ({"HEAD"} if "GET" in methods else set()))


async def _on_disconnect(request: Request, _: Exception) -> None:
    """Nobody is there to be answered, so nothing is sent and no answer is counted."""
    _log.debug("request %s: the client went away", request.state.request_id)


async def _on_mistake(request: Request, _: Exception) -> Response:
    # raised again behind this handler; the gate logs it
    return _problem(request, InternalError())
