"""Training jobs over HTTP."""

import csv
import io
import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, cast

from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi import Body as JsonBody
from pydantic import Field
from sqlalchemy.orm import Session

import pgengine
from pgengine.errors import SpecError
from pgengine.exactness import ExactAbsence, unmeasured
from pgengine.footprint import check_footprint
from pgengine.labels import Label
from pgengine.notices import Notice, notices_of
from pgengine.policies import Policy, check_behaviour, load
from pgengine.resolution import fill_in
from pgengine.spec import AlgorithmSpec, PolicyBehaviourSpec, PolicySpec, TrainingSpec
from server.checkpoints import store as checkpoints
from server.checkpoints.routes import checkpoint_page
from server.checkpoints.schemas import Checkpoint
from server.database import Database
from server.environments.routes import Allowed, Known, known, stored
from server.environments.schemas import BANDIT, CARTPOLE, FROZEN_LAKE, LQR
from server.environments.types import AllowList
from server.errors import FieldError, NotFound
from server.idempotency import Reply
from server.ids import JobId, is_id
from server.jobs import history, store, tail
from server.jobs.events import EventPage
from server.jobs.schemas import (
    Metrics,
    Progress,
    QueueReason,
    TrainingJob,
    TrainingJobCreate,
    TrainingJobQuery,
    TrainingJobValidation,
)
from server.jobs.store import TERMINAL_STATUSES
from server.jobs.store import Job as Row
from server.pages import Page, PageQuery
from server.policies import store as policies
from server.request import LARGEST_INTEGER, Configured, Creation, Db, StrictRoute, invalid, negotiated, written
from server.settings import Settings

__all__ = ["named_or_drawn", "router"]

router = APIRouter(prefix="/v1/training-jobs", tags=["training jobs"], route_class=StrictRoute)

Id = Annotated[JobId, Path(description="Id of a training job.")]
JSON, CSV, NDJSON = "application/json", "text/csv", "application/x-ndjson"
LONGEST_CURVE = 10_000

EXAMPLES: dict[str, Any] = {
    "shortest": {"summary": "CartPole, every default", "value": {"environment": CARTPOLE}},
    "whole": {
        "summary": "CartPole, everything said",
        "value": {
            "name": "cartpole",
            "environment": CARTPOLE,
            "policy": {"kind": "mlp", "hidden": [64, 64], "activation": "tanh"},
            "algorithm": {
                "credit": "reward_to_go",
                "gamma": 1.0,
                "mean_over": "trajectories",
                "baseline": {"kind": "leave_one_out"},
                "trajectories": 32,
                "optimizer": {"kind": "adam", "learning_rate": 0.01},
            },
            "stop": {"updates": 200, "target_return": 475},
            "evaluation": {"episodes": 100},
            "seed": 0,
            "metadata": {"course": "rl-101"},
        },
    },
    "tabular": {
        "summary": "REINFORCE on a bandit",
        "value": {"environment": BANDIT, "policy": {"kind": "linear"}, "stop": {"updates": 20}},
    },
    "table": {
        "summary": "A registered id that publishes its table: the exact gradient is shown beside the estimate",
        "value": {
            "environment": FROZEN_LAKE,
            "policy": {"kind": "linear"},
            "algorithm": {
                "gamma": 0.99,
                "baseline": {"kind": "linear_value"},
                "entropy": {"coefficient": 0.01, "as": "bonus"},
                "optimizer": {"kind": "sgd", "learning_rate": 0.1, "schedule": {"kind": "inverse_root"}},
            },
            "stop": {"updates": 100},
        },
    },
    "linear_system": {
        "summary": "A Gaussian policy on a linear system with quadratic costs",
        "value": {
            "environment": LQR,
            "policy": {"kind": "linear", "distribution": {"kind": "gaussian", "sigma": "fixed"}},
            "algorithm": {"baseline": {"kind": "neural_value"}, "optimizer": {"kind": "adam", "learning_rate": 0.05}},
            "stop": {"updates": 100},
        },
    },
    "textbook": {
        "summary": "REINFORCE as it is printed: the parameters move after each step of a single episode",
        "value": {
            "environment": BANDIT,
            "policy": {"kind": "linear", "features": {"kind": "one_hot"}},
            "algorithm": {
                "within_episode": "moving",
                "trajectories": 1,
                "baseline": {"kind": "none"},
                "optimizer": {"kind": "sgd", "learning_rate": 0.1},
            },
            "stop": {"updates": 20},
        },
    },
    "importance": {
        "summary": "Trajectories of an older policy, weighted by their importance",
        "value": {
            "environment": CARTPOLE,
            "algorithm": {
                "importance": {"kind": "per_decision", "behaviour": {"kind": "older", "refresh_every": 4}},
                "trajectories": 32,
            },
            "stop": {"updates": 50},
        },
    },
    "memory": {
        "summary": "A transformer that remembers what it has seen",
        "value": {
            "environment": {"kind": "gymnasium", "id": "pgengine/TMaze-v0"},
            "policy": {"kind": "transformer", "window": 8},
            "stop": {"updates": 50},
        },
    },
}


