"""The API as a program: its socket, its signals, its end. Knows processes; what is answered is in `server.app`."""

import errno
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn, cast

import uvicorn

from server.connections import Connections, Limits
from server.database import Database
from server.logs import log
from server.settings import Settings
from server.worker.stop import EXIT_WITH_STDIN

__all__ = ["CannotServe", "leave", "listen", "serve", "stop_in_order", "stop_with_parent"]


GOODBYE_SECONDS = 1.0
"""What is left at the end to threads that are still at work."""


class CannotServe(Exception):
    """The API cannot start; the message says why and what to do. `status` is what the program ends with."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


class _Server(uvicorn.Server):
    """uvicorn, but it ends open streams before it waits for connections to close, or it would wait for ever."""

    def __init__(self, config: uvicorn.Config, *, on_start: Callable[[], None], on_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_start = on_start
        self._on_stop = on_stop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.started:
            return
        try:
            self._on_start()
        except Exception:
            # what has begun is ended in order, or its end would be logged as a mistake with a traceback
            await self.shutdown(sockets)
            raise

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._on_stop()
        super().handle_exit(sig, frame)


def serve(settings: Settings, database: Database, sock: socket.socket, on_start: Callable[[], None]) -> None:
    """Answer requests until told to stop.

    Args:
        settings: The server's settings.
        database: Its database, migrated.
        sock: Where to listen; see `listen`.
        on_start: Called once, when requests are answered.

    Raises:
        CannotServe: if the application cannot be made or cannot start.
    """
    # many requests act at once: a matrix product that waits for threads of its own takes seven times as long (measured
    # with 256 rows on two busy cores). NumPy reads this when it is imported, which is now
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from server.app import create_app
    from server.environments.types import ModuleNotImported

    try:
        app = create_app(settings, database)
    except ModuleNotImported as error:
        raise CannotServe(f"PGENGINE_ENVIRONMENT_MODULES: {error}", status=2) from error
    limits = Limits(
        connections=settings.max_connections,
        head_seconds=settings.head_seconds,
        body_seconds=settings.body_seconds,
        discarded_bytes=settings.max_body_bytes,
    )
    config = uvicorn.Config(
        app,
        # uvicorn calls it for each connection; that it is a class is only said of it
        http=cast(Any, Connections(limits, app.refused).protocol),
        log_config=None,
        access_log=False,
        # what proxies say is read by the gate, which knows whom to believe
        proxy_headers=False,
        lifespan="on",
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=math.ceil(settings.grace_seconds),
    )
    server = _Server(config, on_start=on_start, on_stop=app.stop)
    server.run(sockets=[sock])
    if not server.started:
        raise CannotServe("the API could not start; the lines above say why")


def listen(settings: Settings) -> socket.socket:
    """The socket, bound before anything else is started, so that a taken port stops nothing half way.

    Raises:
        CannotServe: if the address is taken, unknown or not allowed.
    """
    sock: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        # two that are bound do not see each other yet; one that listens is seen, and uvicorn listens much later
        sock.listen(2048)
        return sock
    except OSError as error:
        if sock is not None:
            sock.close()
        raise CannotServe(_cannot_listen(settings, error)) from error


def _cannot_listen(settings: Settings, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {settings.port} of {settings.host} is taken; choose another with --port or PGENGINE_PORT"
    if error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
        return f"{settings.host} is not an address of this machine; set PGENGINE_HOST"
    if error.errno == errno.EACCES:
        return f"port {settings.port} needs more rights than this user has; choose one above 1023"
    raise error


def stop_in_order() -> None:
    """From here on SIGTERM and Ctrl-C end the program in order: all that it has started is ended, the status is 0.

    uvicorn takes the signals while it runs and hands them on to us when it has ended.
    """

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for one in (signal.SIGTERM, signal.SIGINT):
            signal.signal(one, signal.SIG_IGN)  # a second one must not interrupt the ending, which is bounded
        raise SystemExit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def leave(status: str | int | None) -> None:
    """End the program now if threads are left that wait for a database; Python would wait for them, without end.

    Returns if there are none. What they were about to write is not written, as if the program had been killed.
    """
    left = [one for one in threading.enumerate() if not one.daemon and one is not threading.current_thread()]
    give_up_at = time.monotonic() + GOODBYE_SECONDS
    for one in left:
        one.join(max(0.0, give_up_at - time.monotonic()))
    if any(one.is_alive() for one in left):
        log("threads_abandoned", "warning", count=sum(one.is_alive() for one in left))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else int(status is not None))


def stop_with_parent() -> None:
    """From here on the end of standard input is a SIGTERM, if the program that started this one asks for that.

    It holds the other end of a pipe, so this program ends with it even where it is killed.
    """

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    if os.environ.get(EXIT_WITH_STDIN) == "1":
        threading.Thread(target=watch, name="parent", daemon=True).start()
