"""The loop that takes expired leases from workers that are not heard of. Each worker runs it; any one is enough."""

import threading

from sqlalchemy.exc import SQLAlchemyError

from server.database import Database
from server.errors import Unavailable
from server.jobs import store
from server.logs import log

__all__ = ["REAP_SECONDS", "reap_until"]

REAP_SECONDS = 1.0
"""How often expired leases are looked for."""


def reap_until(stopped: threading.Event, database: Database) -> None:
    """Look for expired leases now and then until told to stop; meant for a thread of its own."""
    while not stopped.wait(REAP_SECONDS):
        try:
            # reading first: there is nothing to take nearly always, and then no lock is wanted
            with database.read() as session:
                expired = store.any_expired(session)
            if expired:
                with database.write() as session:
                    reaped = store.reap(session)
                # a row that its holder still locks expired too, and cannot be taken yet
                if reaped:
                    log("leases_reaped", jobs=reaped)
        except Unavailable:
            pass  # the loop that heals the queue goes on until the database is back
        except SQLAlchemyError as error:
            log("reaping_failed", "warning", error=str(error))
