"""Environment types and environments over HTTP."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Body, Depends, Path, Query, Request, Response
from pydantic import TypeAdapter
from sqlalchemy.orm import Session

from pgengine.environments import EnvironmentFacts
from pgengine.errors import SpecError
from pgengine.notices import notices_of
from pgengine.spaces import action_schema, observation_schema
from pgengine.spec import EnvironmentSpec, LqrSpec, TabularSpec
from server.database import Database
from server.environments import store
from server.environments.schemas import (
    BANDIT,
    CARTPOLE,
    FROZEN_LAKE,
    LQR,
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

__all__ = ["Allowed", "Known", "known", "router", "stored"]

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
    return Page(data=[*types, _own_type("tabular"), _own_type("lqr")], has_more=False, next_cursor=None)


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
                "table": {"summary": "A registered id that publishes its table", "value": FROZEN_LAKE},
                "tabular": {"summary": "A finite MDP", "value": BANDIT},
                "lqr": {"summary": "A linear system with quadratic costs", "value": LQR},
            }
        ),
    ],
    database: Db,
    allowed: Allowed,
    creation: Creation,
) -> Response:
    """Stores an environment, so that policies can be made for it. Training jobs can do this by themselves."""
    if (answered := creation.answered(database, _today)) is not None:
        return written(answered)
    with database.read() as session:
        described = store.described(session, body.root, allowed=allowed)
    spec = body.root.model_dump(mode="json")
    with database.write() as session:

        def create() -> Reply:
            row, is_new = store.ensure(session, described)
            published = _environment_body(row, described.spec).model_dump(mode="json", exclude={"spec"})
            answer = {"object": published["object"], "id": row.id, "spec": spec} | published
            lasting = tuple(name for name in answer if name != "id")
            return Reply(201 if is_new else 200, answer, {"location": f"/v1/environments/{row.id}"}, lasting)

        reply = creation.answer(session, create, _today)
    return written(reply)


@router.get("/environments", operation_id="list_environments", summary="List environments")
def list_environments(query: Annotated[PageQuery, Query()], database: Db) -> Page[EnvironmentSummary]:
    """Environments, newest first."""
    with database.read() as session:
        page = store.list_(session, query)
        gymnasium_ids = store.gymnasium_ids(session, page.rows)
    data = [_summary(row, gymnasium_ids.get(row.id)) for row in page.rows]
    return Page(data=data, has_more=page.has_more, next_cursor=page.next_cursor)


@router.get("/environments/{environment_id}", operation_id="get_environment", summary="Get an environment")
def get_environment(environment_id: Id, database: Db) -> Environment:
    """The environment with its spaces and its episode limit."""
    with database.read() as session:
        row = store.get(session, environment_id)
        spec = store.spec_of(row)
    return _environment_body(row, spec)


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


def _today(session: Session, environment_id: str) -> dict[str, Any]:
    row = store.get(session, environment_id)
    return _environment_body(row, store.spec_of(row)).model_dump(mode="json")


def _environment_body(row: Row, spec: EnvironmentSpec) -> Environment:
    """A stored environment as it is published."""
    facts = store.facts_of(row)
    return Environment(id=row.id, spec=spec, created_at=row.created_at, **_published(facts))


@dataclass(frozen=True, slots=True)
class Known:
    """An environment that a body names or describes, as it is known before anything is written.

    Attributes:
        spec: What it is made from.
        facts: What is known of it.
        reference: Its id, or what to store where the body describes it.
    """

    spec: EnvironmentSpec = field(repr=False)
    facts: EnvironmentFacts = field(repr=False)
    reference: str | store.Described


def known(database: Database, reference: str | EnvironmentSpec, allowed: AllowList) -> Known:
    """The environment that a body names or describes under `environment`.

    Raises:
        NotFound: if there is none with the id that it names.
        SpecError: if it cannot be made.
    """
    with database.read() as session:
        if isinstance(reference, str):
            row = _named(session, reference)
            return Known(store.spec_of(row), store.current_facts_of(row), reference)
        try:
            described = store.described(session, reference, allowed=allowed)
        except SpecError as error:
            raise error.under("/environment") from None
    return Known(reference, described.facts, described)


def stored(session: Session, environment: Known) -> str:
    """The id of the environment, which is stored if it is new.

    Args:
        session: A writing transaction.
        environment: The environment.

    Raises:
        NotFound: if the one that the body names has been deleted meanwhile.
    """
    if isinstance(environment.reference, str):
        return _named(session, environment.reference).id
    return store.ensure(session, environment.reference)[0].id


def _named(session: Session, environment_id: str) -> Row:
    try:
        return store.get(session, environment_id)
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
        "return_range": facts.return_range,
        "exact": facts.exact,
        "state_names": facts.state_names,
        "action_names": facts.action_names,
        "repeatable": facts.repeatable,
        "notices": notices_of(facts),
    }


def _summary(row: Row, gymnasium_id: str | None) -> EnvironmentSummary:
    return EnvironmentSummary(
        id=row.id,
        kind=store.kind_of(row),
        gymnasium_id=gymnasium_id,
        max_episode_steps=row.facts["max_episode_steps"],
        created_at=row.created_at,
    )


def _type_body(one: GymnasiumType) -> EnvironmentType:
    return EnvironmentType(
        kind="gymnasium",
        id=one.id,
        available=one.facts is not None,
        hint=one.hint,
        observation_space=None if one.facts is None else one.facts.observation_space,
        action_space=None if one.facts is None else one.facts.action_space,
        max_episode_steps=one.max_episode_steps,
        reward_threshold=None if one.facts is None else one.facts.reward_threshold,
        arguments=one.arguments,
    )


_OWN: dict[Literal["tabular", "lqr"], Any] = {"tabular": TabularSpec, "lqr": LqrSpec}


def _own_type(kind: Literal["tabular", "lqr"]) -> EnvironmentType:
    return EnvironmentType(
        kind=kind,
        id=None,
        available=True,
        hint=None,
        observation_space=None,
        action_space=None,
        max_episode_steps=None,
        reward_threshold=None,
        arguments=TypeAdapter(_OWN[kind]).json_schema(),
    )
