"""The connections of the API: how much of a request each may send, by when, and how many there are.

uvicorn reads HTTP with a parser that keeps a header of any length, and waits for ever for the rest of a request. This
is its protocol with bounds:

    head        so many bytes (431) within so many seconds (408), counted from the first byte or the opening
    body        some seconds, and more for each byte that has come (408); how large it may be the gate knows
    answer      a client that takes nothing of it for a minute is cut off
    number      beyond the bound the connection goes that has waited longest without a request, or else the one that
                was answered longest ago and is still sending its body; where there is none, 503

What is refused here is a problem document with a request id, as everywhere. A request that comes in one piece and is
answered costs two look-ups more; one timer looks after all that is late.
"""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from time import time
from typing import Any, Literal

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from server.errors import (
    PROBLEM_MEDIA_TYPE,
    ApiError,
    HeadTooLarge,
    MalformedRequest,
    RequestTimeout,
    TooManyConnections,
    problem,
)
from server.logs import Answered
from server.middleware import SECURITY_HEADERS, request_id_for

__all__ = ["LARGEST_HEAD", "MOST_HEADERS", "Connection", "Connections", "Limits"]

LARGEST_HEAD = 65_536
"""Bytes of a request line and its headers together."""

MOST_HEADERS = 256
"""Headers of one request."""

SLOWEST_BODY = 1024
"""A body may come as slowly as so many bytes a second, once its first seconds are over."""

EVICTED_AFTER_SECONDS = 1.0
"""A connection whose requests are answered may be closed for another one when that was so long ago."""

LINGER_SECONDS = 2.0
"""What a client that is refused still sends is read for so long: closing at once would destroy the answer."""

TURNED_AWAY = 16
"""Connections beyond the bound that are kept until they have been told so; further ones are closed without a word."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What connections may do.

    Attributes:
        connections: Most of them at once.
        head_seconds: Time for a request line and headers.
        body_seconds: Time for a body, besides that for its bytes.
        answer_seconds: How long a client may take nothing of an answer.
        discarded_bytes: What is read after a refusal, at most.
    """

    connections: int
    head_seconds: float
    body_seconds: float
    answer_seconds: float = 60.0
    discarded_bytes: int = 16 * 2**20


class Connections:
    """All connections of one server, by what they wait for. Lives on the event loop.

    Args:
        limits: What they may do.
        refused: Told of each request that was refused before the application saw it.
    """

    def __init__(self, limits: Limits, refused: Callable[[Answered], None]) -> None:
        self.limits = limits
        self.refused = refused
        # each in the order of its times: who has no whole head yet, and since when
        self.waiting: dict[Connection, float] = {}
        self.receiving: dict[Connection, float] = {}
        # of those that send a body, who has an answer already, as without a key, and since when
        self.answered: dict[Connection, float] = {}
        # how much of its answer a client has not taken, and since when
        self.sending: dict[Connection, tuple[int, float]] = {}
        self.ending: dict[Connection, float] = {}
        self._period = min(1.0, limits.head_seconds / 4, limits.body_seconds / 4, limits.answer_seconds / 4)
        self._timer: asyncio.TimerHandle | None = None

    def protocol(self, **arguments: Any) -> "Connection":
        """A new connection; what uvicorn calls for each."""
        return Connection(self, **arguments)

    def joined(self, connection: "Connection", number: int) -> bool:
        """Make room for one more; says whether there is any."""
        loop = connection.loop
        if self._timer is None:
            self._timer = loop.call_later(self._period, self._look, loop)
        if number <= self.limits.connections:
            return True
        for group in (self.waiting, self.answered):
            longest = next(iter(group), None)
            if longest is not None and group[longest] + EVICTED_AFTER_SECONDS <= loop.time():
                longest.close()
                return True
        return False

    def left(self, connection: "Connection") -> None:
        """Forget a connection that is closed."""
        for group in (self.waiting, self.receiving, self.answered, self.sending, self.ending):
            group.pop(connection, None)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        """Whose time is over?"""
        now = loop.time()
        late = now - self.limits.head_seconds
        for connection, _ in list(takewhile(lambda waiting: waiting[1] <= late, self.waiting.items())):
            connection.head_is_late()
        for connection, since in list(self.receiving.items()):
            connection.check_body(now - since, now)
        for connection, (size, since) in list(self.sending.items()):
            left = connection.transport.get_write_buffer_size()
            if left != size:
                self.sending[connection] = (left, now)
            elif since + self.limits.answer_seconds <= now:
                connection.cut()
        for connection, when in list(self.ending.items()):
            if when <= now:
                connection.cut()
        self._timer = loop.call_later(self._period, self._look, loop)