# --- creating ---------------------------------------------------------------------------------------------------------


@router.post(
    "",
    operation_id="create_training_job",
    summary="Train a policy",
    status_code=201,
    response_model=TrainingJob,
    responses={200: {"model": TrainingJobValidation, "description": "With `validate_only`: what would be created."}},
)
def create_training_job(
    body: Annotated[TrainingJobCreate, JsonBody(openapi_examples=EXAMPLES)],
    database: Db,
    settings: Configured,
    allowed: Allowed,
    creation: Creation,
    validate_only: Annotated[
        bool,
        Query(
            description="Check the body, answer what the job would be. Nothing is written, no Idempotency-Key either."
        ),
    ] = False,
) -> Response:
    """Queues a training job. Environment and policy are created with it where the body describes them."""
    if validate_only:
        return _validated(database, body, _draft(database, body, allowed, settings))
    if (answered := creation.answered(database, _today)) is not None:
        return written(answered)
    draft = _draft(database, body, allowed, settings)
    with database.write() as session:

        def create() -> Reply:
            row = _create(session, body, draft, settings, creation.key_id)
            answer = _bodies(session, [row])[0].model_dump(mode="json")
            return Reply(201, answer, {"location": f"/v1/training-jobs/{row.id}"}, ("label", "algorithm", "metadata"))

        reply = creation.answer(session, create, _today)
    return written(reply)


@dataclass(frozen=True, slots=True)
class _Draft:
    """A job with all that takes time to compute, before anything is written."""

    environment: Known
    policy: policies.Drawn | str
    spec: TrainingSpec
    label: Label
    notices: list[Notice]
    behaviour_id: str | None
    exact_absent: ExactAbsence | None


def _validated(database: Database, body: TrainingJobCreate, draft: _Draft) -> Response:
    policy_id = draft.policy if isinstance(draft.policy, str) else None
    if policy_id is not None:
        with database.read() as session:
            if (job_id := store.at_work(session, policy_id)) is not None:
                raise store.policy_busy(job_id)
    spec = draft.spec
    answer = TrainingJobValidation(
        policy_id=policy_id,
        environment_id=body.environment if isinstance(body.environment, str) else None,
        policy=spec.policy,
        parameters=_parameters(database, draft.policy),
        algorithm=spec.algorithm,
        stop=spec.stop,
        evaluation=spec.evaluation,
        diagnostics_every=spec.diagnostics_every,
        seed=body.seed,
        device=spec.device,
        label=draft.label,
        notices=draft.notices,
        objective=draft.label.objective,
        exact_absent=draft.exact_absent,
    )
    return Response(answer.model_dump_json(), media_type=JSON)


def _parameters(database: Database, policy: policies.Drawn | str) -> int:
    return _loaded(database, policy).size


def _loaded(database: Database, policy: policies.Drawn | str) -> Policy:
    """What would learn, as it is now."""
    if isinstance(policy, policies.Drawn):
        return load(policy.policy_bytes)
    try:
        with database.read() as session:
            return load(checkpoints.content(session, checkpoints.latest(session, policy).id))
    except NotFound as error:
        raise _no_policy(error) from None


