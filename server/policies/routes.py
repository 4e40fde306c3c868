"""Policies over HTTP; asking them for actions is in `act`."""

import secrets
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Response
from fastapi import Body as JsonBody
from sqlalchemy.orm import Session

from pgengine.errors import SpecError
from pgengine.notices import notices_of
from pgengine.policies import load
from pgengine.spaces import action_schema, observation_schema
from pgengine.spec import TransformerPolicySpec
from server.checkpoints import store as checkpoints
from server.checkpoints.routes import checkpoint_page
from server.checkpoints.schemas import Checkpoint
from server.environments import store as environments
from server.environments.routes import Allowed, known, stored
from server.environments.schemas import BANDIT, CARTPOLE, FROZEN_LAKE
from server.idempotency import Reply
from server.ids import CheckpointId, PolicyId
from server.pages import Page, PageQuery
from server.policies import store
from server.policies.schemas import CheckpointParameters, Policy, PolicyCreate, PolicySummary
from server.policies.store import Policy as Row
from server.request import LARGEST_INTEGER, Configured, Creation, Db, StrictRoute, invalid, written

__all__ = ["router"]

router = APIRouter(prefix="/v1", tags=["policies"], route_class=StrictRoute)

Id = Annotated[PolicyId, Path(description="Id of a policy.")]


@router.post(
    "/policies", operation_id="create_policy", summary="Create a policy", status_code=201, response_model=Policy
)
def create_policy(
    body: Annotated[
        PolicyCreate,
        JsonBody(
            openapi_examples={
                "default": {"summary": "The default network", "value": {"environment": CARTPOLE}},
                "mlp": {
                    "summary": "A network of one's own",
                    "value": {
                        "environment": CARTPOLE,
                        "policy": {"kind": "mlp", "hidden": [32], "activation": "relu"},
                        "seed": 7,
                        "name": "small",
                    },
                },
                "features": {
                    "summary": "Linear in features of one's choice, from given parameters",
                    "value": {
                        "environment": BANDIT,
                        "policy": {
                            "kind": "linear",
                            "features": {"kind": "table", "values": [[[1.0], [-1.0]], [[0.0], [0.0]]]},
                            "initial_parameters": {"theta": [0.5]},
                        },
                    },
                },
                "score": {
                    "summary": "A network that scores pairs of state and action",
                    "value": {"environment": FROZEN_LAKE, "policy": {"kind": "score", "hidden": [16]}},
                },
                "transformer": {
                    "summary": "A policy with memory: it reads the last four observations",
                    "value": {
                        "environment": {"kind": "gymnasium", "id": "pgengine/TMaze-v0"},
                        "policy": {"kind": "transformer", "window": 4, "width": 16},
                    },
                },
            }
        ),
    ],
    database: Db,
    settings: Configured,
    allowed: Allowed,
    creation: Creation,
) -> Response:
    """Draws a policy from a seed and keeps it as checkpoint 0; it can act at once."""
    if (answered := creation.answered(database, _today)) is not None:
        return written(answered)
    environment = known(database, body.environment, allowed)
    seed = secrets.randbelow(LARGEST_INTEGER + 1) if body.seed is None else body.seed
    maximum = settings.max_policy_parameters
    try:
        drawn = store.draw(body.policy, environment.spec, environment.facts, seed, max_parameters=maximum)
    except SpecError as error:
        raise error.under("/policy") from None
    with database.write() as session:

        def create() -> Reply:
            row = store.create(session, stored(session, environment), drawn, body.name, dict(body.metadata))
            answer = _body(session, row).model_dump(mode="json")
            return Reply(201, answer, {"location": f"/v1/policies/{row.id}"}, LASTING)

        reply = creation.answer(session, create, _today)
    return written(reply)


LASTING = ("spec", "observation_space", "action_space", "observation_schema", "action_schema", "metadata")


def _today(session: Session, policy_id: str) -> dict[str, Any]:
    return _body(session, store.get(session, policy_id)).model_dump(mode="json")


