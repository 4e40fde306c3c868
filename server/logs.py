"""The log of every program of the server: one structure, on standard error.

A line is a JSON object where standard error is no terminal, and text for people where it is. It has `at`, `level`,
`event`, `pid`, and what belongs to the event; what other libraries log is the event `logged`. Secrets are cut out.

    log("job_started", job_id=…)            something happened
    audit("key_revoked", key_id=…)          somebody changed who may do what, or destroyed something
    AccessLog().write(…)                    a request was answered; written by a thread of its own
"""

import contextlib
import json
import logging
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple, get_args

import msgspec

__all__ = ["LEVELS", "AccessLog", "Answered", "Level", "audit", "configure", "log"]

Level = Literal["debug", "info", "warning", "error"]
LEVELS: tuple[Level, ...] = get_args(Level)

PAUSE_SECONDS = 0.1
"""How long the access log gathers lines before it writes them together."""

MOST_PENDING = 20_000
"""Lines of the access log that wait to be written; where standard error takes no more, others are only counted."""

LONGEST_PATH = 1024

_log = logging.getLogger("server.events")
_access_log = logging.getLogger("server.access")

_KEY = re.compile(r"pgk_[A-Za-z0-9_\-]+")
_PASSWORD = re.compile(r"(://[^:/\s]*):\S+@")


def configure(level: Level) -> None:
    """Write what is logged from this level on; what other libraries log from warnings on, or all of it with debug."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines(_text if sys.stderr.isatty() else _json))
    number = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(level=logging.DEBUG if level == "debug" else max(number, logging.WARNING), handlers=[handler])
    logging.getLogger("server").setLevel(number)
    logging.captureWarnings(True)


def log(event: str, level: Level = "info", **fields: object) -> None:
    """Write one line.

    Args:
        event: What happened, in snake case.
        level: How much it matters.
        fields: To whom and why; anything that JSON does not know is written as text.
    """
    _log.log(logging.getLevelNamesMapping()[level.upper()], event, extra={"fields": fields})


def audit(action: str, **fields: object) -> None:
    """Write down that somebody changed who may do what, or destroyed something.

    Args:
        action: What was done, in snake case.
        fields: To what, and by whom.
    """
    log("audit", "warning", action=action, **fields)


class _Lines(logging.Formatter):
    def __init__(self, written: Callable[[Mapping[str, Any]], str]) -> None:
        super().__init__()
        self._written = written

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "at": _at(record.created),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            "pid": os.getpid(),
        }
        fields: Mapping[str, Any] | None = getattr(record, "fields", None)
        if fields is None:
            line |= {"event": "logged", "logger": record.name, "message": record.getMessage()}
        else:
            line |= fields
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return _without_secrets(self._written(line))


def _at(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def _json(line: Mapping[str, Any]) -> str:
    return json.dumps(line, default=str, separators=(",", ":"))


def _text(line: Mapping[str, Any]) -> str:
    head = f"{line['at'][:19].replace('T', ' ')}Z {line['level']:7} {line['event']}"
    fields = {name: value for name, value in line.items() if name not in ("at", "level", "event", "pid", "traceback")}
    # what a client has sent must neither begin a new line nor move the cursor of a terminal
    pairs = "".join(f" {name}={json.dumps(value, default=str)}" for name, value in fields.items())
    return f"{head}{pairs}" + (f"\n{line['traceback']}" if "traceback" in line else "")


def _without_secrets(text: str) -> str:
    if "pgk_" in text:
        text = _KEY.sub("pgk_…", text)
    return _PASSWORD.sub(r"\1:…@", text) if "://" in text else text


class Answered(NamedTuple):
    """One answered request: when it ended (seconds since 1970), who asked what from where, and what came of it.

    `status` is None where the client went away before it was answered.
    """

    ended_at: float
    request_id: str
    key_id: str | None
    address: str | None
    method: str
    path: str
    route: str
    status: int | None
    seconds: float


class AccessLog:
    """A line for each answered request, off the way of the answer: noting one costs a microsecond and waits for nobody.

    A thread gathers lines and writes them; it begins with the first one.
    """

    def __init__(self) -> None:
        self.is_on = _access_log.isEnabledFor(logging.INFO)
        self._pending: deque[Answered] = deque()
        self._dropped = 0
        self._wanted = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None

    def write(self, answered: Answered) -> None:
        """Have a line written, soon. Called by one thread only, that of the event loop."""
        if len(self._pending) >= MOST_PENDING:
            self._dropped += 1
            return
        self._pending.append(answered)
        if not self._wanted.is_set():
            self._wanted.set()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="access log", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Write what is still to be written; waits for a second at most."""
        self._closed = True
        self._wanted.set()
        if self._thread is not None:
            self._thread.join(1.0)

    def _run(self) -> None:
        while not self._closed:
            self._wanted.wait()
            time.sleep(PAUSE_SECONDS)
            self._wanted.clear()
            self._drain()
        self._drain()

    def _drain(self) -> None:
        # a disk that is full for a while costs the lines of that while, and not the log
        with contextlib.suppress(OSError):
            self._write_pending()

    def _write_pending(self) -> None:
        pending, self._pending = self._pending, deque()
        dropped, self._dropped = self._dropped, 0
        written = _text if sys.stderr.isatty() else _quickly
        lines = [written(line) for line in _access_lines(pending)]
        if dropped:
            log("requests_not_logged", "warning", count=dropped)
        if lines:
            sys.stderr.write(_without_secrets("\n".join(lines)) + "\n")
            sys.stderr.flush()


def _access_lines(pending: Iterable[Answered]) -> Iterator[dict[str, Any]]:
    # thousands a second: what is the same for all of them, and for all of one second, is made once
    process_id, second, stamp = os.getpid(), -1, ""
    for answered in pending:
        if (now := int(answered.ended_at)) != second:
            second, stamp = now, datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        milliseconds = int((answered.ended_at - second) * 1000)
        yield {
            "at": f"{stamp}.{milliseconds:03d}+00:00",
            "level": "info",
            "event": "request",
            "pid": process_id,
            "request_id": answered.request_id,
            "key_id": answered.key_id,
            "address": answered.address,
            "method": answered.method,
            "path": answered.path[:LONGEST_PATH],
            "route": answered.route,
            "status": answered.status,
            "seconds": round(answered.seconds, 6),
        }


_encode = msgspec.json.Encoder().encode


def _quickly(line: Mapping[str, Any]) -> str:
    return _encode(line).decode()
