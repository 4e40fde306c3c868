"""Streams of events over real sockets: no gap, no repeat, bounded, and gone when the server goes."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from sqlalchemy import event
from sqlalchemy.engine import Engine

from server.checkpoints import store as checkpoints
from server.database import Database
from server.errors import PROBLEM_MEDIA_TYPE, ApiError, problem
from server.ids import new_id
from server.jobs import history, store
from server.jobs.reports import Claim, Measured, Outcome, Progress, Report
from server.jobs.tail import RECENT_FRAMES, LastEventId, Tail, events_response
from server.keys.store import ANYBODY
from server.metrics import JobFigures, Metrics
from server.middleware import Gate
from server.settings import Settings
from server.tables import Environment, Policy

STREAM = {"accept": "text/event-stream"}
PATIENCE = 120.0
"""Seconds after which a test gives up on what should come at once."""

AWKWARD = "one\u2028two\u0085three\rfour\r\nfive\nsix"


# --- jobs


def new_job(database: Database) -> str:
    """A queued job; its first event says so."""
    environment = Environment(id=new_id("env"), content_hash=new_id("env"), spec={}, facts={})
    policy = Policy(id=new_id("pol"), environment_id=environment.id, spec={}, seed=0)
    with database.write() as session:
        session.add(environment)
        session.flush()
        session.add(policy)
        session.flush()
        checkpoints.put(session, policy.id, 0, b"policy 0")
        job = store.create(
            session,
            policy_id=policy.id,
            environment_id=environment.id,
            start_updates=0,
            spec={"seed": 7},
            label={"kind": "exact"},
            max_attempts=3,
        )
    return job.id


def claim(database: Database) -> Claim:
    with database.write() as session:
        claimed = store.claim(session, "worker", 60.0)
    assert claimed is not None
    return claimed


def report(database: Database, claimed: Claim, update: int) -> None:
    """One metrics event."""
    measured = Measured(update, 10 * update, {"mean_return": float(update), "entropy": float("nan")})
    with database.write() as session:
        store.report(session, claimed.job_id, claimed.token, Report(Progress(updates=update), (measured,)))


def finish(database: Database, claimed: Claim) -> None:
    with database.write() as session:
        store.finish(session, claimed.job_id, claimed.token, Outcome("succeeded", result={"stopped_by": "updates"}))


def stored(database: Database, job_id: str) -> list[dict[str, Any]]:
    with database.read() as session:
        return history.events(session, job_id, 0, 100_000)


# --- a server


@dataclass
class Served:
    """A server on a real socket, with the events route and nothing else."""

    tail: Tail
    metrics: Metrics
    uvicorn: uvicorn.Server
    url: str

    @property
    def open_streams(self) -> float:
        text = self.metrics.exposition(None).decode()
        return float(next(line for line in text.splitlines() if line.startswith("pgengine_open_streams ")).split()[1])

    def events(self, job_id: str) -> str:
        return f"{self.url}/v1/training-jobs/{job_id}/events"


@contextmanager
def serving(database: Database, **bounds: Any) -> Iterator[Served]:
    metrics = Metrics("test")
    tail = Tail(database, metrics=metrics, **{"max_streams": 100, "poll_seconds": 0.1, **bounds})

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await tail.start()
        yield
        await tail.stop()

    app = FastAPI(lifespan=lifespan)

    @app.exception_handler(ApiError)
    async def refuse(_: Request, error: ApiError) -> Response:
        body = json.dumps(problem(error, "test"))
        return Response(body, error.status, headers=error.headers, media_type=PROBLEM_MEDIA_TYPE)

    @app.get("/v1/training-jobs/{job_id}/events")
    def events(
        request: Request,
        job_id: str,
        after: str | None = None,
        seen: LastEventId = None,
        limit: int = 200,
        follow: bool = True,
    ) -> Response:
        return events_response(request, database, tail, job_id, after=after, seen=seen, limit=limit, follow=follow)

    async def act(*_: Any) -> None: ...

    gate = Gate(app, act, settings=Settings(), metrics=metrics, verify=lambda _: None, anyone=ANYBODY)  # type: ignore[arg-type]
    server = uvicorn.Server(uvicorn.Config(gate, log_level="warning", lifespan="on", timeout_graceful_shutdown=10))  # type: ignore[arg-type]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            while not server.started:
                assert thread.is_alive()
                thread.join(0.01)
            yield Served(tail, metrics, server, url)
        finally:
            tail.close()
            server.should_exit = True
            thread.join(15)
            assert not thread.is_alive()


@dataclass
class Message:
    """One event as a browser would see it."""

    id: str
    event: str
    data: dict[str, Any]


def parsed(text: str) -> list[Message]:
    """Events of a stream by the rules of the HTML standard: lines end with CR, LF or CRLF and nothing else."""
    messages = []
    for block in text.replace("\r\n", "\n").replace("\r", "\n").split("\n\n"):
        fields: dict[str, str] = {}
        for line in block.split("\n"):
            name, _, value = line.partition(":")
            if name:
                fields[name] = (
                    fields[name] + "\n" + value.removeprefix(" ") if name in fields else value.removeprefix(" ")
                )
        if "data" in fields:
            messages.append(Message(fields["id"], fields["event"], json.loads(fields["data"])))
    return messages


async def until(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


class Reader:
    """One client of a stream, which reads as it comes."""

    def __init__(self, url: str, headers: dict[str, str] | None = None, params: dict[str, Any] | None = None) -> None:
        self.text = ""
        self.ended = False
        self._request = ("GET", url), {"headers": {**STREAM, **(headers or {})}, "params": params}
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        (method, url), options = self._request
        async with httpx.AsyncClient(timeout=30) as client, client.stream(method, url, **options) as response:
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            async for piece in response.aiter_text():
                self.text += piece
        self.ended = True

    @property
    def whole(self) -> str:
        """The messages that have come to their end."""
        return self.text[: self.text.rfind("\n\n") + 2]

    @property
    def seqs(self) -> list[int]:
        return [message.data["seq"] for message in parsed(self.whole)]

    async def cut(self) -> None:
        """Closes the connection in the middle."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


