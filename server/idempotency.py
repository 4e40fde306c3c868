"""Creating once, however often the same request is sent (`Idempotency-Key`).

Answer and object are written in one transaction, so there is never one without the other. Only answers of successful
requests are kept: what was refused changed nothing and may be tried again with the same key.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import delete, func, select, tuple_
from sqlalchemy.orm import Session

from server.database import now
from server.errors import IdempotencyKeyReused
from server.tables import Idempotency

__all__ = ["KEPT_SECONDS", "LONGEST_KEY", "Reply", "kept", "once"]

KEPT_SECONDS = 24 * 3600.0
LONGEST_KEY = 255


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer that can be kept and given again.

    Attributes:
        status: HTTP status.
        body: What is sent as JSON; the order of keys is kept.
        headers: Headers that belong to the answer, such as `location`.
    """

    status: int
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)


def once(session: Session, key_id: str, key: str | None, route: str, body: bytes, create: Callable[[], Reply]) -> Reply:
    """Answer a creating request, from memory if it was answered before.

    A twin that arrives while the first one is at work waits for its transaction, then gets its answer.

    Args:
        session: The writing transaction in which `create` works; nothing may have been written in it yet.
        key_id: Whose key it is: two API keys may use the same Idempotency-Key.
        key: The header's value; None creates without keeping the answer.
        route: Method and path as declared, such as `POST /v1/training-jobs`.
        body: The request's bytes.
        create: Creates and answers; what it raises goes on and nothing is kept.

    Raises:
        IdempotencyKeyReused: if the key was used for another body or route.
    """
    if key is None:
        return create()
    _wait_for_twins(session, key_id, key)
    known = kept(session, key_id, key, route, body)
    if known is not None:
        return known
    # one of this key that is left has expired
    session.execute(delete(Idempotency).where(Idempotency.key_id == key_id, Idempotency.key == key))
    reply = create()
    _forget_expired(session)
    session.add(
        Idempotency(
            key_id=key_id,
            key=key,
            route=route,
            body_hash=hashlib.sha256(body).hexdigest(),
            status_code=reply.status,
            response={"body": reply.body, "headers": reply.headers},
        )
    )
    return reply


def kept(session: Session, key_id: str, key: str | None, route: str, body: bytes) -> Reply | None:
    """What the request was answered before, or None; asked in a reading transaction, it saves work and no more.

    Args:
        session: A transaction.
        key_id: Whose key it is.
        key: The header's value, or None.
        route: Method and path as declared.
        body: The request's bytes.

    Raises:
        IdempotencyKeyReused: if the key was used for another body or route.
    """
    if key is None:
        return None
    row = session.scalar(
        select(Idempotency).where(
            Idempotency.key_id == key_id, Idempotency.key == key, Idempotency.created_at >= now(-KEPT_SECONDS)
        )
    )
    if row is None:
        return None
    if (row.route, row.body_hash) != (route, hashlib.sha256(body).hexdigest()):
        raise IdempotencyKeyReused
    return Reply(row.status_code, row.response["body"], row.response["headers"] | {"idempotency-replayed": "true"})


def _forget_expired(session: Session) -> None:
    # skipping what others are deleting at the same time, so that two that forget never wait for each other
    expired = (
        select(Idempotency.key_id, Idempotency.key)
        .where(Idempotency.created_at < now(-KEPT_SECONDS))
        .limit(1000)
        .with_for_update(skip_locked=True)
    )
    session.execute(
        delete(Idempotency).where(tuple_(Idempotency.key_id, Idempotency.key).in_(expired)),
        execution_options={"synchronize_session": False},
    )


def _wait_for_twins(session: Session, key_id: str, key: str) -> None:
    # on SQLite the transaction has the only write lock already
    if session.get_bind().dialect.name == "postgresql":
        digest = hashlib.sha256(f"{key_id}\0{key}".encode()).digest()
        session.execute(select(func.pg_advisory_xact_lock(int.from_bytes(digest[:8], signed=True))))
