"""Events of jobs as they happen: replay from the table, then follow.

The table is the truth. One poller in each process asks which followed jobs have new events, reads those once, and makes
each frame once; all followers share it. A follower is a position and nothing else: what it has not yet sent it finds
among a job's recent frames, and when it has fallen behind them, in the table again. So a slow client costs no memory,
and nobody holds a database connection between two reads.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Annotated, Any

import msgspec
from fastapi import Query, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool
from starlette.types import Message, Receive, Scope, Send

from server.database import Database
from server.errors import NotFound, TooManyRequests, Unavailable
from server.jobs import history
from server.jobs.reports import JobKind
from server.lanes import Lane
from server.metrics import Metrics
from server.pages import LARGEST_PAGE
from server.request import LARGEST_INTEGER, invalid, negotiated

__all__ = ["OPENAPI", "After", "Follow", "LastEventId", "PageSize", "Tail", "events_response"]

After = Annotated[str | None, Query(description="Begin behind the event with this `seq`.", examples=["0"])]
LastEventId = Annotated[
    str | None,
    Query(
        alias="lastEventId",
        description="The same as the header Last-Event-ID, for clients that cannot send it; wins over `after`.",
        examples=["0"],
    ),
]
PageSize = Annotated[
    int,
    Query(
        ge=1,
        le=LARGEST_PAGE,
        description="Most events of a JSON page. A page ends earlier where its events name 2,000 updates; `has_more` "
        "says whether more follow.",
    ),
]
Follow = Annotated[bool, Query(description="Whether a stream goes on with events that are still to come.")]
"""Query parameters of every route that reads or follows events."""

PING_SECONDS = 15.0
"""Proxies close a connection on which nothing moves; a comment moves and says nothing."""

AWAY_SECONDS = 1.0
"""Pause of everybody who follows while the database does not answer."""

FASTEST_POLL_SECONDS = 0.05
"""Pause after a read that found something; it grows to the slowest pause while nothing happens."""

RECENT_FRAMES = 256
"""Frames of each followed job that are kept for those who are up to date."""

PAGE = 200
"""Events read in one transaction while a follower catches up."""

PAGE_UPDATES = 2000
"""A page, and what is read at once for a stream, ends where its events name so many updates: quick jobs name many."""

SLOW_SECONDS = 60.0
"""A client that takes no byte for so long is cut off; it may come back with Last-Event-ID."""

GOODBYE_SECONDS = 1.0
"""What is left to a client to take its last bytes when the server shuts down."""

MEDIA_TYPE = "text/event-stream"
_UNCACHED = {"cache-control": "no-store"}
JSON = "application/json"

_log = logging.getLogger(__name__)
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class _Frame:
    seq: int
    data: bytes


@dataclass(slots=True, eq=False)
class _Channel:
    """What the process knows of one followed job.

    `frames` are all events behind `floor` up to `position`, without a gap. When the channel has ended, nothing comes
    behind `position` any more.
    """

    job_id: str
    floor: int
    position: int
    ended: bool
    followers: int = 0
    frames: deque[_Frame] = field(default_factory=deque)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def publish(self, frames: Sequence[_Frame]) -> None:
        self.frames.extend(frames)
        self.position = frames[-1].seq
        while len(self.frames) > RECENT_FRAMES:
            self.floor = self.frames.popleft().seq

    def behind(self, after: int) -> list[_Frame]:
        """The frames behind a position that is not below the floor; few, so from the newest back."""
        found = list(takewhile(lambda frame: frame.seq > after, reversed(self.frames)))
        found.reverse()
        return found

    def wake(self) -> None:
        self.news.set()
        self.news = asyncio.Event()


class _Deadline:
    """When a stream ends although its client has not taken everything: only sending has a limit, waiting has none."""

    def __init__(self, slow_seconds: float) -> None:
        self._slow_seconds = slow_seconds
        self._timeout: asyncio.Timeout | None = None
        self._last: float | None = None

    async def run(self, response: Callable[[Send], Awaitable[None]], send: Send) -> None:
        """Runs the response; when the deadline passes it is cut off, which closes the connection."""
        try:
            async with asyncio.timeout(None) as self._timeout:
                await response(self._guard(send))
        except TimeoutError:
            _log.info("a stream was cut off: its client took nothing for too long")
        finally:
            self._timeout = None

    def end_within(self, seconds: float) -> None:
        """Whatever happens, the stream ends then."""
        self._last = asyncio.get_running_loop().time() + seconds
        if self._timeout is not None:
            self._timeout.reschedule(self._last)

    def _guard(self, send: Send) -> Send:
        loop = asyncio.get_running_loop()

        async def guarded(message: Message) -> None:
            self._next(loop.time() + self._slow_seconds)
            await send(message)
            self._next(None)

        return guarded

    def _next(self, when: float | None) -> None:
        if self._timeout is not None and self._last is None:
            self._timeout.reschedule(when)


class Tail:
    """Follows the events of jobs for all streams of one process. Lives on the event loop.

    Args:
        database: Where the events are.
        metrics: What counts the open streams.
        max_streams: Most streams open at once.
        poll_seconds: Slowest pause between two looks for new events.
        ping_seconds: How long a stream may be silent.
        slow_seconds: How long a client may take nothing of what it is sent.
    """

    def __init__(
        self,
        database: Database,
        *,
        metrics: Metrics,
        max_streams: int,
        poll_seconds: float = 0.2,
        ping_seconds: float = PING_SECONDS,
        slow_seconds: float = SLOW_SECONDS,
    ) -> None:
        self._database = database
        self._metrics = metrics
        self._max_streams = max_streams
        self._slowest = poll_seconds
        self._fastest = min(FASTEST_POLL_SECONDS, poll_seconds)
        self._ping_seconds = ping_seconds
        self._slow_seconds = slow_seconds
        # those who catch up share a few threads; the poller has one of its own
        self._lane = Lane(3)
        self._channels: dict[str, _Channel] = {}
        self._streams: set[_Deadline] = set()
        self._followed = asyncio.Event()
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._poller: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins to look for events; nothing is asked while nobody follows."""
        self._loop = asyncio.get_running_loop()
        self._poller = self._loop.create_task(self._poll_for_ever(), name="tail")
        self._poller.add_done_callback(self._poller_ended)

    async def stop(self) -> None:
        """Ends all streams and the poller."""
        self.close()
        if self._poller is not None:
            self._poller.cancel()
            await asyncio.gather(self._poller, return_exceptions=True)

    def close(self) -> None:
        """Ends all streams at once and refuses new ones; may be called by a signal handler or another thread.

        uvicorn waits for open responses before the lifespan ends, so this must come earlier, with the signal.
        """
        self._closed = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._end_streams)

    def _end_streams(self) -> None:
        for channel in self._channels.values():
            channel.wake()
        for deadline in self._streams:
            deadline.end_within(GOODBYE_SECONDS)

    # --- streams

    @contextmanager
    def room(self) -> Iterator[_Deadline]:
        """Room for one stream, and its deadline.

        Raises:
            TooManyRequests: if there is no room.
            Unavailable: if the server is shutting down.
        """
        if self._closed:
            raise Unavailable("The server is shutting down.")
        if len(self._streams) >= self._max_streams:
            raise TooManyRequests(f"{self._max_streams} streams are open (PGENGINE_MAX_STREAMS); try again later.")
        deadline = _Deadline(self._slow_seconds)
        self._streams.add(deadline)
        self._metrics.stream_opened()
        try:
            yield deadline
        finally:
            self._streams.discard(deadline)
            self._metrics.stream_closed()

    async def follow(self, job_id: str, after: int) -> AsyncGenerator[bytes]:
        """Frames of all events behind a position: those that there are, then those that come.

        Ends behind the terminal event, when the job is deleted, and on shutdown.
        """
        head = None
        while not self._closed:
            try:
                head = await self._lane.run(self._head, job_id)
                break
            except Unavailable:
                yield await self._pause()
        with self._channel(job_id, head) as channel:
            while not self._closed:
                if after < channel.floor:
                    try:
                        frames = await self._lane.run(self._page, job_id, after)
                    except Unavailable:
                        yield await self._pause()
                        continue
                else:
                    frames = channel.behind(after)
                if frames:
                    after = frames[-1].seq
                    yield b"".join(frame.data for frame in frames)
                elif after < channel.floor:
                    return  # the job was deleted while it was replayed
                # nothing is awaited between here and the wait for news, so none is missed
                if after < channel.position:
                    continue
                if channel.ended:
                    return
                if not await _came(channel.news, self._ping_seconds):
                    yield KEEPALIVE_COMMENT

    async def replay(self, job_id: str, after: int) -> AsyncGenerator[bytes]:
        """Frames of the events that there are now; cut off where the database does not answer."""
        head = await self._lane.run(self._head, job_id)
        while head is not None and after < head.seq and not self._closed:
            frames = await self._lane.run(self._page, job_id, after)
            if not frames:
                return
            after = frames[-1].seq
            yield b"".join(frame.data for frame in frames)

    async def _pause(self) -> bytes:
        """Waits while the database does not answer, and says that the stream lives."""
        await asyncio.sleep(AWAY_SECONDS)
        return KEEPALIVE_COMMENT

    @contextmanager
    def _channel(self, job_id: str, head: history.Head | None) -> Iterator[_Channel]:
        channel = self._channels.get(job_id)
        if channel is None:
            seq = head.seq if head else 0
            channel = _Channel(job_id, floor=seq, position=seq, ended=head is None or head.is_terminal)
            self._channels[job_id] = channel
        channel.followers += 1
        self._followed.set()
        try:
            yield channel
        finally:
            channel.followers -= 1
            if channel.followers == 0:
                del self._channels[job_id]

    # --- the poller

    async def _poll_for_ever(self) -> None:
        pause = self._fastest
        while True:
            if not self._channels:
                self._followed.clear()
                await self._followed.wait()
            try:
                found = await self._poll()
            except Unavailable:
                # followers wait; what happens meanwhile they get when it is back
                await asyncio.sleep(AWAY_SECONDS)
                continue
            except SQLAlchemyError:
                _log.exception("new events could not be read; streams wait")
                await asyncio.sleep(AWAY_SECONDS)
                continue
            pause = self._fastest if found else min(pause * 1.5, self._slowest)
            await asyncio.sleep(pause)

    def _poller_ended(self, poller: asyncio.Task[None]) -> None:
        if not poller.cancelled() and (error := poller.exception()) is not None:
            _log.error("events are not followed any more", exc_info=error)
            self.close()

    async def _poll(self) -> bool:
        """Reads what is new for the followed jobs; says whether there was anything."""
        open_ = [channel for channel in self._channels.values() if not channel.ended]
        if not open_:
            return False
        # a channel that is given up meanwhile and opened anew is another object, with a position of its own
        news = await run_in_threadpool(self._read, {channel.job_id: channel.position for channel in open_})
        for channel in open_:
            if channel.job_id in news:
                frames, ended = news[channel.job_id]
                if frames:
                    channel.publish(frames)
                channel.ended = ended
                channel.wake()
        return bool(news)

    def _read(self, positions: dict[str, int]) -> dict[str, tuple[list[_Frame], bool]]:
        """For each job that has moved, its new frames, and whether they are the last."""
        news: dict[str, tuple[list[_Frame], bool]] = {}
        with self._database.read() as session:
            heads = history.heads(session, list(positions))
            for job_id, position in positions.items():
                head = heads.get(job_id)
                if head is None:
                    news[job_id] = ([], True)
                elif head.seq > position or head.is_terminal:
                    frames = _framed(history.events(session, job_id, position, PAGE, PAGE_UPDATES))
                    last = frames[-1].seq if frames else position
                    news[job_id] = (frames, head.is_terminal and last >= head.seq)
        return news

    def _head(self, job_id: str) -> history.Head | None:
        with self._database.read() as session:
            return history.heads(session, [job_id]).get(job_id)

    def _page(self, job_id: str, after: int) -> list[_Frame]:
        with self._database.read() as session:
            return _framed(history.events(session, job_id, after, PAGE, PAGE_UPDATES))


