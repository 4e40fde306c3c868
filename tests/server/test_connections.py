"""Bounds of connections, on raw sockets against a real uvicorn: sizes, deadlines, numbers.

Deadlines are short here, and nothing is measured against a clock: a test waits until the server acts, and fails only if
it never does.
"""

import asyncio
import contextlib
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import httpx
import pytest
import uvicorn

from server.connections import LARGEST_HEAD, MOST_HEADERS, TURNED_AWAY, Connections, Limits
from server.logs import Answered

PATIENCE = 60.0
"""A test fails when the server has not acted within so many seconds."""


@dataclass
class Served:
    """A server with an application that answers with what it was sent.

    `/slow` answers when `released` is set, `/large` with 50 MB, everything else with the body.
    """

    port: int
    all: Connections = field(init=False)
    released: threading.Event = field(default_factory=threading.Event)
    refused: list[Answered] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    headers: list[dict[bytes, bytes]] = field(default_factory=list)
    aborted: threading.Event = field(default_factory=threading.Event)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.aborted.set()
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.bodies.append(body)
        self.headers.append(dict(scope["headers"]))
        if scope["path"] == "/slow":
            await asyncio.to_thread(self.released.wait)
        if scope["path"] == "/large":
            body = b"x" * 50_000_000
        length = str(len(body)).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        await send({"type": "http.response.body", "body": body})