def _draft(database: Database, body: TrainingJobCreate, allowed: AllowList, settings: Settings) -> _Draft:
    environment = known(database, body.environment, allowed)
    seed = secrets.randbelow(LARGEST_INTEGER + 1) if body.seed is None else body.seed
    asked, reference = TrainingSpec(environment=environment.spec, algorithm=body.algorithm), body.policy
    if "policy" not in body.model_fields_set:
        asked = fill_in(asked, environment.facts)
        reference = asked.policy
    policy, policy_spec = named_or_drawn(database, reference, environment, seed, settings)
    algorithm, acting = _pinned(database, asked.algorithm, environment)
    spec = pgengine.resolve(
        TrainingSpec(
            environment=environment.spec,
            policy=policy_spec,
            algorithm=algorithm,
            stop=body.stop,
            evaluation=body.evaluation,
            diagnostics_every=body.diagnostics_every,
            seed=seed,
            device=body.device,
        ),
        environment.facts,
        continues=isinstance(policy, str),
    )
    check_footprint(spec, environment.facts, settings.trainer_memory_bytes)
    if acting is not None:
        check_behaviour(spec.algorithm, _loaded(database, policy), acting.policy)
    return _Draft(
        environment=environment,
        policy=policy,
        spec=spec,
        label=pgengine.label(spec, environment.facts),
        notices=notices_of(environment.facts, spec.policy),
        behaviour_id=None if acting is None else acting.checkpoint_id,
        exact_absent=unmeasured(environment.facts, spec.policy, spec.diagnostics_every),
    )


BEHAVIOUR = "/algorithm/importance/behaviour/id"


@dataclass(frozen=True, slots=True)
class _Acting:
    """The other policy that acts, exactly as it will."""

    checkpoint_id: str
    policy: Policy


def _pinned(database: Database, algorithm: AlgorithmSpec, environment: Known) -> tuple[AlgorithmSpec, _Acting | None]:
    """The algorithm with the checkpoint of the other policy that acts in the place of its name, and that policy."""
    behaviour = algorithm.importance.behaviour
    if not isinstance(behaviour, PolicyBehaviourSpec):
        return algorithm, None
    named = behaviour.id
    if named is None:
        raise invalid(BEHAVIOUR, "missing", "Expected the id of the policy, or of its checkpoint, that acts.")
    if not is_id("pol", named) and not is_id("ckpt", named):
        raise invalid(BEHAVIOUR, "malformed_id", "Expected an id: pol_ or ckpt_, and 32 hexadecimal digits.")
    try:
        with database.read() as session:
            row = checkpoints.latest(session, named) if is_id("pol", named) else checkpoints.get(session, named)
            data = checkpoints.content(session, row.id)
        policy = load(data)
        policy.fits(environment.facts)
    except NotFound as error:
        raise _no_behaviour(error) from None
    except SpecError as error:
        raise error.under(BEHAVIOUR) from None
    pinned = behaviour.model_copy(update={"id": row.id})
    importance = algorithm.importance.model_copy(update={"behaviour": pinned})
    return algorithm.model_copy(update={"importance": importance}), _Acting(row.id, policy)


def named_or_drawn(
    database: Database, reference: str | PolicySpec, environment: Known, seed: int, settings: Settings
) -> tuple[policies.Drawn | str, PolicySpec]:
    """The policy that a body names, or a new one as it describes, under `policy`; and its spec.

    Raises:
        NotFound: if there is none with the id that it names.
        SpecError: if it cannot act in the environment, or cannot be made.
    """
    try:
        if not isinstance(reference, str):
            maximum = settings.max_policy_parameters
            drawn = policies.draw(reference, environment.spec, environment.facts, seed, max_parameters=maximum)
            return drawn, drawn.spec
        with database.read() as session:
            row = policies.get(session, reference)
            policies.check_fits(session, row.id, environment.facts)
        return row.id, policies.spec_of(row)
    except SpecError as error:
        raise error.under("/policy") from None
    except NotFound as error:
        raise _no_policy(error) from None


def _today(session: Session, job_id: str) -> dict[str, Any]:
    return _bodies(session, [store.get(session, job_id, "training")])[0].model_dump(mode="json")


def _create(session: Session, body: TrainingJobCreate, draft: _Draft, settings: Settings, key_id: str) -> Row:
    """The job, with its environment and its policy where they are new. Nothing here takes time."""
    environment_id = stored(session, draft.environment)
    if draft.behaviour_id is not None:
        try:
            checkpoints.get(session, draft.behaviour_id, hold=True)
        except NotFound as error:
            raise _no_behaviour(error) from None
    policy_id, start_updates = draft.policy, 0
    if isinstance(policy_id, policies.Drawn):
        policy_id = policies.create(session, environment_id, policy_id, body.name).id
    else:
        try:
            start_updates = checkpoints.latest(session, policy_id).updates
        except NotFound as error:
            raise _no_policy(error) from None
    return store.create(
        session,
        policy_id=policy_id,
        environment_id=environment_id,
        start_updates=start_updates,
        spec=draft.spec.model_dump(mode="json", exclude={"environment"}),
        label=draft.label.model_dump(mode="json"),
        max_attempts=settings.max_attempts,
        key_id=key_id,
        most_open=settings.max_open_jobs,
        name=body.name,
        metadata=dict(body.metadata),
        checkpoint_id=draft.behaviour_id,
        notices=[notice.model_dump(mode="json") for notice in draft.notices],
        exact_absent=None if draft.exact_absent is None else draft.exact_absent.model_dump(mode="json"),
    )


