"""API keys: made, checked, listed, revoked.

A secret is 256 random bits, or at least 24 characters that the operator chose, so its plain SHA-256 cannot be guessed
back and a look-up by hash needs no slow comparison: what an attacker could learn from its timing is the hash of a
guess, not the secret.
"""

import hashlib
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from server.database import exclusively, now
from server.errors import NotFound
from server.ids import new_id
from server.pages import PageQuery, Slice, fetch
from server.tables import ApiKey

__all__ = [
    "ANYBODY",
    "SCOPES",
    "ApiKey",
    "Identity",
    "Scope",
    "create",
    "create_first",
    "ensure",
    "list_",
    "revoke",
    "touch",
    "valid",
    "verify",
]

Scope = Literal["read", "act", "train", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

SECRET_PREFIX = "pgk_"  # lets scanners of repositories and logs recognise one
TOUCH_SECONDS = 60.0


_AT_START = "keys of programs that start"


@dataclass(frozen=True, slots=True)
class Identity:
    """Who sends a request, and what the key allows."""

    key_id: str
    scopes: frozenset[str]

    def allows(self, scope: Scope) -> bool:
        """Whether the scope is among the key's; admin holds all."""
        return scope in self.scopes or "admin" in self.scopes


ANYBODY = Identity("anybody", frozenset({"admin"}))
"""Who sends a request to a server that asks for no key."""


def create(session: Session, name: str, scopes: Iterable[Scope]) -> tuple[ApiKey, str]:
    """Make a key. Its secret is in the answer and nowhere else."""
    secret = SECRET_PREFIX + secrets.token_urlsafe(32)
    return _add(session, secret, name, scopes), secret


def create_first(session: Session, name: str) -> tuple[ApiKey, str] | None:
    """Make an admin key if there is no key at all, else None; of several programs that start at once one makes it."""
    exclusively(session, _AT_START)
    if session.scalar(select(ApiKey.id).limit(1)) is not None:
        return None
    return create(session, name, ["admin"])


def ensure(session: Session, secret: str, name: str) -> list[ApiKey]:
    """Make sure that a secret chosen by the operator is an admin key, and the only one of its name.

    A key of that secret that was revoked is allowed again: the operator names it in the settings.

    Args:
        session: A writing transaction.
        secret: What clients send.
        name: Where the secret comes from.

    Returns:
        Keys of that name with other secrets, which were valid and are revoked now.
    """
    exclusively(session, _AT_START)
    row = session.scalars(select(ApiKey).where(ApiKey.hash == _hash(secret))).one_or_none()
    if row is None:
        row = _add(session, secret, name, ["admin"])
    row.revoked_at = None
    row.scopes = ["admin"]
    row.name = name
    replaced = session.scalars(
        select(ApiKey).where(ApiKey.name == name, ApiKey.id != row.id, ApiKey.revoked_at.is_(None))
    ).all()
    return [revoke(session, other.id) for other in replaced]


def valid(session: Session, name: str) -> ApiKey | None:
    """A key of this name that is not revoked, or None."""
    return session.scalars(select(ApiKey).where(ApiKey.name == name, ApiKey.revoked_at.is_(None)).limit(1)).first()


def verify(session: Session, secret: str) -> Identity | None:
    """Whose secret it is; None if it is unknown or revoked."""
    row = session.scalars(select(ApiKey).where(ApiKey.hash == _hash(secret), ApiKey.revoked_at.is_(None))).one_or_none()
    return None if row is None else Identity(row.id, frozenset(row.scopes))


def touch(session: Session, key_id: str) -> None:
    """Note that the key is used, to the minute."""
    session.execute(
        update(ApiKey)
        .where(ApiKey.id == key_id, or_(ApiKey.last_used_at.is_(None), ApiKey.last_used_at < now(-TOUCH_SECONDS)))
        .values(last_used_at=now())
    )


def list_(session: Session, query: PageQuery) -> Slice[ApiKey]:
    """One page of the keys, revoked ones too."""
    return fetch(session, select(ApiKey), ApiKey.id, "key", query)


def revoke(session: Session, key_id: str) -> ApiKey:
    """End a key; doing it twice keeps the first time.

    Raises:
        NotFound: if there is no such key.
    """
    row = session.get(ApiKey, key_id, with_for_update=True)
    if row is None:
        raise NotFound("There is no such key.")
    if row.revoked_at is None:
        session.execute(update(ApiKey).where(ApiKey.id == key_id).values(revoked_at=now()))
        session.refresh(row)
    return row


def _add(session: Session, secret: str, name: str, scopes: Iterable[Scope]) -> ApiKey:
    wanted = set(scopes)
    row = ApiKey(id=new_id("key"), name=name, hash=_hash(secret), scopes=[scope for scope in SCOPES if scope in wanted])
    session.add(row)
    session.flush()
    return row


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
