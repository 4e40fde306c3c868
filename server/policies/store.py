"""All there is to know about stored policies; their parameters are in their checkpoints."""

from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from pydantic import TypeAdapter
from sqlalchemy import delete as delete_from
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from pgengine.environments import EnvironmentFacts
from pgengine.policies import create_policy, load
from pgengine.policies.networks import MAX_PARAMETERS
from pgengine.spec import EnvironmentSpec, PolicySpec
from server.checkpoints import store as checkpoints
from server.database import now
from server.errors import InUse, NotFound
from server.ids import new_id
from server.pages import PageQuery, Slice, fetch
from server.tables import Policy

__all__ = ["Drawn", "Policy", "check_fits", "create", "delete", "draw", "get", "list_", "spec_of"]

_SPEC: TypeAdapter[PolicySpec] = TypeAdapter(PolicySpec)
_IN_USE = (
    "The policy belongs to training jobs or gradient checks, which have to be deleted first, or another policy's job "
    "reads one of its checkpoints, and holds it until it ends or is cancelled."
)


@dataclass(frozen=True, slots=True)
class Drawn:
    """A new policy, ready to be stored.

    Attributes:
        spec: Network and distribution, all defaults written out.
        seed: Its parameters were drawn from it.
        policy_bytes: The policy, as `pgengine.load` reads it.
        digest: SHA-256 of the bytes in hexadecimal.
    """

    spec: PolicySpec
    seed: int
    policy_bytes: bytes = field(repr=False)
    digest: str


def draw(
    policy_spec: PolicySpec,
    environment: EnvironmentSpec,
    facts: EnvironmentFacts,
    seed: int,
    *,
    max_parameters: int = MAX_PARAMETERS,
) -> Drawn:
    """Draw a policy. A large one takes seconds, so it is done before the writing transaction and not in it.

    Args:
        policy_spec: Network and distribution.
        environment: What it will act in.
        facts: What is known of the environment.
        seed: Initial parameters are drawn from it.
        max_parameters: Most numbers in it; a larger one is refused before any is drawn.

    Raises:
        SpecError: with a pointer from the root of the policy's spec.
    """
    policy = create_policy(policy_spec, environment, facts, seed=seed, max_parameters=max_parameters)
    policy_bytes = policy.to_bytes()
    return Drawn(policy.spec, seed, policy_bytes, sha256(policy_bytes).hexdigest())


def create(
    session: Session,
    environment_id: str,
    drawn: Drawn,
    name: str | None = None,
    metadata: dict[str, Any] | None = None,
) -> Policy:
    """Keep a policy, and its parameters as checkpoint 0.

    Args:
        session: A writing transaction.
        environment_id: What it was drawn for.
        drawn: The policy.
        name: For people.
        metadata: For clients.
    """
    row = Policy(
        id=new_id("pol"),
        name=name,
        metadata_=metadata or {},
        environment_id=environment_id,
        spec=drawn.spec.model_dump(mode="json"),
        seed=drawn.seed,
        updates=0,
        created_at=now(),
    )
    session.add(row)
    session.flush()
    session.refresh(row)
    checkpoints.put(session, row.id, 0, drawn.policy_bytes, digest=drawn.digest)
    return row


def get(session: Session, policy_id: str) -> Policy:
    """The policy.

    Raises:
        NotFound: if there is none with this id.
    """
    row = session.get(Policy, policy_id)
    if row is None:
        raise NotFound("There is no policy with this id.")
    return row


def list_(session: Session, query: PageQuery, *, environment_id: str | None = None) -> Slice[Policy]:
    """One page of policies, of all environments if none is named."""
    statement = select(Policy)
    if environment_id is not None:
        statement = statement.where(Policy.environment_id == environment_id)
    return fetch(session, statement, Policy.id, "pol", query)


def delete(session: Session, policy_id: str) -> None:
    """Remove a policy with its checkpoints.

    Raises:
        NotFound: if there is none with this id.
        InUse: if jobs refer to it, or a job that has not ended reads one of its checkpoints.
    """
    row = get(session, policy_id)
    try:
        session.execute(delete_from(Policy).where(Policy.id == row.id))
    except IntegrityError as error:
        raise InUse(_IN_USE) from error
    session.expunge(row)


def check_fits(session: Session, policy_id: str, facts: EnvironmentFacts) -> None:
    """Whether a policy can act in an environment that may not be its own. Its spaces never change.

    Raises:
        NotFound: if there is no such policy.
        SpecError: if a space differs.
    """
    latest = checkpoints.latest(session, policy_id)
    load(checkpoints.content(session, latest.id)).fits(facts)


def spec_of(row: Policy) -> PolicySpec:
    """Network and distribution, all defaults written out."""
    return _SPEC.validate_python(row.spec)
