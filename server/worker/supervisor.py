"""The supervisor: claims jobs, hands them to its trainer, and writes down what comes back. It alone sees the database.

Four things run beside each other, so that none can hold up another:

    main thread     waits on the link, writes reports, watches for stalls, cancellations and the wish to stop
    lease thread    renews the lease of the job at hand
    reaper thread   takes expired leases from workers that are not heard of
    trainer         a process of its own; whatever a training step or an environment does, it does there

Liveness is that the lease is renewed; progress is that the trainer speaks. A trainer that lives without progress is
ended, and a supervisor that does not renew loses its job to the next one.
"""

import os
import secrets
import socket
import threading
import time
import traceback
from collections.abc import Callable
from typing import Literal, TypeVar

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from server.database import Database
from server.errors import Unavailable
from server.jobs import store
from server.jobs.reports import Claim, Failure, Outcome, Report
from server.logs import configure, log
from server.memory import out_of_memory
from server.settings import Settings
from server.worker.lease import Lease
from server.worker.link import Answer, Finished, LinkClosed, Ready, Released, Reported, Start
from server.worker.process import Ended, TrainerProcess
from server.worker.reaper import reap_until
from server.worker.stop import Stop

__all__ = ["run_supervisor"]

WATCH_SECONDS = 0.5
"""How often a silent trainer is looked after."""

RETRY_SECONDS = 1.0
"""Pause before something is tried again that the database or the trainer has refused."""

T = TypeVar("T")


def run_supervisor(database: Database, settings: Settings) -> None:
    """Work until SIGTERM, SIGINT, or the end of the parent (`stop.EXIT_WITH_STDIN`); then give the job back.

    Args:
        database: Where the jobs are.
        settings: Times, threads, and the modules of the operator's environments.
    """
    configure(settings.log_level)
    with Stop() as stop, Lease(database, settings) as lease:
        reaper = threading.Thread(target=reap_until, args=(stop.event, database), name="reaper", daemon=True)
        reaper.start()
        _Supervisor(database, settings, stop, lease).run()
    # it may be waiting for the database, which the end does not wait for
    reaper.join(settings.grace_seconds)
    log("worker_stopped")


class _Deadlines:
    """What a trainer still has time for."""

    def __init__(self, settings: Settings) -> None:
        self._stall_seconds = settings.stall_seconds
        self._grace_seconds = settings.grace_seconds
        self._spoke_at = time.monotonic()
        self._cancel_at: float | None = None
        self._release_at: float | None = None

    def spoke(self) -> None:
        self._spoke_at = time.monotonic()

    def cancel(self) -> None:
        self._cancel_at = self._cancel_at or time.monotonic() + self._grace_seconds

    def release(self) -> None:
        self._release_at = self._release_at or time.monotonic() + self._grace_seconds

    def passed(self) -> Literal["cancelled", "released", "stalled"] | None:
        now = time.monotonic()
        if self._cancel_at is not None and now > self._cancel_at:
            return "cancelled"
        if self._release_at is not None and now > self._release_at:
            return "released"
        return "stalled" if now > self._spoke_at + self._stall_seconds else None