# --- what a stream says


async def _whole(database: Database) -> None:
    job_id = new_job(database)
    with serving(database) as served:
        reader = Reader(served.events(job_id))
        await until(lambda: len(reader.seqs) == 1)
        claimed = await asyncio.to_thread(claim, database)
        for update in range(1, 6):
            await asyncio.to_thread(report, database, claimed, update)
        await asyncio.to_thread(finish, database, claimed)
        await asyncio.wait_for(reader.task, PATIENCE)
        messages = parsed(reader.text)
        expected = stored(database, job_id)
        assert [message.data for message in messages] == json.loads(msgspec.json.encode(expected))
        assert [message.id for message in messages] == [str(e["seq"]) for e in expected]
        assert [message.event for message in messages] == [e["type"] for e in expected]
        assert messages[-1].data["data"]["is_terminal"] is True
        joined = next(message for message in messages if message.event == "metrics").data["data"]
        assert joined["metrics"][0]["mean_return"] == 1.0
        assert joined["metrics"][0]["entropy"] is None
        await until(lambda: served.open_streams == 0)


def test_replay_then_follow_until_the_terminal_event(database: Database) -> None:
    asyncio.run(_whole(database))


@pytest.mark.slow
def test_cut_and_resumed_again_and_again_without_gap_or_repeat(sqlite_database: Database) -> None:
    async def run() -> None:
        job_id = new_job(sqlite_database)
        claimed = claim(sqlite_database)

        def work() -> None:
            for update in range(1, 201):
                report(sqlite_database, claimed, update)
            finish(sqlite_database, claimed)

        seen: list[int] = []
        with serving(sqlite_database) as served:
            worker = asyncio.create_task(asyncio.to_thread(work))
            cuts = 0
            while True:
                headers = {"last-event-id": str(seen[-1])} if seen else {}
                reader = Reader(served.events(job_id), headers)
                await until(lambda reader=reader: reader.ended or len(reader.seqs) >= 7)  # type: ignore[misc]
                if not reader.ended:
                    await reader.cut()
                    cuts += 1
                seen += reader.seqs
                # one that was cut behind the last event has seen the end, too, and would be answered 204
                if reader.ended or '"is_terminal":true' in reader.whole:
                    break
            await worker
            assert cuts > 5
            assert seen == [e["seq"] for e in stored(sqlite_database, job_id)] == list(range(1, len(seen) + 1))

    asyncio.run(run())