@contextmanager
def serving(
    connections: int = 1000,
    head: float = 60.0,
    body: float = 60.0,
    answer: float = 60.0,
    discarded: int = 10**6,
    app: Any = None,
) -> Iterator[Served]:
    limits = Limits(connections, head, body, answer, discarded)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        served = Served(listener.getsockname()[1])
        served.all = Connections(limits, served.refused.append)
        config = uvicorn.Config(
            app or served.app,
            http=cast(Any, served.all.protocol),
            interface="asgi3",
            proxy_headers=False,
            lifespan="off",
            log_level="error",
            timeout_graceful_shutdown=5,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                thread.join(0.01)
            yield served
        finally:
            served.released.set()
            server.should_exit = True
            thread.join(PATIENCE)


@pytest.fixture(scope="module")
def patient() -> Iterator[Served]:
    """A server whose deadlines are far away."""
    with serving() as served:
        yield served


def everything(client: socket.socket) -> bytes:
    """All that comes until the server closes."""
    received = b""
    while data := client.recv(65_536):
        received += data
    return received


def answer(client: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """One answer; the connection stays open."""
    received = b""
    while b"\r\n\r\n" not in received:
        data = client.recv(65_536)
        assert data, f"closed after {received!r}"
        received += data
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, value in (line.split(":", 1) for line in lines)}
    while len(body) < int(headers["content-length"]):
        data = client.recv(65_536)
        assert data, "the answer was cut off"
        body += data
    return int(status.split()[1]), headers, body


def refusal(client: socket.socket, status: int, code: str) -> dict[str, Any]:
    """A problem document with a request id, behind which the server closes."""
    found, headers, body = answer(client)
    problem: dict[str, Any] = json.loads(body)
    assert (found, problem["code"], problem["status"]) == (status, code, status)
    assert headers["content-type"] == "application/problem+json"
    assert headers["connection"] == "close"
    assert problem["request_id"] == headers["x-request-id"]
    assert headers["x-content-type-options"] == "nosniff"
    assert everything(client) == b""
    return problem


GET = b"GET /x HTTP/1.1\r\nHost: localhost\r\n"


# --- heads


@pytest.mark.parametrize(
    "sent",
    [
        GET + b"A: " + b"x" * LARGEST_HEAD,
        GET + b"x" * LARGEST_HEAD,
        b"GET /" + b"x" * LARGEST_HEAD,
        GET + b"A: x\r\n" * LARGEST_HEAD,
        GET + b"A: " + b"x" * LARGEST_HEAD + b"\r\n\r\n",
        GET + b"A: x\r\n" * (MOST_HEADERS + 1) + b"\r\n",
        b"\r\n" * LARGEST_HEAD,
    ],
    ids=["a value", "a name", "a path", "many", "a whole one", "too many", "blank lines"],
)
def test_a_head_of_more_than_64_kilobytes_is_refused(patient: Served, sent: bytes) -> None:
    with patient.connect() as client:
        client.sendall(sent)
        refusal(client, 431, "head_too_large")


def test_a_large_head_behind_a_request_leaves_its_answer_whole(patient: Served) -> None:
    with patient.connect() as client:
        client.sendall(GET + b"\r\n")
        assert answer(client)[0] == 200
        client.sendall(GET + b"A: " + b"x" * LARGEST_HEAD)
        refusal(client, 431, "head_too_large")
    with patient.connect() as client:
        client.sendall(GET + b"\r\n" + GET + b"A: " + b"x" * (2 * LARGEST_HEAD))
        assert answer(client)[0] == 200
        rest = everything(client)
        assert rest == b"" or rest.startswith(b"HTTP/1.1 431")


@pytest.mark.parametrize("size", [1, 1000, 60_000, 10_000_000])
def test_a_large_head_is_refused_in_whatever_pieces_it_comes(patient: Served, size: int) -> None:
    sent = GET + b"A: " + b"x" * LARGEST_HEAD
    with patient.connect() as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.sendall(sent[:-2000])
        for start in range(len(sent) - 2000, len(sent), size):
            client.sendall(sent[start : start + size])
        refusal(client, 431, "head_too_large")


def test_a_client_that_goes_on_sending_still_gets_its_refusal(patient: Served) -> None:
    with patient.connect() as client:
        client.sendall(GET + b"A: ")
        for _ in range(8):
            client.sendall(b"x" * 100_000)
        refusal(client, 431, "head_too_large")


def test_a_header_without_end_is_cut_off(patient: Served) -> None:
    with patient.connect() as client, pytest.raises(OSError):
        client.sendall(GET + b"A: ")
        for _ in range(1000):
            client.sendall(b"x" * 100_000)


def test_the_largest_head_is_taken(patient: Served) -> None:
    head = GET + b"A: "
    head += b"x" * (LARGEST_HEAD - len(head) - 4) + b"\r\n\r\n"
    assert len(head) == LARGEST_HEAD
    with patient.connect() as client:
        for _ in range(3):
            client.sendall(head)
            assert answer(client)[0] == 200


def test_trailers_are_no_headers_and_have_a_bound(patient: Served) -> None:
    head = b"POST /x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with patient.connect() as client:
        client.sendall(head + b"2\r\nhi\r\n0\r\nAuthorization: Bearer stolen\r\n\r\n")
        assert answer(client)[2] == b"hi"
        assert b"authorization" not in patient.headers[-1]
        client.sendall(head + b"2\r\nhi\r\n0\r\nA: ")
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                client.sendall(b"x" * 10_000)
        refusal(client, 431, "head_too_large")


def test_extensions_of_chunks_have_a_bound(patient: Served) -> None:
    with patient.connect() as client:
        client.sendall(b"POST /x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2;")
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                client.sendall(b"x" * 10_000)
        refusal(client, 431, "head_too_large")


@pytest.mark.parametrize("chunk", [1, 7, 100_000])
def test_a_large_body_in_chunks_is_taken(patient: Served, chunk: int) -> None:
    size = 400_000 if chunk > 1 else 50_000
    body = b"".join(b"%x\r\n" % chunk + b"y" * chunk + b"\r\n" for _ in range(size // chunk)) + b"0\r\n\r\n"
    with patient.connect() as client:
        client.sendall(b"POST /x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" + body)
        assert answer(client)[2] == b"y" * (size // chunk * chunk)
        client.sendall(GET + b"\r\n")
        assert answer(client)[0] == 200


def test_requests_one_behind_the_other_are_answered_in_order(patient: Served) -> None:
    post = b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n"
    requests = b"".join(post + bytes([letter]) * 100_000 for letter in b"abcdef")
    with patient.connect() as client:
        sender = threading.Thread(target=client.sendall, args=(requests,))
        sender.start()
        received = b""
        while received.count(b"HTTP/1.1 200") < 6 or not received.endswith(b"f" * 100_000):
            data = client.recv(65_536)
            assert data
            received += data
        sender.join()
    assert [bytes(received)[at : at + 1] for at in (received.find(b"a" * 100), received.find(b"f" * 100))] == [
        b"a",
        b"f",
    ]


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET / HTTP/3.0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : a\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n",
        b"CONNECT localhost:1 HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
)
def test_what_is_not_http_is_a_problem_with_a_request_id(patient: Served, sent: bytes) -> None:
    with patient.connect() as client:
        client.sendall(sent)
        refusal(client, 400, "malformed_request")


def test_a_refusal_has_the_request_id_that_was_sent_and_is_told(patient: Served) -> None:
    sent = (
        b"POST /chunks?a=b HTTP/1.1\r\nHost: localhost\r\nX-Request-ID: mine-1\r\nTransfer-Encoding: chunked\r\n\r\nzz"
    )
    with patient.connect() as client:
        client.sendall(sent)
        assert refusal(client, 400, "malformed_request")["request_id"] == "mine-1"
    told = patient.refused[-1]
    assert (told.request_id, told.method, told.path, told.status) == ("mine-1", "POST", "/chunks", 400)
    assert told.address == "127.0.0.1"


def test_nonsense_behind_a_request_does_not_take_its_answer() -> None:
    with serving() as served, served.connect() as client:
        client.sendall(b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n")
        client.sendall(b"nonsense\r\n\r\n")
        served.released.set()
        status, _, _ = answer(client)
        assert status == 200
        assert everything(client) == b""


def test_an_upgrade_that_is_not_spoken_is_answered_as_it_is(patient: Served) -> None:
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    with patient.connect() as client:
        client.sendall(GET + upgrade + b"\r\n")
        assert answer(client)[0] == 200
        client.sendall(b"POST /x HTTP/1.1\r\nHost: localhost\r\n" + upgrade + b"Content-Length: 2\r\n\r\nhi")
        assert answer(client)[2] == b"hi"


# --- deadlines


@pytest.fixture(scope="module")
def hurried() -> Iterator[Served]:
    """A server that waits for nobody."""
    with serving(head=0.4, body=0.4, answer=0.4) as served:
        yield served


@pytest.mark.parametrize("sent", [b"G", GET, GET + b"A: b", b"\r\n"])
def test_half_a_head_is_answered_with_408(hurried: Served, sent: bytes) -> None:
    with hurried.connect() as client:
        client.sendall(sent)
        refusal(client, 408, "request_timeout")


def test_a_head_that_comes_byte_by_byte_gets_no_more_time(hurried: Served) -> None:
    with hurried.connect() as client, contextlib.suppress(ConnectionError):
        client.settimeout(0.02)
        received = b""
        deadline = time.monotonic() + PATIENCE
        client.sendall(GET)
        while b"408" not in received:
            assert time.monotonic() < deadline
            with contextlib.suppress(TimeoutError):
                received += client.recv(1000)
            client.sendall(b"A")


def test_a_connection_that_says_nothing_is_closed(hurried: Served) -> None:
    with hurried.connect() as client:
        assert everything(client) == b""


def test_half_a_head_behind_an_answer_is_cut_off_too(hurried: Served) -> None:
    with hurried.connect() as client:
        client.sendall(GET + b"\r\n")
        assert answer(client)[0] == 200
        client.sendall(b"GET /y HT")
        refusal(client, 408, "request_timeout")


def test_half_a_body_is_answered_with_408_and_the_application_is_told(hurried: Served) -> None:
    for framing in (b"Content-Length: 10\r\n\r\nhalf", b"Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n"):
        hurried.aborted.clear()
        with hurried.connect() as client:
            client.sendall(b"POST /x HTTP/1.1\r\nHost: localhost\r\n" + framing)
            refusal(client, 408, "request_timeout")
        assert hurried.aborted.wait(PATIENCE)


def test_a_slow_answer_is_not_cut_off() -> None:
    with serving(head=0.1, body=0.1, answer=0.1) as served, served.connect() as waiting, served.connect() as silent:
        waiting.sendall(b"POST /slow HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\nhi")
        # all deadlines have passed when a connection that began later is closed
        assert everything(silent) == b""
        with served.connect() as later:
            assert everything(later) == b""
        served.released.set()
        assert answer(waiting)[2] == b"hi"


@pytest.mark.slow
def test_a_client_that_takes_nothing_of_its_answer_is_cut_off() -> None:
    with serving(answer=3.0) as served, served.connect() as client:
        client.sendall(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.recv(10)
        _until(lambda: bool(served.all.sending))
        _until(lambda: not served.all.sending)
        received = 10
        # what had been sent before is in the buffers of the machine
        with contextlib.suppress(ConnectionError):
            while data := client.recv(1_000_000):
                received += len(data)
        assert received < 50_000_000


def test_a_body_behind_its_refusal_is_read_up_to_a_bound() -> None:
    """The application here answers before it has read the body, as the gate does with 401."""

    async def closed(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    with serving(discarded=200_000, app=closed) as served:
        with served.connect() as client:
            client.sendall(b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\n")
            assert answer(client)[0] == 401
            client.sendall(b"body" + GET + b"\r\n")
            assert answer(client)[0] == 401
        with served.connect() as client:
            client.sendall(b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000000\r\n\r\n")
            assert answer(client)[0] == 401
            with pytest.raises(OSError):
                for _ in range(1000):
                    client.sendall(b"x" * 100_000)


# --- how many


def test_beyond_the_bound_there_is_a_clear_503() -> None:
    with serving(connections=3) as served, contextlib.ExitStack() as stack:
        busy = [stack.enter_context(served.connect()) for _ in range(3)]
        for client in busy:
            client.sendall(b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n")
        _until(lambda: len(served.bodies) == 3)
        with served.connect() as client:
            client.sendall(GET + b"X-Request-ID: mine\r\n\r\n")
            problem = refusal(client, 503, "too_many_connections")
        assert problem["request_id"] == "mine"
        assert "PGENGINE_MAX_CONNECTIONS" in problem["detail"]
        served.released.set()
        for client in busy:
            assert answer(client)[0] == 200
        with served.connect() as client:
            client.sendall(GET + b"\r\n")
            # the connections that are idle again give way after a second, if not at once
            with contextlib.suppress(AssertionError):
                assert answer(client)[0] == 200


def test_connections_without_a_request_give_way() -> None:
    with serving(connections=10) as served, contextlib.ExitStack() as stack:
        for number in range(10):
            idle = stack.enter_context(served.connect())
            if number % 2:
                idle.sendall(GET)

        def answered() -> bool:
            with served.connect() as client:
                client.sendall(GET + b"\r\n")
                return answer(client)[0] == 200

        _until(answered)
        for _ in range(5):
            assert answered()


def test_bodies_behind_their_refusal_give_way() -> None:
    """Who has no key is answered at once, and must not hold a connection by never ending the body."""

    async def closed(scope: Any, receive: Any, send: Any) -> None:
        status = 401 if scope["method"] == "POST" else 200
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    with serving(connections=10, app=closed) as served, contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(served.connect()) for _ in range(10)]
        for stranger in strangers:
            stranger.sendall(b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\nx")
            assert answer(stranger)[0] == 401
        statuses: list[int] = []

        def answered() -> bool:
            for stranger in strangers:
                with contextlib.suppress(OSError):
                    stranger.sendall(b"x")  # no keep-alive timeout ends what still comes
            with contextlib.suppress(AssertionError, ConnectionError), served.connect() as client:
                client.sendall(GET + b"\r\n")
                statuses.append(answer(client)[0])
            return statuses[-1:] == [200]

        _until(answered)
        assert len(served.all.answered) < len(strangers)


def test_a_crowd_beyond_the_bound_costs_nothing() -> None:
    with serving(connections=2, head=0.5) as served, contextlib.ExitStack() as stack:
        busy = [stack.enter_context(served.connect()) for _ in range(2)]
        for client in busy:
            client.sendall(b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n")
        _until(lambda: len(served.bodies) == 2)
        crowd = [stack.enter_context(served.connect()) for _ in range(5 * TURNED_AWAY)]
        for client in crowd:
            with contextlib.suppress(ConnectionError):
                assert everything(client) == b""
        served.released.set()
        for client in busy:
            assert answer(client)[0] == 200


@pytest.mark.slow
def test_strangers_who_only_connect_shut_nobody_out(start: Any) -> None:
    shell = f"ulimit -n 128; exec {sys.executable} -m server serve"
    server = start(command=["bash", "-c", shell], PGENGINE_PORT="0", PGENGINE_NO_AUTH="1", PGENGINE_WORKERS="0")
    url = httpx.URL(server.wait_for(r"^API +(\S+)")[1])
    with contextlib.ExitStack() as stack:
        for number in range(200):
            stranger = stack.enter_context(socket.create_connection((url.host, url.port), timeout=PATIENCE))
            if number % 2:
                with contextlib.suppress(ConnectionError):
                    stranger.sendall(GET)

        def answered() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(url.join("/readyz")).status_code == 200
            return False

        _until(answered)
        assert httpx.get(url.join("/v1/policies")).status_code == 200
    assert server.end() == 0
    assert "Traceback" not in "\n".join(server.lines)


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)
