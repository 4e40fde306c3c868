"""The trainer's process, as its supervisor sees it: started, spoken to, ended."""

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from server.logs import log
from server.settings import Settings, program_environment
from server.worker.link import Link, Message
from server.worker.stop import Stop

__all__ = ["Ended", "TrainerProcess"]

FRAME_SECONDS = 30
"""A trainer that stops in the middle of a frame for so long is given up; waiting for a frame has no such limit."""


LOOK_SECONDS = 0.01
"""How often it is looked whether a process that is to end has ended."""

FULL = 0.75
"""Share of the memory limit from which on a process that was killed is taken to have wanted too much."""

_OF_MEMORY = {signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS}
"""How a process dies that gets no more memory: by the kernel, by a library that gives up, by one that does not look."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a trainer ended.

    Attributes:
        status: Its exit status; below zero the number of the signal that ended it.
        peak_bytes: The most memory that it had at once.
        limit: The most that it may have.
    """

    status: int
    peak_bytes: int
    limit: int

    @property
    def out_of_memory(self) -> bool:
        """Whether it died since it wanted more memory than there is, so that trying again would not help."""
        return -self.status in _OF_MEMORY and self.peak_bytes >= FULL * self.limit

    def __str__(self) -> str:
        return f"by signal {-self.status}" if self.status < 0 else f"with status {self.status}"


class TrainerProcess:
    """A running trainer and the link to it."""

    def __init__(self, settings: Settings) -> None:
        self._grace_seconds = settings.grace_seconds
        self._limit = settings.trainer_memory_bytes
        ours, theirs = socket.socketpair()
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", FRAME_SECONDS, 0))
        modules = [part for name in settings.environment_modules for part in ("--module", name)]
        arguments = [
            "--link",
            str(theirs.fileno()),
            "--threads",
            str(settings.threads),
            "--memory",
            str(settings.trainer_memory_bytes),
            "--log-level",
            settings.log_level,
            *modules,
        ]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "server.worker.trainer", *arguments],
            stdin=subprocess.DEVNULL,
            # what an environment prints belongs into the log
            stdout=2,
            env=program_environment(settings.threads),
            pass_fds=[theirs.fileno()],
            # Ctrl-C in a terminal is for the supervisor, which ends the trainer in order
            process_group=0,
        )
        theirs.close()
        connection: Connection[Any, Any] = Connection(ours.detach())
        self._link = Link(connection)
        self._ended: Ended | None = None
        log("trainer_started", trainer=self._process.pid)

    def send(self, message: Message) -> None:
        """Send one message; raises `LinkClosed` if the trainer is gone."""
        self._link.send(message)

    def receive(self, timeout: float | None, stop: Stop) -> Message | None:
        """The next message; None after so many seconds, or as soon as a stop is wished.

        Raises:
            LinkClosed: if the trainer is gone.
        """
        link = self._link.fileno()
        # a stop that is already known must not cut short what is waited for now
        ready = wait([link] if stop else [link, stop.fileno()], timeout)
        return self._link.receive() if link in ready else None

    def stop(self) -> Ended:
        """End the process: SIGTERM, and SIGKILL if it still lives after the grace period. May be called again."""
        # the number of a process that was buried may be another one's by now
        if self._ended is None:
            self._send_signal(signal.SIGTERM)
        return self.bury()

    def bury(self) -> Ended:
        """Wait for the end of a process whose link has closed, and say how it ended. May be called again."""
        if self._ended is not None:
            return self._ended
        self._link.close()
        kill_at = time.monotonic() + self._grace_seconds
        # it is looked at and left, so that its end can be taken together with what it has used
        while os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            if time.monotonic() >= kill_at:
                self._send_signal(signal.SIGKILL)
            time.sleep(LOOK_SECONDS)
        _, status, used = os.wait4(self._process.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        # in kilobytes, but on macOS
        peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        self._ended = Ended(self._process.returncode, peak, self._limit)
        log("trainer_ended", trainer=self._process.pid, ended=str(self._ended), peak_bytes=peak)
        return self._ended

    def _send_signal(self, number: int) -> None:
        # not Popen's own, which would take the end of a process that has ended, and lose what it has used
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)
