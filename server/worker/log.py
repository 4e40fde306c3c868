"""The worker's log: one JSON object a line on standard error; programs can read it, and a traceback stays whole."""

import json
import logging
import os
import sys
from datetime import UTC, datetime

__all__ = ["configure", "log"]


def log(event: str, **fields: object) -> None:
    """Write one line.

    Args:
        event: What happened, in snake case.
        fields: To whom and why; anything that JSON does not know is written as text.
    """
    line = {"at": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, "pid": os.getpid(), **fields}
    # one write, so that lines of several processes do not run into each other
    sys.stderr.write(json.dumps(line, default=str) + "\n")
    sys.stderr.flush()


def configure() -> None:
    """Write what other modules log, from warnings on, in the same form."""
    logging.basicConfig(level=logging.WARNING, handlers=[_Lines()], force=True)
    logging.captureWarnings(True)


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        traceback = logging.Formatter().formatException(record.exc_info) if record.exc_info else None
        fields = {"logger": record.name, "level": record.levelname.lower(), "message": record.getMessage()}
        log("logged", **fields, **({"traceback": traceback} if traceback else {}))