@router.get("/policies", operation_id="list_policies", summary="List policies")
def list_policies(query: Annotated[PageQuery, Query()], database: Db) -> Page[PolicySummary]:
    """Policies, newest first."""
    with database.read() as session:
        page = store.list_(session, query)
        heads = checkpoints.heads(session, [row.id for row in page.rows])
    data = [PolicySummary(**_summary(row, heads[row.id])) for row in page.rows]
    return Page(data=data, has_more=page.has_more, next_cursor=page.next_cursor)


@router.get("/policies/{policy_id}", operation_id="get_policy", summary="Get a policy")
def get_policy(policy_id: Id, database: Db) -> Policy:
    """The policy with its spaces and its latest checkpoint."""
    with database.read() as session:
        return _body(session, store.get(session, policy_id))


@router.delete("/policies/{policy_id}", operation_id="delete_policy", summary="Delete a policy", status_code=204)
def delete_policy(policy_id: Id, database: Db) -> None:
    """Removes a policy that no job refers to, with its checkpoints."""
    with database.write() as session:
        store.delete(session, policy_id)


@router.get(
    "/policies/{policy_id}/checkpoints", operation_id="list_policy_checkpoints", summary="List a policy's checkpoints"
)
def list_policy_checkpoints(policy_id: Id, query: Annotated[PageQuery, Query()], database: Db) -> Page[Checkpoint]:
    """The policy's checkpoints, newest first."""
    with database.read() as session:
        store.get(session, policy_id)
        return checkpoint_page(checkpoints.list_(session, query, policy_id=policy_id))


# --- the numbers of a policy ------------------------------------------------------------------------------------------

MOST_NUMBERS = 100_000
"""Numbers that are written out as JSON; more are read from the content of the checkpoint."""


@router.get(
    "/checkpoints/{checkpoint_id}/parameters",
    operation_id="get_checkpoint_parameters",
    summary="Read the parameters of a checkpoint",
    tags=["checkpoints"],
)
def get_checkpoint_parameters(
    checkpoint_id: Annotated[CheckpointId, Path(description="Id of a checkpoint.")], database: Db
) -> CheckpointParameters:
    """The policy's parameters as numbers, as `initial_parameters` takes them.

    Together with the policy's spec they make the same policy again, unless it normalises observations: a new policy
    begins with a normaliser that has seen nothing, and these figures, under `buffers`, cannot be given. The content of
    the checkpoint has everything.
    """
    with database.read() as session:
        row = checkpoints.get(session, checkpoint_id)
        data = checkpoints.content(session, checkpoint_id)
    policy = load(data)
    numbers = policy.size + sum(array.size for array in policy.buffers.values())
    if numbers > MOST_NUMBERS:
        message = (
            f"The policy has {numbers} numbers, and at most {MOST_NUMBERS} are written out as JSON; "
            f"take /v1/checkpoints/{checkpoint_id}/content, which `pgengine.load` reads."
        )
        raise invalid("/checkpoint_id", "too_many_parameters", message)
    return CheckpointParameters(
        checkpoint_id=row.id,
        policy_id=row.policy_id,
        updates=row.updates,
        parameters={name: array.tolist() for name, array in policy.parameters.items()},
        buffers={name: array.tolist() for name, array in policy.buffers.items()},
    )


# --- publishing -------------------------------------------------------------------------------------------------------


def _body(session: Session, row: Row) -> Policy:
    facts = environments.facts_of(environments.get(session, row.environment_id))
    heads = checkpoints.heads(session, [row.id])[row.id]
    spec = store.spec_of(row)
    return Policy(
        **_summary(row, heads),
        spec=spec,
        memory=spec.window if isinstance(spec, TransformerPolicySpec) else 1,
        best_checkpoint_id=heads.best,
        observation_space=facts.observation_space,
        action_space=facts.action_space,
        observation_schema=observation_schema(facts.observation_space),
        action_schema=action_schema(facts.action_space),
        notices=notices_of(facts, spec),
    )


def _summary(row: Row, heads: checkpoints.Heads) -> dict[str, Any]:
    return {
        "id": row.id,
        "name": row.name,
        "metadata": row.metadata_,
        "environment_id": row.environment_id,
        "kind": row.spec["kind"],
        "seed": row.seed,
        "updates": heads.latest_updates,
        "checkpoint_id": heads.latest,
        "created_at": row.created_at,
    }