class _Supervisor:
    """The main thread."""

    def __init__(self, database: Database, settings: Settings, stop: Stop, lease: Lease) -> None:
        self._database = database
        self._settings = settings
        self._stop = stop
        self._lease = lease
        # no two have the same name: in containers host and process id may well be alike
        self._name = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._claim_answered = True
        self._number = 0
        self._trainer = TrainerProcess(settings)
        self._warm = False

    def run(self) -> None:
        """Claim and serve jobs until a stop is wished."""
        log("worker_started", worker=self._name)
        try:
            while not self._stop:
                self._step()
        finally:
            self._trainer.stop()

    def _step(self) -> None:
        if not self._warm:
            self._await_trainer()
        elif (claim := self._claim()) is not None:
            self._serve(claim)
        else:
            self._idle()

    # --- between jobs ---

    def _await_trainer(self) -> None:
        """Wait until the trainer is warm; until then another worker may take what is queued."""
        try:
            self._warm = isinstance(self._trainer.receive(None, self._stop), Ready)
        except LinkClosed:
            self._stop.event.wait(RETRY_SECONDS)
            self._replace_trainer()

    def _claim(self) -> Claim | None:
        lease_seconds = self._settings.lease_seconds
        try:
            if not self._claim_answered:
                with self._database.write() as session:
                    found = store.claimed_before(session, self._name, lease_seconds)
                self._claim_answered = True
                if found is not None:
                    return found
            # reading first: an idle worker takes no lock
            with self._database.read() as session:
                if not store.any_queued(session):
                    return None
            self._claim_answered = False
            with self._database.write() as session:
                found = store.claim(session, self._name, lease_seconds)
            self._claim_answered = True
            return found
        except Unavailable:
            pass
        except SQLAlchemyError as error:
            log("claim_failed", "warning", error=str(error))
        self._stop.event.wait(RETRY_SECONDS)
        return None

    def _idle(self) -> None:
        try:
            self._trainer.receive(self._settings.poll_seconds, self._stop)
        except LinkClosed:
            self._replace_trainer()

    def _replace_trainer(self) -> Ended:
        """End the trainer and warm up the next one, if there is to be a next one; says how it ended."""
        ended = self._trainer.stop()
        if not self._stop:
            self._trainer, self._warm = TrainerProcess(self._settings), False
        return ended

    # --- one job ---

    def _serve(self, claim: Claim) -> None:
        self._number = 0
        log("job_started", job_id=claim.job_id, kind=claim.kind, attempt=claim.attempt, token=claim.token)
        with self._lease.holding(claim):
            try:
                self._follow(claim)
            except store.LeaseLost as error:
                # somebody else has the job: what this trainer computes is worth nothing any more
                log("lease_lost", "warning", job_id=claim.job_id, token=claim.token, reason=str(error))
                self._replace_trainer()

    def _follow(self, claim: Claim) -> None:
        """Go along with the job to its end, its release or its loss."""
        deadlines = _Deadlines(self._settings)
        try:
            self._trainer.send(self._start(claim))
            while not self._advance(claim, deadlines):
                if self._lease.is_over():
                    raise store.LeaseLost("the lease was not renewed in time")
                if (passed := deadlines.passed()) is not None:
                    return self._enforce(claim, passed)
        except LinkClosed:
            self._mourn(claim, self._replace_trainer())
        except store.LeaseLost:
            raise
        except Exception as error:  # noqa: BLE001  a mistake of ours costs an attempt, not the worker
            log("worker_failed", "error", job_id=claim.job_id, traceback="".join(traceback.format_exception(error)))
            self._replace_trainer()
            self._lose(claim, "the worker made a mistake")

    def _start(self, claim: Claim) -> Start:
        return Start(
            job_id=claim.job_id,
            updates=claim.updates,
            spec=claim.spec,
            policy_bytes=claim.policy_bytes,
            state_bytes=claim.state_bytes,
            checkpoint_seconds=self._settings.checkpoint_seconds,
            behaviour_bytes=claim.behaviour_bytes,
            job_kind=claim.kind,
            rival=claim.rival,
        )

    def _advance(self, claim: Claim, deadlines: _Deadlines) -> bool:
        """Take the trainer's next message, if there is one in time; says whether it was the job's last."""
        message = self._trainer.receive(WATCH_SECONDS, self._stop)
        if isinstance(message, Finished):
            self._finish(claim, message.outcome)
            return True
        if isinstance(message, Released):
            self._release(claim, message.report)
            return True
        if self._stop:
            deadlines.release()
        if isinstance(message, Reported):
            deadlines.spoke()
            self._answer(claim, message.report, deadlines)
        elif self._is_cancelling(claim):
            deadlines.cancel()
        return False

    def _answer(self, claim: Claim, report: Report, deadlines: _Deadlines) -> None:
        command = self._write(lambda session, number: store.report(session, *self._of(claim), report, number))
        if command == "cancel":
            deadlines.cancel()
            self._trainer.send(Answer("cancel"))
        else:
            self._trainer.send(Answer("release" if self._stop else "continue"))

    def _is_cancelling(self, claim: Claim) -> bool:
        """Asked while the trainer is silent; otherwise the answer to a report says it."""
        try:
            with self._database.read() as session:
                return store.get(session, claim.job_id).status == "cancelling"
        except Unavailable:
            return False

    # --- its end ---

    def _finish(self, claim: Claim, outcome: Outcome) -> None:
        self._write(lambda session, number: store.finish(session, *self._of(claim), outcome, number))
        log("job_ended", job_id=claim.job_id, status=outcome.status, failure=outcome.failure and outcome.failure.code)
        if outcome.failure is not None and outcome.failure.code == "out_of_memory":
            # what the job has left behind in the process would be missing to the next one
            self._replace_trainer()

    def _release(self, claim: Claim, report: Report | None) -> None:
        reason = "the worker was stopped"
        self._write(lambda session, number: store.release(session, *self._of(claim), reason, report, number))
        log("job_released", job_id=claim.job_id)

    def _mourn(self, claim: Claim, ended: Ended) -> None:
        """Say what becomes of a job whose trainer has died; one that wants too much memory would do so again."""
        if ended.out_of_memory:
            message = out_of_memory(self._settings.trainer_memory_bytes)
            self._finish(claim, Outcome("failed", failure=Failure("out_of_memory", message)))
        else:
            self._lose(claim, f"the trainer ended {ended}")

    def _lose(self, claim: Claim, reason: str) -> None:
        self._write(lambda session, number: store.lose(session, *self._of(claim), reason, number))
        log("job_lost", "warning", job_id=claim.job_id, reason=reason)

    def _enforce(self, claim: Claim, passed: Literal["cancelled", "released", "stalled"]) -> None:
        """End a trainer that has let a deadline pass."""
        self._replace_trainer()
        if passed == "released":
            self._release(claim, None)
        elif passed == "cancelled":
            self._finish(claim, Outcome("cancelled"))
        else:
            message = f"the trainer made no progress for {self._settings.stall_seconds:g} seconds"
            self._finish(claim, Outcome("failed", failure=Failure("timeout", message)))

    @staticmethod
    def _of(claim: Claim) -> tuple[str, int]:
        return claim.job_id, claim.token

    def _write(self, act: Callable[[Session, int], T]) -> T:
        """Write, and write again with the same number while the database is away and the lease may still be ours."""
        self._number += 1
        began = time.monotonic()
        while True:
            try:
                with self._database.write() as session:
                    return act(session, self._number)
            except Unavailable as error:
                if self._lease.is_over():
                    raise store.LeaseLost("the database did not answer within the lease") from error
                if self._stop and time.monotonic() - began > self._settings.grace_seconds:
                    raise store.LeaseLost("the database did not answer before the worker had to stop") from error
                time.sleep(RETRY_SECONDS)
