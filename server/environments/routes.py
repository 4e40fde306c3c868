"""Environment types and environments over HTTP."""

from typing import Annotated, Any, cast

from fastapi import APIRouter, Body, Depends, Path, Query, Request, Response
from pydantic import TypeAdapter
from sqlalchemy.orm import Session

from pgengine.environments import EnvironmentFacts
from pgengine.errors import SpecError
from pgengine.spaces import action_schema, observation_schema
from pgengine.spec import GymnasiumSpec, TabularSpec
from server.environments import store
from server.environments.schemas import (
    BANDIT,
    CARTPOLE,
    Environment,
    EnvironmentCreate,
    EnvironmentSummary,
    EnvironmentType,
)
from server.environments.store import Environment as Row
from server.environments.types import AllowList, GymnasiumType
from server.errors import FieldError, NotFound
from server.idempotency import Reply
from server.ids import EnvironmentId
from server.pages import Page, PageQuery
from server.request import Creation, Db, StrictRoute, written

__all__ = ["Allowed", "facts_of_inline", "referred", "router"]

router = APIRouter(prefix="/v1", tags=["environments"], route_class=StrictRoute)


async def _allowed(request: Request) -> AllowList:
    return cast(AllowList, request.app.state.environments)


Allowed = Annotated[AllowList, Depends(_allowed)]
"""Which environments may be used here."""
Id = Annotated[EnvironmentId, Path(description="Id of an environment.")]


@router.get(
    "/environment-types", operation_id="list_environment_types", summary="List the environments that may be used"
)
def list_environment_types(allowed: Allowed) -> Page[EnvironmentType]:
    """The registered ids and the other kinds that this server makes, with spaces and arguments."""
    types = [_type_body(one) for one in allowed.types()]
    return Page(data=[*types, _tabular_type()], has_more=False, next_cursor=None)


@router.post(
    "/environments",
    operation_id="create_environment",
    summary="Create an environment",
    status_code=201,
    response_model=Environment,
    responses={200: {"model": Environment, "description": "It existed already: identical ones are one object."}},
)
def create_environment(
    body: Annotated[
        EnvironmentCreate,
        Body(
            openapi_examples={
                "gymnasium": {"summary": "A registered id", "value": CARTPOLE},
                "tabular": {"summary": "A finite MDP", "value": BANDIT},
            }
        ),
    ],
    database: Db,
    allowed: Allowed,
    creation: Creation,
) -> Response:
    """Stores an environment, so that policies can be made for it. Training jobs can do this by themselves."""
    with database.read() as session:
        facts = store.facts(session, body.root, allowed=allowed)
    with database.write() as session:

        def create() -> Reply:
            known = store.find(session, body.root) is not None
            row = store.ensure(session, body.root, allowed=allowed, facts=facts)
            answer = _environment_body(row).model_dump(mode="json")
            return Reply(200 if known else 201, answer, {"location": f"/v1/environments/{row.id}"})

        reply = creation.answer(session, create)
    return written(reply)


@router.get("/environments", operation_id="list_environments", summary="List environments")
def list_environments(query: Annotated[PageQuery, Query()], database: Db) -> Page[EnvironmentSummary]:
    """Environments, newest first."""
    with database.read() as session:
        page = store.list_(session, query)
    data = [_summary(row) for row in page.rows]
    return Page(data=data, has_more=page.has_more, next_cursor=page.next_cursor)


@router.get("/environments/{environment_id}", operation_id="get_environment", summary="Get an environment")
def get_environment(environment_id: Id, database: Db) -> Environment:
    """The environment with its spaces and its episode limit."""
    with database.read() as session:
        row = store.get(session, environment_id)
    return _environment_body(row)


@router.delete(
    "/environments/{environment_id}",
    operation_id="delete_environment",
    summary="Delete an environment",
    status_code=204,
)
def delete_environment(environment_id: Id, database: Db) -> None:
    """Removes an environment that no policy and no job refers to."""
    with database.write() as session:
        store.delete(session, environment_id)


def _environment_body(row: Row) -> Environment:
    """A stored environment as it is published."""
    facts = store.facts_of(row)
    return Environment(id=row.id, spec=store.spec_of(row), created_at=row.created_at, **_published(facts))


def facts_of_inline(
    session: Session, reference: str | GymnasiumSpec | TabularSpec, allowed: AllowList
) -> EnvironmentFacts | None:
    """What is known of an environment that a body describes; None if the body names one that exists."""
    if isinstance(reference, str):
        return None
    try:
        return store.facts(session, reference, allowed=allowed)
    except SpecError as error:
        raise error.under("/environment") from None


def referred(
    session: Session,
    reference: str | GymnasiumSpec | TabularSpec,
    allowed: AllowList,
    facts: EnvironmentFacts | None,
) -> Row:
    """The environment that a body names or describes.

    Raises:
        NotFound: if there is none with the id that it names.
    """
    if not isinstance(reference, str):
        return store.ensure(session, reference, allowed=allowed, facts=facts)
    try:
        return store.get(session, reference)
    except NotFound as error:
        raise NotFound(error.message, errors=[FieldError("/environment", "not_found", error.message)]) from None


def _published(facts: EnvironmentFacts) -> dict[str, Any]:
    return {
        "observation_space": facts.observation_space,
        "action_space": facts.action_space,
        "observation_schema": observation_schema(facts.observation_space),
        "action_schema": action_schema(facts.action_space),
        "max_episode_steps": facts.max_episode_steps,
        "limit_from": facts.limit_from,
        "episode_length": facts.episode_length,
        "reward_threshold": facts.reward_threshold,
    }


def _summary(row: Row) -> EnvironmentSummary:
    return EnvironmentSummary(
        id=row.id,
        kind=row.spec["kind"],
        gymnasium_id=row.spec.get("id"),
        max_episode_steps=row.facts["max_episode_steps"],
        created_at=row.created_at,
    )


def _type_body(one: GymnasiumType) -> EnvironmentType:
    return EnvironmentType(
        kind="gymnasium",
        id=one.id,
        observation_space=one.facts.observation_space,
        action_space=one.facts.action_space,
        max_episode_steps=one.max_episode_steps,
        reward_threshold=one.facts.reward_threshold,
        arguments=one.arguments,
    )


def _tabular_type() -> EnvironmentType:
    return EnvironmentType(
        kind="tabular",
        id=None,
        observation_space=None,
        action_space=None,
        max_episode_steps=None,
        reward_threshold=None,
        arguments=TypeAdapter(TabularSpec).json_schema(),
    )