async def _came(news: asyncio.Event, seconds: float) -> bool:
    """Whether there are news before it is time for a ping."""
    try:
        async with asyncio.timeout(seconds):
            await news.wait()
    except TimeoutError:
        return False
    return True


def _framed(events: Sequence[Mapping[str, Any]]) -> list[_Frame]:
    return [
        _Frame(
            event["seq"],
            format_sse_event(data_str=_encode(event).decode(), event=event["type"], id=str(event["seq"])),
        )
        for event in events
    ]


# --- responses --------------------------------------------------------------------------------------------------------


def events_response(
    request: Request,
    database: Database,
    tail: Tail,
    job_id: str,
    *,
    after: str | None,
    seen: str | None,
    limit: int,
    follow: bool,
    kind: JobKind | None = None,
) -> Response:
    """The answer to `GET …/events`: a JSON page, or a stream where the Accept header asks for one.

    A browser connects again when a stream has ended, until it is answered 204; so does who has seen the terminal event.

    Args:
        request: What Accept and Last-Event-ID are read from.
        database: Where the events are.
        tail: What follows them.
        job_id: The job.
        after: Query parameter: begin behind this event.
        seen: Query parameter: what the header Last-Event-ID says, for clients that cannot send it.
        limit: Most events of a page; a stream has no such bound.
        follow: Whether a stream goes on with the events that are still to come.
        kind: What kind of job it has to be; None for any.

    Raises:
        NotFound: if there is no such job.
        InvalidRequest: if `after` or Last-Event-ID is no number of an event.
        NotAcceptable: if Accept names neither JSON nor an event stream.
    """
    begin = 0 if after is None else _position("after", after)
    header = request.headers.get("last-event-id")
    # who connects again sends the address as it was, with its old `after`; and the browser's own header is newer than
    # what a page wrote into the address. Empty is what a client sends that has seen nothing
    position = begin
    for name, value in (("lastEventId", seen), ("last-event-id", header)):
        position = _position(name, value) if value else position
    wanted = negotiated(request.headers.get("accept", "*/*"), (JSON, MEDIA_TYPE))
    with database.read() as session:
        head = history.heads(session, [job_id], kind).get(job_id)
        if head is None:
            raise NotFound("There is no such job.")
        events = history.events(session, job_id, begin, limit, PAGE_UPDATES) if wanted == JSON else None
    if events is not None:
        return _page_response(events, head)
    if head.is_terminal and position >= head.seq:
        return Response(status_code=204, headers=_UNCACHED)
    return _EventStream(tail, tail.follow(job_id, position) if follow else tail.replay(job_id, position))