@pytest.mark.slow
def test_a_follower_behind_the_recent_frames_reads_the_table(sqlite_database: Database) -> None:
    """One that arrives late and one that was there get the same events, more than are kept in memory."""

    async def run() -> None:
        job_id = new_job(sqlite_database)
        claimed = claim(sqlite_database)
        with serving(sqlite_database) as served:
            early = Reader(served.events(job_id))
            await until(lambda: len(early.seqs) == 2)
            for update in range(1, RECENT_FRAMES + 50):
                await asyncio.to_thread(report, sqlite_database, claimed, update)
            late = Reader(served.events(job_id))
            middle = Reader(served.events(job_id), params={"after": "40"})
            await asyncio.to_thread(finish, sqlite_database, claimed)
            await asyncio.wait_for(asyncio.gather(early.task, late.task, middle.task), PATIENCE)
            numbers = [e["seq"] for e in stored(sqlite_database, job_id)]
            assert early.seqs == late.seqs == numbers
            assert middle.seqs == numbers[40:]

    asyncio.run(run())


def test_json_is_not_cut_at_unusual_line_ends(sqlite_database: Database) -> None:
    async def run() -> None:
        job_id = new_job(sqlite_database)
        claimed = claim(sqlite_database)
        with sqlite_database.write() as session:
            store.lose(session, job_id, claimed.token, AWKWARD)
        with serving(sqlite_database) as served:
            reader = Reader(served.events(job_id), params={"follow": "false"})
            await asyncio.wait_for(reader.task, PATIENCE)
            assert [m.data["data"]["reason"] for m in parsed(reader.text) if "reason" in m.data["data"]] == [AWKWARD]

    asyncio.run(run())


def test_without_following_the_stream_is_finite(sqlite_database: Database) -> None:
    async def run() -> None:
        job_id = new_job(sqlite_database)
        with serving(sqlite_database) as served:
            reader = Reader(served.events(job_id), params={"follow": "false"})
            await asyncio.wait_for(reader.task, PATIENCE)
            assert reader.seqs == [1]
            nothing = Reader(served.events(job_id), params={"follow": "false", "after": "1"})
            await asyncio.wait_for(nothing.task, PATIENCE)
            assert nothing.text == ""

    asyncio.run(run())


@pytest.mark.parametrize("after", ["0", "2"])
def test_a_stream_of_an_ended_job_ends(sqlite_database: Database, after: str) -> None:

    async def run() -> None:
        job_id = new_job(sqlite_database)
        finish(sqlite_database, claim(sqlite_database))
        with serving(sqlite_database) as served:
            reader = Reader(served.events(job_id), {"last-event-id": after})
            await asyncio.wait_for(reader.task, PATIENCE)
            assert reader.seqs == [seq for seq in (1, 2, 3) if seq > int(after)]

    asyncio.run(run())


@pytest.mark.parametrize("follow", ["true", "false"])
def test_who_has_seen_the_end_is_told_not_to_come_again(sqlite_database: Database, follow: str) -> None:
    """A browser opens a stream that has ended again and again, until it is answered 204."""
    job_id = new_job(sqlite_database)
    claimed = claim(sqlite_database)
    with serving(sqlite_database) as served:
        url = f"{served.events(job_id)}?follow={follow}"
        if follow == "false":
            # nothing is new, but something will be
            assert httpx.get(url, headers={**STREAM, "last-event-id": "2"}).status_code == 200
        finish(sqlite_database, claimed)
        for query, header in (("", "3"), ("&lastEventId=3", None), ("&after=3", None), ("", "9007199254740991")):
            headers = STREAM | ({} if header is None else {"last-event-id": header})
            answer = httpx.get(url + query, headers=headers)
            assert (answer.status_code, answer.content) == (204, b"")
            assert answer.headers["cache-control"] == "no-store"
        # a page of JSON is no stream: it is empty, and says so
        page = httpx.get(url + "&after=3", headers={"last-event-id": "3"})
        assert (page.status_code, page.json()["data"]) == (200, [])


