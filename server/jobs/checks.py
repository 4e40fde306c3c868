"""Gradient checks over HTTP: jobs of another kind, in the same queue and with the same verbs."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, cast

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi import Body as JsonBody
from sqlalchemy.orm import Session

from pgengine.checking import check_settings
from pgengine.footprint import check_footprint
from pgengine.spec import GradientCheckSpec, PolicyBehaviourSpec, PolicySpec
from server.checkpoints import store as checkpoints
from server.database import Database
from server.environments.routes import Allowed, Known, known, stored
from server.environments.schemas import BANDIT, FROZEN_LAKE, LQR
from server.environments.types import AllowList
from server.errors import FieldError, NotFound
from server.idempotency import Reply
from server.ids import JobId
from server.jobs import store, tail
from server.jobs.engine import Engine, EngineFailed, while_connected
from server.jobs.events import EventPage
from server.jobs.reports import JobKind
from server.jobs.routes import named_or_drawn
from server.jobs.schemas import CheckProgress, GradientCheckCreate, GradientCheckJob, GradientCheckQuery, QueueReason
from server.jobs.store import TERMINAL_STATUSES
from server.jobs.store import Job as Row
from server.keys.store import Identity
from server.pages import Page
from server.request import LARGEST_INTEGER, Configured, Creation, Db, StrictRoute, Threads, invalid, written
from server.settings import Settings

__all__ = ["router"]

router = APIRouter(prefix="/v1/gradient-checks", tags=["gradient checks"], route_class=StrictRoute)

Id = Annotated[JobId, Path(description="Id of a gradient check.")]
KIND: JobKind = "gradient_check"

EXAMPLES: dict[str, Any] = {
    "shortest": {"summary": "The default estimator on a bandit", "value": {"environment": BANDIT}},
    "enumerated": {
        "summary": "Every batch of a bandit, weighed by its probability",
        "value": {
            "environment": BANDIT,
            "estimators": [
                {"trajectories": 2, "baseline": {"kind": "none"}},
                {"trajectories": 2, "baseline": {"kind": "batch_mean"}},
            ],
            "mode": "enumerate",
        },
    },
    "compared": {
        "summary": "With and without gamma to the power of t",
        "value": {
            "environment": FROZEN_LAKE,
            "policy": {"kind": "linear"},
            "estimators": [{"gamma": 0.9}, {"gamma": 0.9, "discount_weight": "none"}],
            "batches": 200,
            "seed": 1,
        },
    },
    "linear_system": {
        "summary": "A Gaussian policy on a linear system",
        "value": {
            "environment": LQR | {"horizon": 5},
            "policy": {"kind": "linear", "distribution": {"kind": "gaussian", "sigma": "fixed"}},
            "batches": 200,
            "seed": 1,
        },
    },
}


# --- creating ---------------------------------------------------------------------------------------------------------


@router.post(
    "",
    operation_id="create_gradient_check",
    summary="Check estimators against the exact gradient",
    status_code=201,
    response_model=GradientCheckJob,
)
async def create_gradient_check(
    request: Request,
    body: Annotated[GradientCheckCreate, JsonBody(openapi_examples=EXAMPLES)],
    database: Db,
    settings: Configured,
    allowed: Allowed,
    creation: Creation,
    threads: Threads,
) -> Response:
    """Queues a gradient check. What has no exact gradient is refused here, before it is queued."""
    answered = await threads.reading.run(creation.answered, database, _today)
    if answered is not None:
        return written(answered)
    draft = await threads.reading.run(_draft, database, body, allowed, settings)
    engine = cast(Engine, request.app.state.engine)
    try:
        caller = cast(Identity, request.state.identity).key_id
        question = engine.ask("check", {"spec": draft.spec}, caller=caller, policy=draft.policy_bytes)
        looked_at = await while_connected(request, question)
    except EngineFailed as error:
        raise invalid("/environment", "cannot_be_checked", f"The engine could not look at it: {error}.") from None
    content = {name: value for name, value in draft.spec.items() if name != "environment"}
    content |= {"estimators": looked_at["estimators"], "checkpoint_id": draft.checkpoint_id}

    def write() -> Reply:
        with database.write() as session:
            return creation.answer(
                session,
                lambda: _created(session, body, draft, content, looked_at, settings, creation.key_id),
                _today,
            )

    return written(await threads.writing.run(write))


@dataclass(frozen=True, slots=True)
class _Draft:
    """A check with all that takes time to find out, before anything is written."""

    environment: Known
    policy_id: str | None
    checkpoint_id: str | None
    policy_bytes: bytes | None
    spec: dict[str, Any]


def _draft(database: Database, body: GradientCheckCreate, allowed: AllowList, settings: Settings) -> _Draft:
    for index, estimator in enumerate(body.estimators):
        if isinstance(estimator.importance.behaviour, PolicyBehaviourSpec):
            message = "A gradient check has no other policy; take the behaviour mixture, or train with it."
            raise invalid(f"/estimators/{index}/importance/behaviour/kind", "behaviour_not_checked", message)
    environment = known(database, body.environment, allowed)
    seed = secrets.randbelow(LARGEST_INTEGER + 1) if body.seed is None else body.seed
    policy, policy_spec = named_or_drawn(database, body.policy, environment, seed, settings)
    checkpoint_id, policy_bytes = None, None
    if isinstance(policy, str):
        with database.read() as session:
            checkpoint_id = checkpoints.latest(session, policy).id
            policy_bytes = checkpoints.content(session, checkpoint_id)
    spec = GradientCheckSpec(
        environment=environment.spec,
        policy=policy_spec,
        estimators=body.estimators,
        mode=body.mode,
        batches=body.batches,
        false_alarm=body.false_alarm,
        values=body.values,
        seed=seed,
    )
    # what can be told without torch is told at once; the rest takes a program that loads it
    check_settings(spec, environment.facts)
    check_footprint(spec, environment.facts, settings.trainer_memory_bytes)
    policy_id = policy if isinstance(policy, str) else None
    return _Draft(environment, policy_id, checkpoint_id, policy_bytes, spec.model_dump(mode="json"))


def _created(
    session: Session,
    body: GradientCheckCreate,
    draft: _Draft,
    content: dict[str, Any],
    looked_at: dict[str, Any],
    settings: Settings,
    key_id: str,
) -> Reply:
    environment_id = stored(session, draft.environment)
    if draft.checkpoint_id is not None:
        try:
            checkpoints.get(session, draft.checkpoint_id, hold=True)
        except NotFound:
            message = "The policy was deleted, or its latest checkpoint replaced, at this moment."
            raise NotFound(message, errors=[FieldError("/policy", "not_found", message)]) from None
    row = store.create(
        session,
        kind=KIND,
        policy_id=draft.policy_id,
        environment_id=environment_id,
        checkpoint_id=draft.checkpoint_id,
        start_updates=0,
        spec=content,
        label={"estimators": looked_at["labels"]},
        max_attempts=settings.max_attempts,
        key_id=key_id,
        most_open=settings.max_open_jobs,
        name=body.name,
        metadata=dict(body.metadata),
    )
    answer = _bodies(session, [row])[0].model_dump(mode="json")
    lasting = ("policy", "estimators", "labels", "metadata")
    return Reply(201, answer, {"location": f"/v1/gradient-checks/{row.id}"}, lasting)


def _today(session: Session, check_id: str) -> dict[str, Any]:
    return _bodies(session, [store.get(session, check_id, KIND)])[0].model_dump(mode="json")


# --- reading ----------------------------------------------------------------------------------------------------------


@router.get("", operation_id="list_gradient_checks", summary="List gradient checks")
def list_gradient_checks(query: Annotated[GradientCheckQuery, Query()], database: Db) -> Page[GradientCheckJob]:
    """Gradient checks, newest first; their results without what is as long as the policy is large."""
    with database.read() as session:
        page = store.list_(session, query, statuses=query.status, policy_id=query.policy_id, kind=KIND)
        data = _bodies(session, page.rows, arrays=False)
    return Page(data=data, has_more=page.has_more, next_cursor=page.next_cursor)


@router.get("/{check_id}", operation_id="get_gradient_check", summary="Get a gradient check")
def get_gradient_check(check_id: Id, database: Db) -> GradientCheckJob:
    """The check with its state, its progress, and its result at the end."""
    with database.read() as session:
        return _bodies(session, [store.get(session, check_id, KIND)])[0]


@router.post("/{check_id}/cancel", operation_id="cancel_gradient_check", summary="Cancel a gradient check")
def cancel_gradient_check(check_id: Id, database: Db) -> GradientCheckJob:
    """Ends a queued check at once and a running one at its next step. Repeatable."""
    with database.write() as session:
        return _bodies(session, [store.request_cancel(session, check_id, KIND)])[0]


@router.delete("/{check_id}", operation_id="delete_gradient_check", summary="Delete a gradient check", status_code=204)
def delete_gradient_check(check_id: Id, database: Db) -> None:
    """Removes an ended check with its events. The policy stays."""
    with database.write() as session:
        store.delete(session, check_id, KIND)


@router.get(
    "/{check_id}/events",
    operation_id="list_gradient_check_events",
    summary="Read or follow a gradient check's events",
    response_model=EventPage,
    openapi_extra=tail.OPENAPI,
)
def list_gradient_check_events(
    request: Request,
    check_id: Id,
    database: Db,
    after: tail.After = None,
    last_event_id: tail.LastEventId = None,
    limit: tail.PageSize = 100,
    follow: tail.Follow = True,
) -> Response:
    """Oldest first: a JSON page, or Server-Sent Events where Accept asks for `text/event-stream`."""
    follower = cast(tail.Tail, request.app.state.tail)
    return tail.events_response(
        request, database, follower, check_id, after=after, seen=last_event_id, limit=limit, follow=follow, kind=KIND
    )


# --- publishing -------------------------------------------------------------------------------------------------------


def _bodies(session: Session, rows: Sequence[Row], *, arrays: bool = True) -> list[GradientCheckJob]:
    """Stored checks as they are published, with or without what is as long as the policy is large."""
    reasons = store.queue_reasons(session, rows)
    return [_body(row, reasons.get(row.id), arrays=arrays) for row in rows]


def _body(row: Row, reason: store.QueueReason | None, *, arrays: bool) -> GradientCheckJob:
    policy = row.spec["policy"]
    if not arrays:
        policy = store.without_feature_arrays(policy) | {"initial_parameters": None}
    return GradientCheckJob(
        id=row.id,
        name=row.name,
        status=cast(Any, row.status),
        is_terminal=row.status in TERMINAL_STATUSES,
        environment_id=row.environment_id,
        policy_id=row.policy_id,
        checkpoint_id=row.spec["checkpoint_id"],
        attempt=row.attempt,
        policy=cast(PolicySpec, policy),
        labels=row.label["estimators"],
        **{name: row.spec[name] for name in ("estimators", "mode", "batches", "false_alarm", "values", "seed")},
        progress=CheckProgress(fraction=row.fraction),
        failure=cast(Any, row.failure),
        result=cast(Any, row.result if arrays else store.without_arrays(row.result)),
        queue_position=None if reason is None else reason.ahead,
        queue_reason=None if reason is None else QueueReason(code=reason.code, message=reason.message),
        metadata=row.metadata_,
        created_at=row.created_at,
        queued_at=row.queued_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
    )
