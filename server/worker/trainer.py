"""The program that computes: `python -m server.worker.trainer`, spawned by a supervisor and kept warm across jobs.

It never opens the database and holds no secret. It knows its supervisor by an inherited descriptor alone and ends with
it: a thread of its own reads the link, so that it notices even while an update is being computed.
"""

import argparse
import importlib
import os
import queue
import threading
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from server.logs import LEVELS, configure, log
from server.memory import bound_this_process
from server.worker.link import Link, LinkClosed, Message, Ready, Start
from server.worker.runner import run

__all__ = ["ORPHANED", "main"]

ORPHANED = 3
"""Exit status of a trainer whose supervisor is gone."""


class _Inbox:
    """A link whose messages a thread reads; when it closes, the process ends, whatever it is doing."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="link", daemon=True).start()

    def send(self, message: Message) -> None:
        self._link.send(message)

    def receive(self, timeout: float | None) -> Message | None:
        try:
            return self._messages.get(timeout=timeout) if timeout != 0 else self._messages.get_nowait()
        except queue.Empty:
            return None

    def _read(self) -> None:
        try:
            while (message := self._link.receive()) is not None:
                self._messages.put(message)
        except LinkClosed:
            pass
        # not sys.exit: the main thread may be deep in an update or in an environment's own code
        os._exit(ORPHANED)


def main() -> NoReturn:
    """Serve jobs until the link closes."""
    parser = argparse.ArgumentParser(prog="server.worker.trainer", description=__doc__)
    parser.add_argument("--link", type=int, required=True, help="inherited descriptor of the supervisor's link")
    parser.add_argument("--threads", type=int, required=True, help="threads of torch")
    parser.add_argument("--memory", type=int, required=True, help="bytes of memory that it may take")
    parser.add_argument("--log-level", choices=LEVELS, default="info", help="what is logged")
    parser.add_argument("--module", action="append", default=[], help="module that registers environments")
    arguments = parser.parse_args()
    configure(arguments.log_level)
    bound_this_process(arguments.memory)
    connection: Connection[Any, Any] = Connection(arguments.link)
    inbox = _Inbox(Link(connection))
    _warm(arguments.threads, arguments.module)
    try:
        inbox.send(Ready())
        while True:
            job = inbox.receive(None)
            if not isinstance(job, Start):
                raise LinkClosed("a job was expected")
            run(job, inbox)
    except LinkClosed as error:
        log("link_closed", reason=str(error))
    os._exit(ORPHANED)


def _warm(threads: int, modules: list[str]) -> None:
    """Import all that a job needs, and take one update: the first one makes torch import and build much more."""
    import torch

    import pgengine
    from pgengine.spec import AlgorithmSpec, EvaluationSpec, StopSpec, TabularSpec, TrainingSpec

    torch.set_num_threads(threads)
    for module in modules:
        _import(module)
    bandit = TabularSpec(transitions=[[[1.0], [1.0]]], rewards=[[0.0, 1.0]], initial=[1.0], horizon=1)
    spec = TrainingSpec(
        environment=bandit,
        algorithm=AlgorithmSpec(trajectories=2),
        stop=StopSpec(updates=1),
        evaluation=EvaluationSpec(episodes=2),
    )
    for update in pgengine.train(spec):
        update.state()


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    # it is the operator's code, and may fail in any way
    except Exception as error:  # noqa: BLE001
        log("module_not_imported", "error", module=module, error=f"{type(error).__name__}: {error}")
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
