"""All there is to know about stored policies; their parameters are in their checkpoints."""

from typing import Any

from pydantic import TypeAdapter
from sqlalchemy import delete as delete_from
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from pgengine.environments import EnvironmentFacts
from pgengine.errors import SpecError
from pgengine.policies import Policy as EnginePolicy
from pgengine.policies import create_policy, load
from pgengine.spec import LinearPolicySpec, MlpPolicySpec, PolicySpec
from server.checkpoints import store as checkpoints
from server.database import now
from server.environments import store as environments
from server.errors import InUse, NotFound
from server.ids import new_id
from server.pages import PageQuery, Slice, fetch
from server.tables import Environment, Policy

__all__ = ["Policy", "check_fits", "create", "delete", "get", "list_", "spec_of"]

_SPEC: TypeAdapter[LinearPolicySpec | MlpPolicySpec] = TypeAdapter(PolicySpec)


def create(
    session: Session,
    environment: Environment,
    policy_spec: LinearPolicySpec | MlpPolicySpec,
    seed: int,
    name: str | None = None,
    metadata: dict[str, Any] | None = None,
    *,
    max_parameters: int | None = None,
) -> Policy:
    """Draw a policy and keep it as checkpoint 0.

    Args:
        session: A writing transaction.
        environment: What it will act in.
        policy_spec: Network and distribution.
        seed: Initial parameters are drawn from it.
        name: For people.
        metadata: For clients.
        max_parameters: Most numbers in it; None is no bound.

    Raises:
        SpecError: with a pointer from the root of the policy's spec.
    """
    facts = environments.facts_of(environment)
    drawn = create_policy(policy_spec, environments.spec_of(environment), facts, seed=seed)
    _check_size(drawn, max_parameters)
    row = Policy(
        id=new_id("pol"),
        name=name,
        metadata_=metadata or {},
        environment_id=environment.id,
        spec=drawn.spec.model_dump(mode="json"),
        seed=seed,
        updates=0,
        created_at=now(),
    )
    session.add(row)
    session.flush()
    session.refresh(row)
    checkpoints.put(session, row.id, 0, drawn.to_bytes())
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
        InUse: if jobs refer to it.
    """
    row = get(session, policy_id)
    try:
        session.execute(delete_from(Policy).where(Policy.id == row.id))
    except IntegrityError as error:
        raise InUse("Training jobs refer to this policy; delete them first.") from error
    session.expunge(row)


def check_fits(session: Session, row: Policy, facts: EnvironmentFacts) -> None:
    """Whether a policy can act in an environment that may not be its own.

    Raises:
        SpecError: if a space differs.
    """
    latest = checkpoints.latest(session, row.id)
    load(checkpoints.content(session, latest.id)).fits(facts)


def spec_of(row: Policy) -> LinearPolicySpec | MlpPolicySpec:
    """Network and distribution, all defaults written out."""
    return _SPEC.validate_python(row.spec)


def _check_size(drawn: EnginePolicy, max_parameters: int | None) -> None:
    size = sum(array.size for array in drawn.parameters.values())
    if max_parameters is not None and size > max_parameters:
        message = f"Expected at most {max_parameters} parameters (PGENGINE_MAX_POLICY_PARAMETERS); these are {size}."
        raise SpecError("", "policy_too_large", message)