def _no_behaviour(error: NotFound) -> NotFound:
    return NotFound(error.message, errors=[FieldError(BEHAVIOUR, "not_found", error.message)])


def _no_policy(error: NotFound) -> NotFound:
    return NotFound(error.message, errors=[FieldError("/policy", "not_found", error.message)])


# --- reading ----------------------------------------------------------------------------------------------------------


@router.get("", operation_id="list_training_jobs", summary="List training jobs")
def list_training_jobs(query: Annotated[TrainingJobQuery, Query()], database: Db) -> Page[TrainingJob]:
    """Training jobs, newest first."""
    with database.read() as session:
        page = store.list_(session, query, statuses=query.status, policy_id=query.policy_id)
        data = _bodies(session, page.rows)
    return Page(data=data, has_more=page.has_more, next_cursor=page.next_cursor)


@router.get("/{job_id}", operation_id="get_training_job", summary="Get a training job")
def get_training_job(job_id: Id, database: Db) -> TrainingJob:
    """The job with its state, its progress, and its result at the end."""
    with database.read() as session:
        return _bodies(session, [store.get(session, job_id, "training")])[0]


@router.post("/{job_id}/cancel", operation_id="cancel_training_job", summary="Cancel a training job")
def cancel_training_job(job_id: Id, database: Db) -> TrainingJob:
    """Ends a queued job at once and a running one at its next update; its checkpoints stay. Repeatable."""
    with database.write() as session:
        return _bodies(session, [store.request_cancel(session, job_id, "training")])[0]


@router.delete("/{job_id}", operation_id="delete_training_job", summary="Delete a training job", status_code=204)
def delete_training_job(job_id: Id, database: Db) -> None:
    """Removes an ended job with its events and metrics. Policy and checkpoints stay."""
    with database.write() as session:
        store.delete(session, job_id, "training")


@router.get(
    "/{job_id}/checkpoints", operation_id="list_training_job_checkpoints", summary="List a training job's checkpoints"
)
def list_training_job_checkpoints(job_id: Id, query: Annotated[PageQuery, Query()], database: Db) -> Page[Checkpoint]:
    """The checkpoints that the job has made, newest first."""
    with database.read() as session:
        store.get(session, job_id, "training")
        return checkpoint_page(checkpoints.list_(session, query, job_id=job_id))


@router.get(
    "/{job_id}/events",
    operation_id="list_training_job_events",
    summary="Read or follow a training job's events",
    response_model=EventPage,
    openapi_extra=tail.OPENAPI,
)
def list_training_job_events(
    request: Request,
    job_id: Id,
    database: Db,
    after: tail.After = None,
    last_event_id: tail.LastEventId = None,
    limit: tail.PageSize = 100,
    follow: tail.Follow = True,
) -> Response:
    """Oldest first: a JSON page, or Server-Sent Events where Accept asks for `text/event-stream`.

    A stream replays what follows `Last-Event-ID`, `lastEventId` or `after`, goes on with what happens, and ends behind
    the terminal event; who has seen that one is answered 204, so that a browser does not connect again.
    """
    follower = cast(tail.Tail, request.app.state.tail)
    return tail.events_response(
        request,
        database,
        follower,
        job_id,
        after=after,
        seen=last_event_id,
        limit=limit,
        follow=follow,
        kind="training",
    )


# --- metrics ----------------------------------------------------------------------------------------------------------


