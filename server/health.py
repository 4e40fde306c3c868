"""Whether the database answers: one view of it for all connections of a process.

Whoever meets an outage tells it here, and it is logged once, at its beginning and at its end. While it lasts one
transaction at a time tries whether it is over; all others are told at once, so that no thread waits for nothing.

Knows no database and no SQL; `database` asks it before each transaction and tells it how the transaction went.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from server.errors import Unavailable
from server.logs import log

__all__ = ["AWAY", "Health", "Outage"]

AWAY = "The database does not answer."
PAUSE_SECONDS = 0.25
"""How long after a failed attempt the next one is made, at the earliest."""


class Outage(Exception):
    """The database did not answer, or not as ours; the message says why, for the operator."""


class Health:
    """What is known of one database. Safe to share between threads.

    Attributes:
        reason: Why the database did not answer when it was last away, for the operator.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._lock = threading.Lock()
        self._has_answered = False
        self._away_since: float | None = None
        self._tried_at = 0.0
        self._trying = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around one transaction, which raises `Outage` where the database does not answer.

        Raises:
            Unavailable: if the database is known to be away and somebody else is trying, or if this one found it away.
        """
        trying = self._away_since is not None and self._try()
        try:
            yield
        except Outage as error:
            self._went_away(str(error))
            raise Unavailable(AWAY) from (error.__cause__ or error)
        else:
            if self._away_since is not None:
                self._came_back()
            self._has_answered = True
        finally:
            if trying:
                self._trying = False

    @property
    def is_away(self) -> bool:
        """Whether the last one who asked got no answer."""
        return self._away_since is not None

    def _try(self) -> bool:
        """Whether this transaction is the one that tries; says no by raising."""
        with self._lock:
            if self._away_since is None:
                return False
            if self._trying or time.monotonic() - self._tried_at < PAUSE_SECONDS:
                raise Unavailable(AWAY)
            self._trying = True
            return True

    def _went_away(self, reason: str) -> None:
        with self._lock:
            self._tried_at = time.monotonic()
            if self._away_since is not None:
                return
            self._away_since, self.reason = self._tried_at, reason
        # one that never answered is the business of the program that starts
        if self._has_answered:
            log("database_away", "warning", reason=reason)

    def _came_back(self) -> None:
        with self._lock:
            if self._away_since is None:
                return
            seconds, self._away_since = time.monotonic() - self._away_since, None
        if self._has_answered:
            log("database_back", "warning", seconds=round(seconds, 1))
