"""All there is to know about stored environments."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Literal

from pydantic import TypeAdapter
from sqlalchemy import delete as delete_from
from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from pgengine.environments import EnvironmentFacts
from pgengine.spec import EnvironmentSpec
from server.database import JsonText, now
from server.environments.making import made
from server.environments.types import AllowList
from server.errors import InUse, NotFound
from server.ids import new_id
from server.pages import PageQuery, Slice, fetch
from server.tables import Environment

__all__ = [
    "Described",
    "Environment",
    "current_facts_of",
    "delete",
    "described",
    "ensure",
    "facts_of",
    "get",
    "gymnasium_ids",
    "kind_of",
    "list_",
    "spec_of",
]

_SPEC: TypeAdapter[EnvironmentSpec] = TypeAdapter(EnvironmentSpec)


@dataclass(frozen=True, slots=True)
class Described:
    """An environment with all that is known of it, ready to be stored if it is not.

    Attributes:
        spec: What to make it from.
        facts: What is known of it before it is played.
        content: The spec as it is stored.
        content_hash: Tells identical ones.
    """

    spec: EnvironmentSpec = field(repr=False)
    facts: EnvironmentFacts = field(repr=False)
    content: JsonText = field(repr=False)
    content_hash: str


def described(session: Session, spec: EnvironmentSpec, *, allowed: AllowList) -> Described:
    """What is known of an environment: read if it is stored, else found out by making it once.

    Making one and writing out its tables may take seconds, so it is done before the writing transaction and not in it.

    Args:
        session: A transaction.
        spec: What to make it from.
        allowed: What may be used here.

    Raises:
        SpecError: with a pointer from the root of the spec.
    """
    allowed.check(spec)
    content: dict[str, Any] = spec.model_dump(mode="json")
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content_hash = sha256(canonical.encode()).hexdigest()
    row = _with_hash(session, content_hash)
    known = allowed.described(spec) if row is None or _is_short(row) else facts_of(row)
    # the fields in their own order, as they are published
    text = JsonText(json.dumps(content, allow_nan=False, separators=(",", ":")))
    return Described(spec, known, text, content_hash)


def ensure(session: Session, environment: Described) -> tuple[Environment, bool]:
    """The stored environment, and whether it is new.

    Args:
        session: A writing transaction.
        environment: What to store.
    """
    row = _with_hash(session, environment.content_hash)
    if row is not None:
        if _is_short(row):
            row.facts = environment.facts.model_dump(mode="json")
        return row, False
    insert = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    new = session.scalar(
        insert(Environment)
        .values(
            id=new_id("env"),
            content_hash=environment.content_hash,
            spec=environment.content,
            facts=environment.facts.model_dump(mode="json"),
            created_at=now(),
        )
        # another request may store the same one at this moment
        .on_conflict_do_nothing(index_elements=[Environment.content_hash])
        .returning(Environment.id)
    )
    row = _with_hash(session, environment.content_hash)
    assert row is not None
    return row, new is not None


def get(session: Session, environment_id: str) -> Environment:
    """The environment; its spec, which may be large, is read when it is asked for.

    Raises:
        NotFound: if there is none with this id.
    """
    row = session.get(Environment, environment_id)
    if row is None:
        raise NotFound("There is no environment with this id.")
    return row


def list_(session: Session, query: PageQuery) -> Slice[Environment]:
    """One page of environments, without their specs."""
    return fetch(session, select(Environment), Environment.id, "env", query)


def gymnasium_ids(session: Session, rows: Sequence[Environment]) -> dict[str, str]:
    """The registered ids of those environments that have one, in one query that reads no tables of a finite MDP."""
    registered = [row.id for row in rows if kind_of(row) == "gymnasium"]
    specs = session.execute(select(Environment.id, Environment.spec).where(Environment.id.in_(registered)))
    return {environment_id: spec["id"] for environment_id, spec in specs}


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
        raise InUse("Policies or jobs refer to this environment; delete them first.") from error


def spec_of(row: Environment) -> EnvironmentSpec:
    """What the environment was made from; asked in the transaction that the row comes from."""
    return _SPEC.validate_python(row.spec)


def facts_of(row: Environment) -> EnvironmentFacts:
    """What is known of the environment."""
    return EnvironmentFacts.model_validate(row.facts)


def current_facts_of(row: Environment) -> EnvironmentFacts:
    """What is known of the environment, found out again if an earlier version knew less when it was stored."""
    return made(spec_of(row)) if _is_short(row) else facts_of(row)


def kind_of(row: Environment) -> Literal["gymnasium", "tabular", "lqr"]:
    """Which kind of environment it is, without reading its spec."""
    facts = facts_of(row)
    if facts.limit_from in ("id", "declared"):
        return "gymnasium"
    return "lqr" if facts.exact == "lqr" else "tabular"


def _is_short(row: Environment) -> bool:
    """Whether an earlier version, which did not look for as much, has stored it."""
    played = row.facts["limit_from"] in ("id", "declared") and row.facts.get("exact") is None
    return not {"exact", "states"} <= row.facts.keys() or (played and "repeatable" not in row.facts)


def _with_hash(session: Session, content_hash: str) -> Environment | None:
    return session.scalar(select(Environment).where(Environment.content_hash == content_hash))
