"""The link: every message arrives as it was sent, and whatever is no message closes it."""

import json
import math
import pickle
import struct
import threading
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import pytest

from server.jobs.reports import Failure, Measured, Outcome, Progress, Report, Snapshot
from server.worker import link as link_module
from server.worker.link import Answer, Finished, Link, LinkClosed, Message, Ready, Released, Reported, Start

PROGRESS = Progress(3, 30, 6, 0.5)
SNAPSHOT = Snapshot(3, PROGRESS, b"policy", b"state", {"mean_return": 1.5, "confidence_interval": [1.0, 2.0]})
REPORT = Report(PROGRESS, (Measured(2, 20, {"a": 1.0}), Measured(3, 30, {"a": -0.0})), SNAPSHOT, {"threads": 2})


@pytest.fixture
def ends() -> Iterator[tuple[Link, Connection]]:
    ours, theirs = Pipe()
    yield Link(ours), theirs
    ours.close()
    theirs.close()


@pytest.mark.parametrize(
    "message",
    [
        Ready(),
        Start("job_1", 4, {"seed": 1, "arrays": [[1.5, None]]}, b"\x00\xff" * 9, None, 5.0),
        Start("job_1", 4, {}, b"", b"state", 0.1),
        Reported(REPORT),
        Reported(Report()),
        Answer("cancel"),
        Finished(Outcome("succeeded", REPORT, {"evaluation": {"mean_return": 1.0}})),
        Finished(Outcome("failed", failure=Failure("diverged", "é\u2028\x00"))),
        Released(Report(PROGRESS)),
    ],
    ids=lambda message: message.kind,
)
def test_a_message_arrives_as_it_was_sent(ends: tuple[Link, Any], message: Message) -> None:
    link, theirs = ends
    Link(theirs).send(message)
    assert link.receive() == message
    assert link.receive(0) is None


def test_numbers_that_are_not_finite_arrive(ends: tuple[Link, Any]) -> None:
    link, theirs = ends
    Link(theirs).send(Reported(Report(metrics=(Measured(1, 1, {"a": math.nan, "b": -math.inf}),))))
    received = link.receive()
    assert isinstance(received, Reported)
    values = received.report.metrics[0].values
    assert math.isnan(values["a"])
    assert values["b"] == -math.inf


def test_a_large_blob_arrives_while_both_sides_work(ends: tuple[Link, Any]) -> None:
    link, theirs = ends
    start = Start("job_1", 0, {}, bytes(range(256)) * 2**16, b"s" * 2**20, 5.0)
    sender = threading.Thread(target=Link(theirs).send, args=[start])
    sender.start()
    assert link.receive(30) == start
    sender.join()


def test_the_other_side_s_end_is_noticed(ends: tuple[Link, Any]) -> None:
    link, theirs = ends
    Link(theirs).send(Ready())
    theirs.close()
    # what was sent before is not lost
    assert link.receive() == Ready()
    with pytest.raises(LinkClosed):
        link.receive()
    with pytest.raises(LinkClosed):
        for _ in range(2):
            link.send(Answer("continue"))


def frame(header: bytes, blobs: list[bytes], *, length: int | None = None, count: int | None = None) -> bytes:
    parts = [struct.pack("!I", len(header) if length is None else length), header]
    parts += [struct.pack("!I", len(blobs) if count is None else count)]
    return b"".join(parts + [struct.pack("!I", len(blob)) for blob in blobs] + blobs)


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\x00",
        pickle.dumps(Ready()),
        frame(b"{}", []),
        frame(b"not json", []),
        frame(b'{"kind":"ready"}', [], length=2**31),
        frame(b'{"kind":"ready"}', [], count=2**32 - 1),
        frame(b'{"kind":"ready"}', [b"x"]) + b"more",
        frame(b'{"kind":"unknown"}', []),
        frame(b'{"kind":"answer","command":"explode"}', []),
        frame(json.dumps({"kind": "answer", "command": {"$blob": 3}}).encode(), [b"x"]),
        frame(json.dumps({"kind": "answer", "command": {"$blob": "x"}}).encode(), [b"x"]),
        frame(b'{"kind":"start","job_id":"job_1"}', []),
        frame(b"[" * 100_000, []),
    ],
)
def test_what_is_no_message_closes_the_link(ends: tuple[Link, Any], garbage: bytes) -> None:
    link, theirs = ends
    sender = threading.Thread(target=theirs.send_bytes, args=[garbage])
    sender.start()
    with pytest.raises(LinkClosed):
        link.receive(10)
    sender.join()


def test_a_frame_that_says_it_is_too_large_is_not_read(ends: tuple[Link, Any]) -> None:
    link, theirs = ends
    # the prefix that a connection writes before a frame of 2**40 bytes
    with open(theirs.fileno(), "wb", closefd=False) as raw:
        raw.write(struct.pack("!i", -1) + struct.pack("!Q", 2**40))
    with pytest.raises(LinkClosed):
        link.receive(10)
    assert link_module.LARGEST_FRAME < 2**40
