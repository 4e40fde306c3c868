"""The lease of the job at hand: a thread renews it over a connection of its own, so that nothing makes it late."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from sqlalchemy.exc import SQLAlchemyError

from server.database import Database
from server.errors import Unavailable
from server.jobs import store
from server.jobs.reports import Claim
from server.logs import log
from server.settings import Settings

__all__ = ["Lease"]


class Lease:
    """Renews what it holds from `__enter__` to `__exit__`."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database.another(pool_size=1)
        self._lease_seconds = settings.lease_seconds
        self._renew_seconds = settings.renew_seconds
        self._lock = threading.Lock()
        self._claim: Claim | None = None
        self._renewed_at = 0.0
        self._lost = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._renew_for_ever, name="lease", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        # it may be waiting for the database, which the end does not wait for
        self._thread.join(self._renew_seconds)
        self._database.dispose()

    @contextmanager
    def holding(self, claim: Claim) -> Iterator[None]:
        """Renew this job's lease until the end of the block."""
        with self._lock:
            self._claim, self._lost, self._renewed_at = claim, False, time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._claim = None

    def is_over(self) -> bool:
        """Whether the lease is lost, or has not been renewed for so long that somebody else may have it."""
        with self._lock:
            return self._lost or time.monotonic() - self._renewed_at > self._lease_seconds

    def _renew_for_ever(self) -> None:
        pause = self._renew_seconds
        while not self._closed.wait(pause):
            with self._lock:
                claim = self._claim
            # what is late already must not be late by a whole pause more
            pause = self._renew_seconds if claim is None or self._renew(claim) else self._renew_seconds / 8

    def _renew(self, claim: Claim) -> bool:
        """Renew it once; says whether the database answered."""
        # counted from before the statement: the database's lease lasts at least as long
        began = time.monotonic()
        try:
            with self._database.write() as session:
                renewed = store.renew(session, claim.job_id, claim.token, self._lease_seconds)
        except (Unavailable, SQLAlchemyError) as error:
            # an outage has been logged once already
            if not self._database.health.is_away:
                log("lease_not_renewed", "warning", job_id=claim.job_id, error=str(error))
            return False
        with self._lock:
            if self._claim is claim:
                self._lost, self._renewed_at = not renewed, began if renewed else self._renewed_at
        return True
