"""The policies that a process has in memory to act with, and what it knows of their checkpoints.

Loaded policies are kept by checkpoint id. What `latest` and `best` mean, and whether a policy still exists, is read
again by one query a second for all policies that are being asked; on a hit there is no database access at all.

While the database does not answer, what is in memory goes on acting, and says how old the knowledge is.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from server.checkpoints import store as checkpoints
from server.database import Database
from server.errors import FieldError, NotFound, Unavailable, invalid
from server.ids import is_id
from server.lanes import Lane

if TYPE_CHECKING:
    from pgengine import Policy

__all__ = ["CHECKPOINT_EXPECTED", "STALE_SECONDS", "Loaded", "PolicyCache"]

REFRESH_SECONDS = 1.0
"""How often the meaning of `latest` and `best` is read again while policies are being asked."""

STALE_SECONDS = 2.0
"""Nothing older is answered while the database answers: a request that finds older knowledge waits for new."""

WAIT_SECONDS = 2.0
"""How long it waits before it takes the older knowledge: a database may hang without saying so."""

GOODBYE_SECONDS = 1.0
"""What is left to readers when the server shuts down."""

IDLE_SECONDS = 60.0
"""A policy that nobody has asked for so long is no longer kept up to date; the next request reads it again."""

CHECKPOINT_EXPECTED = ("malformed_id", "Expected latest, best, or an id: ckpt_ and 32 hexadecimal digits.")

WRITING = 500
"""Multiplications that take as long as writing one number of an answer."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A policy in memory, and which checkpoint it is.

    Attributes:
        policy: What acts.
        policy_id: Whose checkpoint it is.
        checkpoint_id: The checkpoint.
        updates: Updates that the policy had had.
        size: Bytes of the checkpoint.
        work: Multiplications that a row takes, and what writing its answer takes, in multiplications.
        has_memory: Whether it reads histories in the place of observations.
    """

    policy: "Policy"
    policy_id: str
    checkpoint_id: str
    updates: int
    size: int
    work: int
    has_memory: bool


@dataclass(slots=True)
class _Known:
    """What is known of a policy: its newest and its best checkpoint, since when, and when it was last asked."""

    heads: checkpoints.Heads
    read_at: float
    asked_at: float


class PolicyCache:
    """Loaded policies by checkpoint id. Lives on the event loop; only reading happens in threads."""

    def __init__(self, database: Database, most_policies: int, most_bytes: int) -> None:
        self._database = database
        self._most_policies = most_policies
        self._most_bytes = most_bytes
        self._bytes = 0
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()
        self._known: dict[str, _Known] = {}
        # one reader for each thing that is missing, however many requests wait for it
        self._flights: dict[str, tuple[asyncio.Task[Any], float]] = {}
        self._lane = Lane(2)

    def peek(self, policy_id: str, checkpoint: str) -> Loaded | None:
        """The policy if it is in memory and known to be fresh; never waits."""
        known = self._known.get(policy_id)
        if known is None:
            return None
        now = time.monotonic()
        age = now - known.read_at
        if age >= STALE_SECONDS:
            return None
        known.asked_at = now
        if age >= REFRESH_SECONDS and _REFRESH not in self._flights:
            self._flight(_REFRESH, self._refresh)
        loaded = self._loaded.get(_checkpoint_id(known.heads, checkpoint) or "")
        if loaded is None or loaded.policy_id != policy_id:
            return None
        self._loaded.move_to_end(loaded.checkpoint_id)
        return loaded

    async def find(self, policy_id: str, checkpoint: str) -> tuple[Loaded, float]:
        """The policy, read from the database if need be, and how many seconds old the knowledge of it is.

        Raises:
            InvalidRequest: if one of the two ids is malformed.
            NotFound: if there is no such policy, or it has no such checkpoint.
            Unavailable: if the database does not answer and the policy is not in memory.
        """
        if not is_id("pol", policy_id):
            raise invalid("/policy_id", "malformed_id", "Expected an id: pol_ and 32 hexadecimal digits.")
        if checkpoint not in ("latest", "best") and not is_id("ckpt", checkpoint):
            raise invalid("/checkpoint", *CHECKPOINT_EXPECTED)
        known = await self._current(policy_id)
        checkpoint_id = _checkpoint_id(known.heads, checkpoint)
        if checkpoint_id is None:
            raise _no_checkpoint(
                "No checkpoint of this policy was looked at in a selection yet, so there is no best one."
            )
        loaded = self._loaded.get(checkpoint_id)
        if loaded is None:
            try:
                loaded = await self._fly(checkpoint_id, lambda: self._load(checkpoint_id))
            except NotFound:
                if checkpoint == checkpoint_id:
                    raise _no_checkpoint("This policy has no such checkpoint.") from None
                # a repeated update has replaced it since it was read which one is the newest
                self._known.pop(policy_id, None)
                return await self.find(policy_id, checkpoint)
            except Unavailable:
                # a newer checkpoint is known of, but only an older one is in memory
                if checkpoint != "latest" or (loaded := self._newest(policy_id)) is None:
                    raise
        if loaded.policy_id != policy_id:
            raise _no_checkpoint("This policy has no such checkpoint.")
        return loaded, time.monotonic() - known.read_at

    async def _current(self, policy_id: str) -> _Known:
        """What is known of a policy, read again if that is long ago and the database answers."""
        known = self._known.get(policy_id)
        if known is None:
            return await self._fly(policy_id, lambda: self._read(policy_id))
        known.asked_at = now = time.monotonic()
        if now - known.read_at < STALE_SECONDS:
            return known
        reading = self._fly(policy_id, lambda: self._read(policy_id))
        # counted from the beginning of the reading: those who come later do not wait as long again
        began = self._flights[policy_id][1]
        try:
            return await asyncio.wait_for(reading, max(0.0, began + WAIT_SECONDS - now))
        except (Unavailable, TimeoutError):
            return known

    def _newest(self, policy_id: str) -> Loaded | None:
        """The newest checkpoint of a policy that is in memory."""
        own = [loaded for loaded in self._loaded.values() if loaded.policy_id == policy_id]
        return max(own, key=lambda loaded: loaded.updates, default=None)

    async def stop(self) -> None:
        """Waits a moment for what is being read; a database that hangs is not waited for."""
        if self._flights:
            await asyncio.wait([task for task, _ in self._flights.values()], timeout=GOODBYE_SECONDS)

    def _fly(self, key: str, read: Callable[[], Awaitable[T]]) -> Awaitable[T]:
        """Joins the reader of this key, or starts it; a request that is cancelled does not take it along."""
        return asyncio.shield(self._flight(key, read))

    def _flight(self, key: str, read: Callable[[], Awaitable[T]]) -> asyncio.Task[T]:
        task, _ = self._flights.get(key) or (None, 0.0)
        if task is None:
            task = asyncio.ensure_future(read())
            self._flights[key] = (task, time.monotonic())
            task.add_done_callback(lambda ended: self._landed(key, ended))
        return task

    def _landed(self, key: str, task: asyncio.Task[Any]) -> None:
        del self._flights[key]
        if not task.cancelled():
            task.exception()  # those who wait get it; a refresh that fails is tried again by the next request

    async def _read(self, policy_id: str) -> _Known:
        """Reads one policy that was not known, or not lately."""
        now = time.monotonic()
        heads = (await self._lane.run(self._heads, [policy_id])).get(policy_id)
        if heads is None:
            self._forget(policy_id)
            raise NotFound("there is no such policy")
        known = self._known[policy_id] = _Known(heads, now, now)
        return known

    async def _refresh(self) -> None:
        """Reads all policies that are being asked, in one query, and forgets those that are gone or idle."""
        now = time.monotonic()
        asked = [policy_id for policy_id, known in self._known.items() if now - known.asked_at < IDLE_SECONDS]
        found = await self._lane.run(self._heads, asked)
        for policy_id, known in list(self._known.items()):
            heads = found.get(policy_id)
            if heads is not None:
                known.heads, known.read_at = heads, now
            elif known.read_at < now:
                self._forget(policy_id)

    def _heads(self, policy_ids: list[str]) -> dict[str, checkpoints.Heads]:
        with self._database.read() as session:
            return checkpoints.heads(session, policy_ids)

    def _forget(self, policy_id: str) -> None:
        self._known.pop(policy_id, None)
        for loaded in [loaded for loaded in self._loaded.values() if loaded.policy_id == policy_id]:
            self._drop(loaded.checkpoint_id)

    async def _load(self, checkpoint_id: str) -> Loaded:
        loaded = await self._lane.run(self._load_now, checkpoint_id)
        self._loaded[checkpoint_id] = loaded
        self._bytes += loaded.size
        while len(self._loaded) > 1 and (len(self._loaded) > self._most_policies or self._bytes > self._most_bytes):
            self._drop(next(iter(self._loaded)))
        return loaded

    def _drop(self, checkpoint_id: str) -> None:
        self._bytes -= self._loaded.pop(checkpoint_id).size

    def _load_now(self, checkpoint_id: str) -> Loaded:
        # imported here: a process that never acts need not load the engine
        import pgengine

        with self._database.read() as session:
            row = checkpoints.get(session, checkpoint_id)
            data = checkpoints.content(session, checkpoint_id)
        policy = pgengine.load(data)
        work = max(policy.multiplications, WRITING * policy.distribution.width)
        return Loaded(policy, row.policy_id, row.id, row.updates, len(data), work, policy.memory > 1)


_REFRESH = "refresh"


def _no_checkpoint(message: str) -> NotFound:
    return NotFound(message, errors=[FieldError("/checkpoint", "not_found", message)])


def _checkpoint_id(heads: checkpoints.Heads, checkpoint: str) -> str | None:
    if checkpoint == "latest":
        return heads.latest
    if checkpoint == "best":
        return heads.best
    return checkpoint