class Connection(HttpToolsProtocol):
    """One connection of the API."""

    def __init__(self, all_: Connections, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._all = all_
        self._limits = all_.limits
        self._at: Literal["start", "head", "body"] = "start"
        self._head_bytes = 0
        self._begun = 0
        self._fed = 0
        self._received = 0
        self._framing = 0
        self._has_room = True
        self._ended = False
        self._is_upgrade = False
        self._reason: ApiError | None = None

    # --- what the transport tells

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        number = len(self.connections)
        self._has_room = self._all.joined(self, number)
        if self._has_room:
            self._all.waiting[self] = self.loop.time()
        elif number <= self._limits.connections + TURNED_AWAY:
            self._all.ending[self] = self.loop.time() + LINGER_SECONDS
        else:
            self.cut()

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended = True
        self._all.left(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._ended:
            self._received += len(data)
            if self._received > self._limits.discarded_bytes:
                self.cut()
        elif self._at == "body" or self._head_bytes + len(data) <= LARGEST_HEAD:
            self._feed(data)
        else:
            self._feed_slowly(data)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._all.sending[self] = (self.transport.get_write_buffer_size(), self.loop.time())

    def resume_writing(self) -> None:
        super().resume_writing()
        self._all.sending.pop(self, None)

    # --- parsing

    def _feed_slowly(self, data: bytes) -> None:
        """A head never gets more than its bound into the parser, whose time grows with the square of a header."""
        while data and not self._ended:
            size = len(data) if self._at == "body" else LARGEST_HEAD - self._head_bytes
            self._feed(data[:size])
            data = data[size:]
            if self._at != "body" and self._head_bytes >= LARGEST_HEAD:
                self._refuse(_head_too_large())

    def _feed(self, data: bytes) -> None:
        was = self._at
        self._begun, self._fed = 0, len(data)
        # what a body has beside its bytes, such as trailers, is kept by the parser, too
        self._framing += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self._refuse(self._reason or MalformedRequest())
            return
        except httptools.HttpParserUpgrade as upgrade:
            self._begin_again(data[upgrade.args[0] :])
            return
        if self._at == "body":
            self._body_goes_on(was, len(data))
        elif self._at == "head" or (was == "start" and self._begun == 0):
            self._head_goes_on(was, len(data))

    def _begin_again(self, rest: bytes) -> None:
        """Read a request as HTTP/1.1 that offers another protocol: of such a one the parser would drop the body."""
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        kept = [(name, value) for name, value in self.headers if name not in (b"connection", b"upgrade")]
        lines = [b"%b %b HTTP/%b" % (method, self.url, version), *(name + b": " + value for name, value in kept)]
        self.parser = httptools.HttpRequestParser(self)
        self._at, self._is_upgrade = "start", False
        self._feed(b"\r\n".join(lines) + b"\r\n\r\n" + rest)

    def _head_goes_on(self, was: str, size: int) -> None:
        if self._head_bytes == 0 and self._has_room and (self.cycle is None or self.cycle.response_complete):
            # the time for a head begins with its first byte
            self._all.waiting.pop(self, None)
            self._all.waiting[self] = self.loop.time()
        # where in the piece the head began is not known, unless it began the piece
        self._head_bytes += size if was == "head" or (was == "start" and self._begun < 2) else 1

    def _body_goes_on(self, was: str, size: int) -> None:
        if was == "body":
            self._received += size
        else:
            self._received = 0
            self._all.receiving[self] = self.loop.time()
        if self._framing > LARGEST_HEAD:
            self._refuse(_head_too_large())
        elif self.cycle is not None and self.cycle.response_complete and self._received > self._limits.discarded_bytes:
            self.cut()

    def on_message_begin(self) -> None:
        self._at = "head"
        self._begun += 1
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        if not self._has_room:
            self._reason = _too_many(self._limits.connections)
        elif len(self.headers) > MOST_HEADERS or (self._fed > LARGEST_HEAD and self._head_size() > LARGEST_HEAD):
            self._reason = _head_too_large()
        elif self.parser.get_method() == b"CONNECT":
            self._reason = MalformedRequest("This is not a proxy.")
        if self._reason is not None:
            raise self._reason
        if self.parser.should_upgrade():
            self._is_upgrade = True
            return
        super().on_headers_complete()
        # trailers come the same way, and are no headers
        self.headers = []
        self._at = "body"
        self._head_bytes = self._framing = 0
        self._all.waiting.pop(self, None)

    def on_body(self, body: bytes) -> None:
        self._framing = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._is_upgrade:
            return
        super().on_message_complete()
        self._at = "start"
        self._all.receiving.pop(self, None)
        self._all.answered.pop(self, None)
        if self.cycle is not None and self.cycle.response_complete:
            self._all.waiting[self] = self.loop.time()

    def _head_size(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    # --- the end of an answer, and of a connection

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._closing()
        elif self.cycle is None or self.cycle.response_complete:
            idle = self._all.answered if self._at == "body" else self._all.waiting
            idle[self] = self.loop.time()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._closing()

    def close(self) -> None:
        """Close the connection when its client has taken what was sent."""
        self._ended = True
        self.transport.close()
        self._closing()

    def _closing(self) -> None:
        self._all.left(self)
        self._all.sending[self] = (self.transport.get_write_buffer_size(), self.loop.time())

    def head_is_late(self) -> None:
        """The time for a head is over."""
        if self._head_bytes:
            self._refuse(RequestTimeout(f"The head of a request may take {self._limits.head_seconds:g} seconds."))
        elif self.timeout_keep_alive_task is None:
            self.close()

    def check_body(self, seconds: float, now: float) -> None:
        """Whether a body still has time after so many seconds."""
        cycle = self.cycle
        if (
            cycle is not None
            and not cycle.response_complete
            and (self.flow.read_paused or cycle.waiting_for_100_continue)
        ):
            # it is this server that does not go on
            self._all.receiving[self], self._received = now, 0
        elif seconds > self._limits.body_seconds + self._received / SLOWEST_BODY:
            self._refuse(
                RequestTimeout(f"A body may take {self._limits.body_seconds:g} seconds, and more if it is large.")
            )

    def cut(self) -> None:
        """Close the connection at once."""
        self._ended = True
        self._all.left(self)
        self.transport.abort()

    # --- refusing

    def _refuse(self, error: ApiError) -> None:
        """Answer with a problem document in the place of the application, and end the connection."""
        cycle = self.cycle
        under_way = cycle is not None and not cycle.response_complete
        if self._at == "body":
            if cycle is None or cycle.response_started or self.pipeline:
                return self.cut()
            # the application is told that nobody is there
            cycle.disconnected = True
            cycle.message_event.set()
        elif cycle is not None and under_way:
            # what is at fault comes behind a request that is being answered; its answer is the last one
            self._ended, cycle.keep_alive = True, False
            return
        self._answer(error)
        self._linger()

    def _answer(self, error: ApiError) -> None:
        sent = next((value for name, value in self.headers or () if name == b"x-request-id"), None)
        if self._at == "body":
            sent = next((value for name, value in self.scope["headers"] if name == b"x-request-id"), None)
        request_id = request_id_for(sent)
        body = json.dumps(problem(error, request_id)).encode()
        headers = [
            *self.server_state.default_headers,
            (b"content-type", PROBLEM_MEDIA_TYPE.encode()),
            (b"content-length", str(len(body)).encode()),
            *((name.encode(), value.encode()) for name, value in error.headers.items()),
            (b"x-request-id", request_id.encode()),
            *SECURITY_HEADERS,
            (b"connection", b"close"),
        ]
        lines = [name + b": " + value + b"\r\n" for name, value in headers]
        self.transport.write(b"".join([STATUS_LINE[error.status], *lines, b"\r\n", body]))
        self._all.refused(self._answered(error.status, request_id))

    def _answered(self, status: int, request_id: str) -> Answered:
        url = bytes(getattr(self, "url", b""))
        method = self.parser.get_method().decode() if url else ""
        path = url.partition(b"?")[0].decode("latin-1")
        address = self.client[0] if self.client else None
        return Answered(time(), request_id, None, address, method, path, "unmatched", status, 0.0)

    def _linger(self) -> None:
        self._ended, self._received = True, 0
        self._all.left(self)
        self._all.ending[self] = self.loop.time() + LINGER_SECONDS
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()


def _head_too_large() -> HeadTooLarge:
    return HeadTooLarge(f"A request line and its headers may have {LARGEST_HEAD} bytes and {MOST_HEADERS} headers.")


def _too_many(connections: int) -> TooManyConnections:
    return TooManyConnections(f"{connections} connections are open (PGENGINE_MAX_CONNECTIONS); try again later.")
