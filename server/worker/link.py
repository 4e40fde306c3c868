"""The link between a supervisor and its trainer: typed messages over one duplex connection.

A frame is a JSON header and the binary blobs that it names; nothing is unpickled. Frames are bounded.

    supervisor                                        trainer
                      <- Ready                        torch is imported
    Start ->                                          one job
                      <- Reported                     again and again; one at a time
    Answer ->                                         continue | cancel | release
                      <- Finished | Released          and ready for the next Start

The trainer ends itself when the link closes.
"""

import dataclasses
import json
import struct
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Annotated, Any, Literal, Protocol

from pydantic import Discriminator, TypeAdapter

from server.jobs.reports import JobKind, Outcome, Report, Rival

__all__ = [
    "LARGEST_FRAME",
    "Answer",
    "Channel",
    "Command",
    "Finished",
    "Link",
    "LinkClosed",
    "Message",
    "Ready",
    "Released",
    "Reported",
    "Start",
]

LARGEST_FRAME = 2**30
"""Bytes of the largest message; a policy of 8 layers of 1,024 units and its state take a tenth of it."""

Command = Literal["continue", "cancel", "release"]


@dataclass(frozen=True, slots=True)
class Ready:
    """The trainer is warm and waits for a job."""

    kind: Literal["ready"] = "ready"


@dataclass(frozen=True, slots=True)
class Start:
    """A job to compute. `state_bytes` resumes it after so many `updates`; without them it begins with the policy.

    `behaviour_bytes` is the policy that acts in training, if that is another one; `rival` is the policy's best
    checkpoint so far. A gradient check whose spec describes its policy comes without `policy_bytes`.
    """

    job_id: str
    updates: int
    spec: dict[str, Any] = field(repr=False)
    policy_bytes: bytes | None = field(repr=False)
    state_bytes: bytes | None = field(repr=False)
    checkpoint_seconds: float
    behaviour_bytes: bytes | None = field(default=None, repr=False)
    job_kind: JobKind = "training"
    rival: Rival | None = None
    kind: Literal["start"] = "start"


@dataclass(frozen=True, slots=True)
class Reported:
    """What happened; the trainer goes on while the answer is on its way, and reads it before the next report."""

    report: Report
    kind: Literal["reported"] = "reported"


@dataclass(frozen=True, slots=True)
class Answer:
    """What to do: go on, end the job as cancelled, or give it back with a last checkpoint."""

    command: Command
    kind: Literal["answer"] = "answer"


@dataclass(frozen=True, slots=True)
class Finished:
    """The job has ended."""

    outcome: Outcome
    kind: Literal["finished"] = "finished"


@dataclass(frozen=True, slots=True)
class Released:
    """The job was given back; the report has the checkpoint from which another worker goes on."""

    report: Report
    kind: Literal["released"] = "released"


Message = Ready | Start | Reported | Answer | Finished | Released

_MESSAGES: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Discriminator("kind")])
_LENGTH = struct.Struct("!I")
_BLOB = "$blob"


class LinkClosed(Exception):
    """The other side is gone, or has sent something that is not a message."""


class Channel(Protocol):
    """What a running job needs of its link, whatever carries it."""

    def send(self, message: Message) -> None:
        """Send one message; raises `LinkClosed`."""

    def receive(self, timeout: float | None) -> Message | None:
        """The next message, or None if there is none within so many seconds (None: wait); raises `LinkClosed`."""


class Link:
    """One end of a link. One thread may send while another receives."""

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        self._connection = connection

    def fileno(self) -> int:
        """What `multiprocessing.connection.wait` waits on."""
        return self._connection.fileno()

    def send(self, message: Message) -> None:
        """Send one message.

        Raises:
            LinkClosed: if nobody can receive it.
            ValueError: if it is larger than `LARGEST_FRAME`.
        """
        frame = _pack(message)
        if len(frame) > LARGEST_FRAME:
            raise ValueError(f"a message of {len(frame)} bytes is larger than {LARGEST_FRAME}")
        try:
            self._connection.send_bytes(frame)
        except OSError as error:
            raise LinkClosed(str(error)) from error

    def receive(self, timeout: float | None = None) -> Message | None:
        """The next message.

        Args:
            timeout: Seconds to wait; None waits for ever.

        Returns:
            The message, or None if there was none in time.

        Raises:
            LinkClosed: if the other side is gone or has sent something that is not a message.
        """
        try:
            if timeout is not None and not self._connection.poll(timeout):
                return None
            return _unpack(self._connection.recv_bytes(LARGEST_FRAME))
        except (EOFError, OSError, ValueError, TypeError, LookupError, RecursionError) as error:
            raise LinkClosed(str(error)) from error

    def close(self) -> None:
        """Close this end; the other one learns of it."""
        self._connection.close()


def _pack(message: Message) -> bytes:
    blobs: list[bytes] = []
    # NaN and infinities are metrics too: this header is read by ourselves alone
    header = json.dumps(_without_blobs(dataclasses.asdict(message), blobs), separators=(",", ":")).encode()
    parts = [_LENGTH.pack(len(header)), header, _LENGTH.pack(len(blobs))]
    parts += [_LENGTH.pack(len(blob)) for blob in blobs]
    return b"".join(parts + blobs)


def _without_blobs(value: Any, blobs: list[bytes]) -> Any:
    if isinstance(value, bytes):
        blobs.append(value)
        return {_BLOB: len(blobs) - 1}
    if isinstance(value, dict):
        return {key: _without_blobs(each, blobs) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_blobs(each, blobs) for each in value]
    return value


def _unpack(frame: bytes) -> Message:
    try:
        (header_length,) = _LENGTH.unpack_from(frame)
        (count,) = _LENGTH.unpack_from(frame, offset := 4 + header_length)
        lengths = struct.unpack_from(f"!{count}I", frame, offset + 4)
    except struct.error as error:
        raise ValueError("the frame is shorter than it says") from error
    offset += 4 + 4 * count
    if offset + sum(lengths) != len(frame):
        raise ValueError("the frame is not as long as it says")
    blobs = []
    for length in lengths:
        blobs.append(frame[offset : offset + length])
        offset += length
    return _MESSAGES.validate_python(_with_blobs(json.loads(frame[4 : 4 + header_length]), blobs))


def _with_blobs(value: Any, blobs: list[bytes]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_BLOB}:
            return blobs[value[_BLOB]]
        return {key: _with_blobs(each, blobs) for key, each in value.items()}
    if isinstance(value, list):
        return [_with_blobs(each, blobs) for each in value]
    return value