@pytest.mark.parametrize(
    ("query", "header", "first"),
    [
        ("", None, 1),
        ("", "", 1),
        ("", "1", 2),
        ("?lastEventId=", None, 1),
        ("?lastEventId=1", None, 2),
        ("?lastEventId=1", "", 2),
        ("?lastEventId=1", "2", 3),
        ("?lastEventId=2", "1", 2),
        ("?after=1", None, 2),
        ("?after=1", "", 2),
        ("?after=1&lastEventId=", "", 2),
        ("?after=2&lastEventId=1", None, 2),
        ("?after=2&lastEventId=0", "1", 2),
        ("?after=2&lastEventId=0", "0", 1),
    ],
)
def test_where_a_stream_begins(sqlite_database: Database, query: str, header: str | None, first: int) -> None:
    """The browser's header wins over what a page wrote into the address, and empty is as good as absent."""
    job_id = new_job(sqlite_database)
    finish(sqlite_database, claim(sqlite_database))
    with serving(sqlite_database) as served:
        headers = STREAM | ({} if header is None else {"last-event-id": header})
        answer = httpx.get(served.events(job_id) + query, headers=headers)
        assert [message.id for message in parsed(answer.text)] == [str(seq) for seq in range(first, 4)]


def test_who_is_ahead_still_gets_the_end(sqlite_database: Database) -> None:
    async def run() -> None:
        job_id = new_job(sqlite_database)
        with serving(sqlite_database) as served:
            reader = Reader(served.events(job_id), {"last-event-id": "1000"})
            await until(lambda: served.open_streams == 1)
            finish(sqlite_database, await asyncio.to_thread(claim, sqlite_database))
            await asyncio.wait_for(reader.task, PATIENCE)
            assert reader.seqs == []

    asyncio.run(run())


def test_a_deleted_job_ends_its_streams(sqlite_database: Database) -> None:
    """A job may end and be deleted between two looks of the poller."""

    async def run() -> None:
        job_id = new_job(sqlite_database)
        with serving(sqlite_database) as served:
            reader = Reader(served.events(job_id))
            await until(lambda: reader.seqs == [1])
            with sqlite_database.write() as session:
                store.request_cancel(session, job_id)
                session.flush()
                store.delete(session, job_id)
            await asyncio.wait_for(reader.task, PATIENCE)
            await until(lambda: served.open_streams == 0)

    asyncio.run(run())


def test_silence_is_broken_by_comments(sqlite_database: Database) -> None:
    async def run() -> None:
        job_id = new_job(sqlite_database)
        with serving(sqlite_database, ping_seconds=0.1) as served:
            reader = Reader(served.events(job_id))
            await until(lambda: reader.text.count(": ping\n\n") >= 3)
            assert reader.seqs == [1]
            await reader.cut()

    asyncio.run(run())


def test_headers_that_keep_proxies_and_caches_away(sqlite_database: Database) -> None:
    job_id = new_job(sqlite_database)
    with serving(sqlite_database) as served:
        response = httpx.get(served.events(job_id), headers=STREAM, params={"follow": "false"})
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["x-accel-buffering"] == "no"


# --- pages


def test_pages(database: Database) -> None:
    job_id = new_job(database)
    claimed = claim(database)
    for update in (1, 2, 3):
        report(database, claimed, update)
    with serving(database) as served:
        pages, cursor = [], None
        while True:
            page = httpx.get(served.events(job_id), params={"limit": 2, **({"after": cursor} if cursor else {})}).json()
            assert page["object"] == "list"
            pages.append(page["data"])
            assert page["has_more"] == (page["next_cursor"] is not None)
            cursor = page["next_cursor"]
            if cursor is None:
                break
        assert [len(page) for page in pages] == [2, 2, 1]
        replayed = httpx.get(served.events(job_id), headers=STREAM, params={"follow": "false"}).text
        assert [e for page in pages for e in page] == [message.data for message in parsed(replayed)]


