"""How much memory the programs that compute may take: a trainer, and a program that the API asks.

A job that wants too much must fail by itself, with a message, and take neither the server nor the machine with it.
"""

import contextlib
import os
import resource
from pathlib import Path

__all__ = ["LEAST_BYTES", "bound_this_process", "is_out_of_memory", "machine_bytes", "out_of_memory"]

LEAST_BYTES = 2**30
"""Least limit: torch alone takes a quarter of it."""

SETTING = "PGENGINE_TRAINER_MEMORY_BYTES"

OOM_SCORE = 500
"""Of 1000. The kernel ends the programs that compute before those that answer, when the machine's memory is used up."""

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def machine_bytes() -> int:
    """Memory of this machine, or of the container around this process if that has less."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in _CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max", or no such container
            found.append(int(Path(path).read_text()))
    return min(found)


def bound_this_process(limit: int) -> None:
    """Let this process take so many bytes and no more; what asks for more gets a MemoryError.

    The limit is on memory that the process may write to and has for itself (RLIMIT_DATA). Address space is not limited:
    libraries, CUDA among them, reserve far more of that than they use.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bounded = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (bounded, bounded))
    with contextlib.suppress(OSError):  # other systems have no such file
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what has caused it, says that there is no more memory."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return True
        # torch, the C++ below it, and a thread whose stack finds no room say it with a RuntimeError
        if isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


_WORDS = ("can't allocate memory", "bad_alloc", "can't start new thread")


def out_of_memory(limit: int | None = None) -> str:
    """What is said of a job that wanted more than so many bytes; without them, more than this process may take."""
    if limit is None:
        limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    most = "" if limit == resource.RLIM_INFINITY else f": a trainer may take {limit / 2**30:,.1f} GiB ({SETTING})"
    return f"there was not enough memory{most}; fewer trajectories, shorter episodes or a smaller policy need less"
