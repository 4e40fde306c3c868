"""Creating once, however often the same request is sent (`Idempotency-Key`).

Answer and object are written in one transaction, so there is never one without the other. Only answers of successful
requests are kept: what was refused changed nothing and may be tried again with the same key.

A small answer is kept whole. Of a large one, which is large because it repeats what the object was made from, only what
may change is kept: the rest is read from the object again, so that it is not stored once more for each request.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import delete, select, tuple_
from sqlalchemy.orm import Session

from server.database import exclusively, now
from server.errors import IdempotencyKeyReused, NotFound
from server.tables import Idempotency

__all__ = ["KEPT_SECONDS", "LARGEST_KEPT", "LONGEST_KEY", "Reply", "Today", "kept", "once"]

KEPT_SECONDS = 24 * 3600.0
LONGEST_KEY = 255
LARGEST_KEPT = 16_384
"""Characters of an answer, as JSON, that is kept whole."""

Today = Callable[[Session, str], dict[str, Any]]
"""The answer as it would be now, of the object with this id; raises NotFound if it is gone."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer that can be kept and given again.

    Attributes:
        status: HTTP status.
        body: What is sent as JSON; the order of keys is kept.
        headers: Headers that belong to the answer, such as `location`.
        lasting: Fields of the body that stay as they are as long as the object is there.
    """

    status: int
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)
    lasting: tuple[str, ...] = ()


def once(
    session: Session,
    key_id: str,
    key: str | None,
    route: str,
    body: bytes,
    create: Callable[[], Reply],
    today: Today | None = None,
) -> Reply:
    """Answer a creating request, from memory if it was answered before.

    A twin that arrives while the first one is at work waits for its transaction, then gets its answer.

    Args:
        session: The writing transaction in which `create` works; nothing may have been written in it yet.
        key_id: Whose key it is: two API keys may use the same Idempotency-Key.
        key: The header's value; None creates without keeping the answer.
        route: Method and path as declared, such as `POST /v1/training-jobs`.
        body: The request's bytes.
        create: Creates and answers; what it raises goes on and nothing is kept.
        today: Needed where answers have lasting fields.

    Raises:
        IdempotencyKeyReused: if the key was used for another body or route.
        NotFound: if the answer was large, and what was created is gone.
    """
    if key is None:
        return create()
    exclusively(session, f"{key_id}\0{key}")
    known = kept(session, key_id, key, route, body, today)
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
            response=_kept_part(reply),
        )
    )
    return reply


def kept(
    session: Session, key_id: str, key: str | None, route: str, body: bytes, today: Today | None = None
) -> Reply | None:
    """What the request was answered before, or None; asked in a reading transaction, it saves work and no more.

    Args:
        session: A transaction.
        key_id: Whose key it is.
        key: The header's value, or None.
        route: Method and path as declared.
        body: The request's bytes.
        today: Needed where answers have lasting fields.

    Raises:
        IdempotencyKeyReused: if the key was used for another body or route.
        NotFound: if the answer was large, and what was created is gone.
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
    answer = row.response["body"]
    if row.response.get("is_part"):
        assert today is not None, "who makes answers with lasting fields can make them again"
        answer = _completed(session, answer, today)
    return Reply(row.status_code, answer, row.response["headers"] | {"idempotency-replayed": "true"})


def _kept_part(reply: Reply) -> dict[str, Any]:
    """What is stored of an answer."""
    is_part = bool(reply.lasting) and len(json.dumps(reply.body)) > LARGEST_KEPT
    body = {name: value for name, value in reply.body.items() if not (is_part and name in reply.lasting)}
    return {"body": body, "headers": reply.headers, "is_part": is_part}


def _completed(session: Session, part: dict[str, Any], today: Today) -> dict[str, Any]:
    try:
        whole = today(session, part["id"])
    except NotFound:
        raise NotFound(f"{part['id']}, which this request has created, was deleted meanwhile.") from None
    return {name: part.get(name, value) for name, value in whole.items()}


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