def _page_response(events: Sequence[Mapping[str, Any]], head: history.Head) -> Response:
    has_more = bool(events) and events[-1]["seq"] < head.seq
    cursor = str(events[-1]["seq"]) if has_more else None
    page = {"object": "list", "data": events, "has_more": has_more, "next_cursor": cursor}
    return Response(_encode(page), media_type=JSON)


def _position(name: str, value: str) -> int:
    if value.isascii() and value.isdigit() and len(value) <= 16 and int(value) <= LARGEST_INTEGER:
        return int(value)
    raise invalid(f"/{name}", "malformed_cursor", f"Expected the seq of an event, 0 to {LARGEST_INTEGER}.")


class _EventStream(StreamingResponse):
    """A stream that counts, is bounded, and lets go of its job when it ends for any reason."""

    media_type = MEDIA_TYPE

    def __init__(self, tail: Tail, frames: AsyncGenerator[bytes]) -> None:
        super().__init__(frames, headers=_UNCACHED | {"x-accel-buffering": "no"})
        self._tail = tail
        self._frames = frames

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = super().__call__
        with self._tail.room() as deadline:
            async with aclosing(self._frames):
                await deadline.run(lambda guarded: answer(scope, receive, guarded), send)


OPENAPI: dict[str, Any] = {
    "parameters": [
        {
            "name": "Last-Event-ID",
            "in": "header",
            "required": False,
            "description": "Sent by clients of event streams when they connect again: a stream begins behind the event "
            "with this `seq`. Wins over `lastEventId`, which wins over `after`; empty is as good as absent.",
            "schema": {"type": "string", "pattern": "^[0-9]{0,16}$"},
        }
    ],
    "responses": {
        "200": {
            "description": (
                "A page of events, or a stream of them where `Accept` asks for `text/event-stream`: `id` is `seq`, "
                "`event` is `type`, `data` is the same object as in a page. The stream replays what lies behind "
                "`Last-Event-ID`, `lastEventId` or `after`, goes on with what comes, and ends behind the terminal "
                "event; a comment every 15 seconds keeps it open. With `follow=false` it ends at the newest event. "
                "A gradient check has events of its states only: how far it is says its `progress`."
            ),
            "content": {
                MEDIA_TYPE: {"schema": {"type": "string"}},
            },
        },
        "204": {"description": "To a stream: the job has ended, and the client has seen all events. Browsers stop."},
    },
}
"""What the operation's OpenAPI description has beside its path and query parameters."""
