"""The engine in processes of its own, for what the API asks it about jobs now and then.

The API process never loads torch, and a question may take long: so each is answered by a program of its own, bounded in
number and in time, that ends with this process however that ends. Lives on the event loop.
"""

import asyncio
import contextlib
import json
import logging
import sys
import tempfile
from collections.abc import Awaitable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from pgengine.errors import SpecError
from server.errors import InternalError, TookTooLong, TooManyRequests, Unavailable
from server.settings import Settings, program_environment

__all__ = ["Engine", "EngineFailed", "while_connected"]

T = TypeVar("T")

_log = logging.getLogger(__name__)


class EngineFailed(Exception):
    """The engine has tried and could not: an environment raised, or bytes cannot be read. The message is for people."""


class Engine:
    """Asks programs.

    Args:
        settings: How many at once, for how long, with how many threads and which modules.
    """

    def __init__(self, settings: Settings) -> None:
        self._most = settings.max_explanations
        self._fair = not settings.no_auth
        self._seconds = settings.explain_seconds
        modules = [part for name in settings.environment_modules for part in ("--module", name)]
        self._command = [
            *(sys.executable, "-m", "server.jobs.engine_program", "--threads", str(settings.threads)),
            *("--memory", str(settings.trainer_memory_bytes)),
            *modules,
        ]
        self._environment = program_environment(settings.threads)
        self._asked: dict[str, list[str]] = {}
        self._running: set[asyncio.subprocess.Process] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    async def ask(
        self, question: str, request: Mapping[str, Any], *, caller: str, **files: bytes | None
    ) -> dict[str, Any]:
        """The answer to one question.

        Checks and explanations have places of their own, so that neither shuts out the other; and the last free place
        of a kind is for a caller who has none, so that nobody shuts out all others.

        Args:
            question: `check` or `explain`.
            request: What is asked, as JSON.
            caller: Id of the key that asks.
            files: Policies and states that belong to it.

        Raises:
            SpecError: if the engine refuses the request; the pointer is from the root of the spec.
            EngineFailed: if it has tried and failed.
            TooManyRequests: if as many questions of this kind, or of this caller, as may be are being answered.
            TookTooLong: if the answer takes too long.
            Unavailable: if the server is shutting down.
        """
        asked = self._asked.setdefault(question, [])
        if len(asked) >= self._most:
            raise TooManyRequests(
                f"{self._most} such questions to the engine are being answered (PGENGINE_MAX_EXPLANATIONS); "
                "try again later."
            )
        if self._fair and caller in asked and len(asked) == self._most - 1:
            raise TooManyRequests(
                "The engine is answering a question of this key, and the last free place is for other keys "
                "(PGENGINE_MAX_EXPLANATIONS); try again later."
            )
        self._loop = asyncio.get_running_loop()
        asked.append(caller)
        try:
            with tempfile.TemporaryDirectory(prefix="pgengine-") as directory:
                await asyncio.to_thread(_write, Path(directory), {"question": question, **request}, files)
                written = await self._run(directory)
        finally:
            asked.remove(caller)
        answer: dict[str, Any] = await asyncio.to_thread(json.loads, written)
        if "refused" in answer:
            raise SpecError(**answer["refused"])
        if "failed" in answer:
            raise EngineFailed(answer["failed"])
        found: dict[str, Any] = answer["answer"]
        return found

    def close(self) -> None:
        """Ends all programs and refuses new questions; may be called by a signal handler or another thread."""
        self._closed = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._kill)

    def _kill(self) -> None:
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    async def _run(self, directory: str) -> bytes:
        if self._closed:
            raise Unavailable("The server is shutting down.")
        process = await asyncio.create_subprocess_exec(
            *self._command,
            directory,
            # kept open: the program ends when it closes
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=self._environment,
            # Ctrl-C in the server's terminal is for the server; uvloop, which it runs on, knows no process_group
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        self._running.add(process)
        try:
            async with asyncio.timeout(self._seconds):
                written = await process.stdout.read()
                status = await process.wait()
        except TimeoutError:
            raise TookTooLong(
                f"The engine took more than {self._seconds:g} seconds (PGENGINE_EXPLAIN_SECONDS)."
            ) from None
        finally:
            self._running.discard(process)
            process.stdin.close()
            if process.returncode is None:
                process.kill()
                await process.wait()
        if self._closed:
            raise Unavailable("The server is shutting down.")
        if status < 0:
            # an environment may take its process with it, and so does the kernel where memory is used up
            _log.error("a program that asked the engine was ended by signal %s", -status)
            raise EngineFailed(
                f"the program that computed it was ended by signal {-status}; it may need too much memory"
            )
        if status != 0:
            # its standard error is ours, so the log has the traceback
            _log.error("a program that asked the engine ended with status %s", status)
            raise InternalError
        return written


async def while_connected(request: Request, answer: Awaitable[T]) -> T:
    """An answer, given up when its client goes away: otherwise whoever tries again would find the place taken.

    Args:
        request: The client's request, whose body has been read.
        answer: What may take long.

    Raises:
        ClientDisconnect: if the client went away first.
    """
    work, gone = asyncio.ensure_future(answer), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        work.cancel()
        gone.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _write(directory: Path, request: Mapping[str, Any], files: Mapping[str, bytes | None]) -> None:
    (directory / "request.json").write_text(json.dumps(request))
    for name, data in files.items():
        if data is not None:
            (directory / name).write_bytes(data)
