"""Making environments that others wrote, in a program that has other things to do.

A constructor and the first steps are code of another project: they may raise anything, try to leave, or never come
back. They run in a thread of their own, and a request waits for it only so long. Knows threads; knows no list of ids.
"""

import logging
from collections.abc import Callable
from threading import Lock, Thread
from typing import TypeVar

from gymnasium.error import DependencyNotInstalled

from pgengine.environments import EnvironmentFacts, describe
from pgengine.errors import SpecError
from pgengine.spec import EnvironmentSpec, GymnasiumSpec

__all__ = ["MAKE_SECONDS", "in_time", "made"]

MAKE_SECONDS = 30.0
"""How long a constructor may take that loads a game or a simulator; one that takes longer is taken to hang."""

T = TypeVar("T")

_log = logging.getLogger(__name__)
_hanging: dict[str, Thread] = {}
_lock = Lock()


def made(spec: EnvironmentSpec, seconds: float = MAKE_SECONDS) -> EnvironmentFacts:
    """What is known of an environment, found out by making it once.

    Args:
        spec: What to make it from.
        seconds: How long to wait for somebody else's code.

    Raises:
        SpecError: with a pointer from the root of the spec; why somebody else's code failed stands in the log, too.
    """
    if not isinstance(spec, GymnasiumSpec):
        return describe(spec)
    try:
        return in_time(spec.id, lambda: describe(spec), seconds)
    except SpecError as error:
        # what is not installed is said by the message; of anything else the operator wants to see where
        if error.code == "environment_not_made" and not isinstance(
            error.__cause__, ImportError | DependencyNotInstalled
        ):
            _log.warning("%s", error.message, exc_info=error.__cause__)
        raise


def in_time(environment_id: str, call: Callable[[], T], seconds: float) -> T:
    """What somebody else's code answers; one that does not come back is waited for once, and not by every request.

    Raises:
        SpecError: `environment_not_made`, if it takes longer.
    """
    found: list[T] = []
    raised: list[BaseException] = []

    def work() -> None:
        try:
            found.append(call())
        except BaseException as error:  # noqa: BLE001  it belongs to whoever waits
            raised.append(error)

    with _lock:
        hanging = _hanging.get(environment_id)
    if hanging is None or not hanging.is_alive():
        thread = Thread(target=work, name=f"make {environment_id}", daemon=True)
        thread.start()
        thread.join(seconds)
        if found:
            return found[0]
        if raised:
            raise raised[0]
        with _lock:
            _hanging[environment_id] = thread
    raise SpecError(
        "/id",
        "environment_not_made",
        f"{environment_id} could not be made: importing it, its constructor or its first steps have not come back "
        f"within {seconds:g} seconds",
    )
