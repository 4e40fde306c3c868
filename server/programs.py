"""Worker programs that `serve` starts beside the API: kept alive, and ended with it, however it ends."""

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from server.worker.stop import EXIT_WITH_STDIN

__all__ = ["Programs"]

_log = logging.getLogger(__name__)

SHORTEST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 10.0
HEALTHY_SECONDS = 30.0
"""A program that lived for less is restarted after a pause that doubles each time."""


class Programs:
    """A number of `python -m server …` programs that are restarted when they die.

    Each has a pipe of ours as its standard input and stops when that closes, so also after a SIGKILL of this process.
    Each is a process group of its own: Ctrl-C reaches this process alone, which ends them in order.

    Args:
        command: Sub-command of `python -m server`.
        count: How many to keep alive.
        environment: Variables of each; nothing is inherited beside them.
        grace_seconds: How long `stop()` waits before it kills.
    """

    def __init__(self, command: str, count: int, environment: Mapping[str, str], grace_seconds: float) -> None:
        self._command = [sys.executable, "-m", "server", command]
        self._environment = {**environment, EXIT_WITH_STDIN: "1"}
        self._grace_seconds = grace_seconds
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._threads = [
            threading.Thread(target=self._keep_alive, name=f"{command} {number}", daemon=True)
            for number in range(1, count + 1)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End all programs, in order if they let us; returns when none is left."""
        with self._lock:  # from here on none is started
            self._stopping.set()
            running = list(self._running)
        for program in running:
            program.terminate()
        give_up_at = time.monotonic() + self._grace_seconds
        for thread in self._threads:
            thread.join(max(0.0, give_up_at - time.monotonic()))
        for program in running:
            program.kill()
        for thread in self._threads:
            thread.join()

    def _keep_alive(self) -> None:
        pause = SHORTEST_PAUSE_SECONDS
        while True:
            started = time.monotonic()
            status = self._run_once()
            if self._stopping.is_set():
                return
            if time.monotonic() - started > HEALTHY_SECONDS:
                pause = SHORTEST_PAUSE_SECONDS
            name = threading.current_thread().name
            _log.warning("%s ended with status %s; it is started again in %.1f s", name, status, pause)
            self._stopping.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _run_once(self) -> int | None:
        with self._lock:
            if self._stopping.is_set():
                return None
            program = subprocess.Popen(self._command, stdin=subprocess.PIPE, env=self._environment, process_group=0)
            self._running.add(program)
        with program:
            status = program.wait()
        with self._lock:
            self._running.discard(program)
        return status
