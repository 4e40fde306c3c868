"""The wish that a worker stops: a signal, or the end of the program that started it."""

import os
import signal
import socket
import threading
from types import FrameType
from typing import Any, Self

__all__ = ["EXIT_WITH_STDIN", "Stop"]

EXIT_WITH_STDIN = "PGENGINE_EXIT_WITH_STDIN"
"""Environment variable that `serve` sets to 1 for the workers it starts. Their standard input is then a pipe that
`serve` holds open: its end is the end of `serve`, however that came about, and the worker stops in order."""


class Stop:
    """Becomes true with SIGTERM, SIGINT or the end of the parent, and wakes whoever waits on it as on a connection."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._on_signal)
        if os.environ.get(EXIT_WITH_STDIN) == "1":
            threading.Thread(target=self._watch_stdin, name="parent", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self.event.set()
        self._reader.close()
        self._writer.close()

    def __bool__(self) -> bool:
        return self.event.is_set()

    def fileno(self) -> int:
        """What `multiprocessing.connection.wait` waits on."""
        return self._reader.fileno()

    def request(self) -> None:
        """Wish it."""
        if not self.event.is_set():
            self.event.set()
            # what was sent is never read: from now on it is ready at once
            self._writer.send(b"!")

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.request()

    def _watch_stdin(self) -> None:
        while os.read(0, 1024):
            pass
        self.request()
