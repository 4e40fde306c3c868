"""The trainer's process, as its supervisor sees it: started, spoken to, ended."""

import socket
import struct
import subprocess
import sys
from multiprocessing.connection import Connection, wait
from typing import Any

from server.logs import log
from server.settings import Settings, program_environment
from server.worker.link import Link, Message
from server.worker.stop import Stop

__all__ = ["TrainerProcess"]

FRAME_SECONDS = 30
"""A trainer that stops in the middle of a frame for so long is given up; waiting for a frame has no such limit."""


class TrainerProcess:
    """A running trainer and the link to it."""

    def __init__(self, settings: Settings) -> None:
        self._grace_seconds = settings.grace_seconds
        ours, theirs = socket.socketpair()
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", FRAME_SECONDS, 0))
        modules = [part for name in settings.environment_modules for part in ("--module", name)]
        arguments = [
            "--link",
            str(theirs.fileno()),
            "--threads",
            str(settings.threads),
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

    def stop(self) -> str:
        """End the process: SIGTERM, and SIGKILL if it still lives after the grace period.

        Returns:
            How it ended, for people.
        """
        self._process.terminate()
        return self.bury()

    def bury(self) -> str:
        """Wait for the end of a process whose link has closed, and say how it ended."""
        self._link.close()
        try:
            status = self._process.wait(self._grace_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        ended = f"by signal {-status}" if status < 0 else f"with status {status}"
        log("trainer_ended", trainer=self._process.pid, ended=ended)
        return ended
