"""Lanes: threads for one kind of work each, so that none of them can take those of another.

A route runs in a thread while the database makes it wait. If all waited in one crowd, writers behind a lock would stop
readers, probes and keys, which need no lock. So each kind has a lane with a number of places; who finds none waits, for
a bounded time and in a bounded crowd, and is then told to come again.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import ParamSpec, TypeVar

from anyio.to_thread import run_sync

from server.errors import Unavailable

__all__ = ["THREADS", "Lane", "Lanes"]

P = ParamSpec("P")
T = TypeVar("T")

WAIT_SECONDS = 10.0
MOST_WRITERS = 64
"""Requests that write and wait for a place; each holds its body in memory."""

THREADS = 40
"""Threads of an application: more than all lanes have places, so that what waits for no database finds one, too."""


class Lane:
    """Places for one kind of work. Lives on the event loop.

    Args:
        places: How many are at work at once.
        most_waiting: How many more may wait; None for any number.
    """

    def __init__(self, places: int, most_waiting: int | None = None) -> None:
        self._places = asyncio.Semaphore(places)
        self._most_waiting = most_waiting
        self._waiting = 0

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """A place until the end of the block.

        Raises:
            Unavailable: if none becomes free in time, or too many wait already.
        """
        if self._places.locked() and self._waiting == self._most_waiting:
            raise Unavailable("Too many requests wait for the database; try again.")
        self._waiting += 1
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                await self._places.acquire()
        except TimeoutError:
            raise Unavailable("Others took too long in the database; try again.") from None
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._places.release()

    async def run(self, call: Callable[P, T], *arguments: P.args, **more: P.kwargs) -> T:
        """Call it in a thread, as soon as there is a place.

        Raises:
            Unavailable: if there is none in time.
        """
        async with self.place():
            return await run_sync(lambda: call(*arguments, **more))


class Lanes:
    """The lanes of an application's routes. Keys, streams and acting have lanes of their own.

    Attributes:
        reading: Routes that read.
        writing: Routes that write.
        probes: Whether the server is ready.
    """

    def __init__(self) -> None:
        self.reading = Lane(6)
        self.writing = Lane(4, MOST_WRITERS)
        self.probes = Lane(1)