def test_what_is_refused(sqlite_database: Database) -> None:
    job_id = new_job(sqlite_database)
    with serving(sqlite_database) as served:
        url = served.events(job_id)
        for bad in ("-1", "1.5", "x", "9007199254740992", "1" * 400, "\u0661", ""):
            answer = httpx.get(url, params={"after": bad})
            assert answer.status_code == 422
            assert answer.json()["errors"][0]["pointer"] == "/after"
        for header in ("-1", "abc", "9007199254740992", " "):
            answer = httpx.get(url, headers=STREAM, params={"lastEventId": header})
            assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/lastEventId")
        for header in ("-1", "abc", "9007199254740992"):
            answer = httpx.get(url, headers={**STREAM, "last-event-id": header})
            assert answer.status_code == 422
            assert answer.headers["content-type"] == "application/problem+json"
        for accept in ("*/*", STREAM["accept"]):
            missing = httpx.get(served.events(new_id("job")), headers={"accept": accept})
            assert missing.status_code == 404
        assert httpx.get(url, headers={"accept": "text/csv"}).status_code == 406


# --- bounds


def test_the_number_of_streams_is_bounded(sqlite_database: Database) -> None:
    async def run() -> None:
        job_id = new_job(sqlite_database)
        with serving(sqlite_database, max_streams=2) as served:
            readers = [Reader(served.events(job_id)) for _ in range(2)]
            await until(lambda: all(reader.seqs == [1] for reader in readers))
            async with httpx.AsyncClient() as client:
                answer = await client.get(served.events(job_id), headers=STREAM)
            assert answer.status_code == 429
            assert answer.json()["code"] == "too_many_requests"
            assert "retry-after" in answer.headers
            await readers[0].cut()
            await until(lambda: served.open_streams == 1)
            third = Reader(served.events(job_id))
            await until(lambda: third.seqs == [1])
            await readers[1].cut()
            await third.cut()

    asyncio.run(run())


@pytest.mark.slow
def test_nobody_follows_nobody_asks(sqlite_database: Database) -> None:
    """No polling without followers; one poll for all followers of all jobs."""

    async def run() -> None:
        jobs = [new_job(sqlite_database) for _ in range(3)]
        statements: list[str] = []

        def count(connection: Any, cursor: Any, statement: str, *more: Any) -> None:
            statements.append(statement)

        with serving(sqlite_database) as served:
            event.listen(Engine, "before_cursor_execute", count)
            try:
                await asyncio.sleep(0.5)
                assert statements == []
                readers = [Reader(served.events(job_id)) for job_id in jobs for _ in range(10)]
                await until(lambda: all(reader.seqs == [1] for reader in readers))
                statements.clear()
                await asyncio.sleep(1.0)
                polls = [s for s in statements if s.startswith("SELECT")]
                assert 5 <= len(polls) <= 15
                for reader in readers:
                    await reader.cut()
                await until(lambda: served.open_streams == 0)
                await asyncio.sleep(0.3)
                statements.clear()
                await asyncio.sleep(0.5)
                assert statements == []
            finally:
                event.remove(Engine, "before_cursor_execute", count)

    asyncio.run(run())


@pytest.mark.slow
def test_a_client_that_takes_nothing_is_cut_off_and_keeps_no_frames(sqlite_database: Database) -> None:
    async def run() -> None:
        job_id = new_job(sqlite_database)
        claimed = claim(sqlite_database)
        with serving(sqlite_database, slow_seconds=0.5) as served, socket.socket() as lazy:
            lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            host, port = served.url.removeprefix("http://").split(":")
            lazy.connect((host, int(port)))
            path = served.events(job_id).removeprefix(served.url)
            lazy.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nAccept: text/event-stream\r\n\r\n".encode())
            await until(lambda: served.open_streams == 1)
            eager = Reader(served.events(job_id))

            def work() -> None:
                for update in range(1, 400):
                    with sqlite_database.write() as session:
                        values = {f"metric_{number}": float(update) for number in range(200)}
                        store.report(
                            session,
                            job_id,
                            claimed.token,
                            Report(Progress(updates=update), (Measured(update, update, values),)),
                        )
                finish(sqlite_database, claimed)

            await asyncio.to_thread(work)
            await until(lambda: served.open_streams == 0)
            await asyncio.wait_for(eager.task, PATIENCE)
            assert eager.seqs == [e["seq"] for e in stored(sqlite_database, job_id)]

    asyncio.run(run())


