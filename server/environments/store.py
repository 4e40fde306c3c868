"""All there is to know about stored environments."""

import json
from hashlib import sha256
from typing import Any

from pydantic import TypeAdapter
from sqlalchemy import delete as delete_from
from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from pgengine.environments import EnvironmentFacts, describe
from pgengine.spec import EnvironmentSpec, GymnasiumSpec, TabularSpec
from server.database import now
from server.environments.types import AllowList
from server.errors import InUse, NotFound
from server.ids import new_id
from server.pages import PageQuery, Slice, fetch
from server.tables import Environment

__all__ = ["Environment", "delete", "ensure", "facts", "facts_of", "find", "get", "list_", "spec_of"]

_SPEC: TypeAdapter[GymnasiumSpec | TabularSpec] = TypeAdapter(EnvironmentSpec)


def facts(session: Session, spec: GymnasiumSpec | TabularSpec, *, allowed: AllowList) -> EnvironmentFacts:
    """What is known of an environment before it is played: read if it is stored, else found out by making it once.

    Making one may take a tenth of a second, so it is done before the writing transaction and not in it.

    Raises:
        SpecError: with a pointer from the root of the spec.
    """
    allowed.check(spec)
    row = find(session, spec)
    return describe(spec) if row is None else facts_of(row)


def ensure(
    session: Session,
    spec: GymnasiumSpec | TabularSpec,
    *,
    allowed: AllowList,
    facts: EnvironmentFacts | None = None,
) -> Environment:
    """The stored environment of this spec; it is stored if it is new.

    Args:
        session: A writing transaction.
        spec: What to make it from.
        allowed: What may be used here.
        facts: What is known of it, if that was found out before.

    Raises:
        SpecError: with a pointer from the root of the spec.
    """
    allowed.check(spec)
    row = find(session, spec)
    if row is not None:
        return row
    known = facts or describe(spec)
    insert = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    session.execute(
        insert(Environment)
        .values(
            id=new_id("env"),
            content_hash=_content_hash(spec),
            spec=spec.model_dump(mode="json"),
            facts=known.model_dump(mode="json"),
            created_at=now(),
        )
        # another request may store the same one at this moment
        .on_conflict_do_nothing(index_elements=[Environment.content_hash])
    )
    return session.scalars(select(Environment).where(Environment.content_hash == _content_hash(spec))).one()


def find(session: Session, spec: GymnasiumSpec | TabularSpec) -> Environment | None:
    """The environment that was stored from the same spec, or None."""
    return session.scalar(select(Environment).where(Environment.content_hash == _content_hash(spec)))


def get(session: Session, environment_id: str) -> Environment:
    """The environment.

    Raises:
        NotFound: if there is none with this id.
    """
    row = session.get(Environment, environment_id)
    if row is None:
        raise NotFound("There is no environment with this id.")
    return row


def list_(session: Session, query: PageQuery) -> Slice[Environment]:
    """One page of environments."""
    return fetch(session, select(Environment), Environment.id, "env", query)


def delete(session: Session, environment_id: str) -> None:
    """Remove an environment.

    Raises:
        NotFound: if there is none with this id.
        InUse: if policies or jobs refer to it.
    """
    row = get(session, environment_id)
    try:
        session.execute(delete_from(Environment).where(Environment.id == row.id))
    except IntegrityError as error:
        raise InUse("Policies or training jobs refer to this environment; delete them first.") from error


def spec_of(row: Environment) -> GymnasiumSpec | TabularSpec:
    """What the environment was made from."""
    return _SPEC.validate_python(row.spec)


def facts_of(row: Environment) -> EnvironmentFacts:
    """What is known of the environment."""
    return EnvironmentFacts.model_validate(row.facts)


def _content_hash(spec: GymnasiumSpec | TabularSpec) -> str:
    content: dict[str, Any] = spec.model_dump(mode="json")
    return sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
