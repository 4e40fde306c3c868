"""Updates of training jobs over HTTP: played again, compared with what was recorded, and laid out step by step."""

import asyncio
import json
from typing import Annotated, Any, cast

from fastapi import APIRouter, Path, Query, Request, Response

from pgengine.errors import SpecError
from server.errors import CannotBeRepeated, invalid
from server.ids import JobId
from server.jobs import store
from server.jobs.engine import Engine, EngineFailed, while_connected
from server.jobs.schemas import UpdateExplanation
from server.keys.store import Identity
from server.request import LARGEST_INTEGER, Db, StrictRoute, Threads

__all__ = ["router"]

router = APIRouter(prefix="/v1/training-jobs", tags=["training jobs"], route_class=StrictRoute)


@router.get(
    "/{job_id}/updates/{update}",
    operation_id="explain_training_job_update",
    summary="Explain an update of a training job",
    response_model=UpdateExplanation,
)
async def explain_training_job_update(
    request: Request,
    job_id: Annotated[JobId, Path(description="Id of a training job.")],
    update: Annotated[
        int, Path(ge=1, le=LARGEST_INTEGER, description="Number of the policy's update, as in the metrics.")
    ],
    database: Db,
    threads: Threads,
    first_episode: Annotated[int, Query(ge=0, le=9_999, description="Place in the batch of the first episode.")] = 0,
    episodes: Annotated[int, Query(ge=1, le=256, description="How many episodes to show, at most.")] = 16,
) -> Response:
    """How the update came about: its episodes, and what each step of them adds to the estimate of the gradient.

    It is played again, from the newest state before the update or from the job's beginning, by a program of its own;
    so it takes a key with the scope `train`. What the job recorded is compared with what comes out: where the two
    differ the answer is 409 `cannot_be_repeated`, which says in what. On the machine that trained, with as many
    threads, it is what was computed then to the bit, unless the environment draws random numbers of its own.
    """

    def read() -> store.Explainable:
        with database.read() as session:
            return store.explainable(session, job_id, update)

    try:
        found = await threads.reading.run(read)
        if first_episode >= (batch := found.spec["algorithm"]["trajectories"]):
            message = f"The batch has {batch} episodes; the first one is 0."
            raise invalid("/first_episode", "less_than", message)
        explanation = await while_connected(request, _explained(request, found, update, first_episode, episodes))
    except (store.NotRepeatable, EngineFailed, SpecError) as error:
        # the job's own settings were accepted once, so the fault is what has changed since
        raise CannotBeRepeated(f"The update could not be made again: {error}.") from None
    about = {"object": "update_explanation", "job_id": job_id, "compared": update in found.recorded}
    return Response(await asyncio.to_thread(json.dumps, about | explanation), media_type="application/json")


async def _explained(
    request: Request, found: store.Explainable, update: int, first_episode: int, episodes: int
) -> dict[str, Any]:
    # nothing but the update matters: a target is not looked for, and seconds are not counted
    stop = {"updates": update - found.start_updates, "target_return": None}
    engine = cast(Engine, request.app.state.engine)
    return await engine.ask(
        "explain",
        {
            "spec": found.spec | {"stop": stop},
            "update": update,
            "first_episode": first_episode,
            "episodes": episodes,
            "recorded": [[number, figures] for number, figures in found.recorded.items()],
            "runtime": found.fingerprint,
        },
        caller=cast(Identity, request.state.identity).key_id,
        policy=found.policy_bytes,
        behaviour=found.behaviour_bytes,
        state=found.state_bytes,
    )