# --- the end


def test_closing_ends_streams_whose_job_goes_on_and_refuses_new_ones(sqlite_database: Database) -> None:
    async def run() -> None:
        job_id = new_job(sqlite_database)
        with serving(sqlite_database) as served:
            readers = [Reader(served.events(job_id)) for _ in range(5)]
            await until(lambda: all(reader.seqs == [1] for reader in readers))
            served.tail.close()
            await asyncio.wait_for(asyncio.gather(*(reader.task for reader in readers)), PATIENCE)
            async with httpx.AsyncClient() as client:
                answer = await client.get(served.events(job_id), headers=STREAM)
            assert answer.status_code == 503

    asyncio.run(run())


@pytest.mark.slow
def test_a_client_that_takes_nothing_does_not_hold_up_the_end(sqlite_database: Database) -> None:
    async def run() -> None:
        job_id = new_job(sqlite_database)
        claimed = claim(sqlite_database)
        for update in range(1, 300):
            with sqlite_database.write() as session:
                values = {f"metric_{number}": float(update) for number in range(500)}
                measured = (Measured(update, update, values),)
                store.report(session, job_id, claimed.token, Report(Progress(updates=update), measured))
        with serving(sqlite_database) as served, socket.socket() as lazy:
            lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            host, port = served.url.removeprefix("http://").split(":")
            lazy.connect((host, int(port)))
            path = served.events(job_id).removeprefix(served.url)
            lazy.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nAccept: text/event-stream\r\n\r\n".encode())
            await until(lambda: served.open_streams == 1)
            await asyncio.sleep(0.5)
            served.tail.close()
            await until(lambda: served.open_streams == 0)

    asyncio.run(run())


def test_figures_are_what_the_tables_say(database: Database) -> None:
    new_job(database)
    claimed = claim(database)
    report(database, claimed, 1)
    new_job(database)
    with database.read() as session:
        figures = store.figures(session)
    assert isinstance(figures, JobFigures)
    assert (figures.jobs["queued"], figures.jobs["running"], figures.live_leases) == (1, 1, 1)
    assert figures.queue_age_seconds >= 0
    assert figures.updates == 1


@pytest.mark.slow
def test_sigterm_with_open_streams_ends_the_server_before_any_grace_period_is_over(tmp_path: Path) -> None:
    """uvicorn waits for open responses before the lifespan ends, so the signal itself has to end them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "PGENGINE_DATA_DIR": str(tmp_path),
        "PGENGINE_PORT": str(port),
        "PGENGINE_NO_AUTH": "1",
        # so long uvicorn would wait
        "PGENGINE_GRACE_SECONDS": "300",
    }
    python = [sys.executable, "-m", "server"]
    subprocess.run([*python, "migrate"], env=environment, check=True, capture_output=True)
    server = subprocess.Popen([*python, "api"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"

    async def run() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            async with asyncio.timeout(600):
                while True:
                    with contextlib.suppress(httpx.TransportError):
                        if (await client.get("/readyz")).status_code == 200:
                            break
                    await asyncio.sleep(0.1)
            body = {"environment": {"kind": "gymnasium", "id": "CartPole-v1"}}
            job = (await client.post("/v1/training-jobs", json=body)).json()
            readers = [Reader(f"{url}/v1/training-jobs/{job['id']}/events") for _ in range(20)]
            await until(lambda: all(reader.seqs == [1] for reader in readers))
            server.send_signal(signal.SIGTERM)
            await asyncio.wait_for(asyncio.gather(*(reader.task for reader in readers)), PATIENCE)
            assert all(reader.ended for reader in readers)

    try:
        asyncio.run(run())
        server.wait(PATIENCE)
    finally:
        server.kill()
        server.wait()