@router.get(
    "/{job_id}/metrics",
    operation_id="get_training_job_metrics",
    summary="Get a training job's metrics",
    response_model=Metrics,
    responses={
        200: {
            "content": {
                CSV: {"schema": {"type": "string"}},
                NDJSON: {"schema": {"type": "string"}},
            }
        }
    },
)
def get_training_job_metrics(
    job_id: Id,
    database: Db,
    keys: Annotated[
        list[Annotated[str, Field(max_length=64)]] | None,
        Query(
            max_length=200,
            description="Names of metrics, repeated or separated by commas; all of them if left out. update, env_steps "
            "and attempt stand in every row and need no name.",
            examples=[["mean_return", "entropy"]],
        ),
    ] = None,
    from_update: Annotated[int, Query(ge=0, le=LARGEST_INTEGER, description="First update.")] = 0,
    max_points: Annotated[
        int,
        Query(
            ge=2,
            le=LONGEST_CURVE,
            description="Most rows. Minima and maxima survive the down-sampling where there is room for them, which "
            "is from 2 rows for each metric and 2 more; below, rows at even distances stay.",
        ),
    ] = 1000,
    accept: Annotated[str, Header(include_in_schema=False)] = "*/*",
) -> Response:
    """Metrics of the job's updates: in columns as JSON, or in rows as CSV or NDJSON, as Accept asks."""
    media_type = negotiated(accept, (JSON, CSV, NDJSON))
    names = None if keys is None else [name for name in keys if name]
    with database.read() as session:
        row = store.get(session, job_id, "training")
        known = history.names(session, job_id)
        if not set(names or ()) <= set(known):
            raise invalid("/keys", "unknown_metric", f"Expected names of metrics: {', '.join(known)}.")
        curves = history.metrics(session, job_id, names, from_update, max_points)
    if media_type == CSV:
        return Response(_csv(curves), media_type=CSV)
    if media_type == NDJSON:
        return Response(_ndjson(curves), media_type=NDJSON)
    metrics = Metrics(
        job_id=job_id,
        keys=list(curves.values),
        update=curves.updates,
        env_steps=curves.env_steps,
        attempt=curves.attempts,
        values=curves.values,
        nonfinite=curves.nonfinite,
        recorded=curves.recorded,
        exact_absent=cast(Any, row.exact_absent),
    )
    return Response(metrics.model_dump_json(), media_type=JSON)


def _rows(curves: history.Curves) -> Iterator[list[Any]]:
    columns = [curves.updates, curves.env_steps, curves.attempts, *curves.values.values()]
    yield from (list(row) for row in zip(*columns, strict=True))


def _csv(curves: history.Curves) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow([*history.IN_EVERY_ROW, *curves.values])
    writer.writerows(_rows(curves))
    return text.getvalue()


def _ndjson(curves: history.Curves) -> str:
    names = [*history.IN_EVERY_ROW, *curves.values]
    infinite = {name: set(updates) for name, updates in curves.nonfinite.items()}
    lines = []
    for row in _rows(curves):
        nonfinite = [name for name, updates in infinite.items() if row[0] in updates]
        lines.append(json.dumps(dict(zip(names, row, strict=True)) | {"nonfinite": nonfinite}))
    return "".join(f"{line}\n" for line in lines)


# --- publishing -------------------------------------------------------------------------------------------------------


def _bodies(session: Session, rows: Sequence[Row]) -> list[TrainingJob]:
    """Stored jobs as they are published."""
    reasons = store.queue_reasons(session, rows)
    return [_body(row, reasons.get(row.id)) for row in rows]


def _body(row: Row, reason: store.QueueReason | None) -> TrainingJob:
    return TrainingJob(
        id=row.id,
        name=row.name,
        status=cast(Any, row.status),
        is_terminal=row.status in TERMINAL_STATUSES,
        policy_id=cast(str, row.policy_id),
        environment_id=row.environment_id,
        attempt=row.attempt,
        label=cast(Any, row.label),
        notices=cast(Any, row.notices or []),
        exact_absent=cast(Any, row.exact_absent),
        diagnostics_every=row.spec.get("diagnostics_every", 0),
        **{name: row.spec[name] for name in ("algorithm", "stop", "evaluation", "seed", "device")},
        progress=Progress(updates=row.updates, env_steps=row.env_steps, episodes=row.episodes, fraction=row.fraction),
        failure=cast(Any, row.failure),
        result=cast(Any, row.result),
        queue_position=None if reason is None else reason.ahead,
        queue_reason=None if reason is None else QueueReason(code=reason.code, message=reason.message),
        metadata=row.metadata_,
        created_at=row.created_at,
        queued_at=row.queued_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
    )
