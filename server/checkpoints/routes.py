"""Checkpoints over HTTP."""

from typing import Annotated

from fastapi import APIRouter, Header, Path, Request, Response

from server.checkpoints import store
from server.checkpoints.schemas import Checkpoint
from server.checkpoints.store import Checkpoint as Row
from server.conditional import has_already, wanted_part
from server.ids import CheckpointId
from server.pages import Page, Slice
from server.request import Db, StrictRoute

__all__ = ["checkpoint_body", "checkpoint_page", "router"]

router = APIRouter(prefix="/v1", tags=["checkpoints"], route_class=StrictRoute)

Id = Annotated[CheckpointId, Path(description="Id of a checkpoint.")]

MEDIA_TYPE = "application/octet-stream"
"""Safetensors has no registered media type of its own."""


@router.get("/checkpoints/{checkpoint_id}", operation_id="get_checkpoint", summary="Get a checkpoint")
def get_checkpoint(checkpoint_id: Id, database: Db) -> Checkpoint:
    """What the checkpoint is; its parameters are in its content."""
    with database.read() as session:
        return checkpoint_body(store.get(session, checkpoint_id))


@router.get(
    "/checkpoints/{checkpoint_id}/content",
    operation_id="get_checkpoint_content",
    summary="Download a checkpoint",
    response_class=Response,
    responses={
        200: {
            "description": "The policy in the safetensors format, with a JSON header; `pgengine.load` reads it.",
            "content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}},
        },
        206: {
            "description": "The bytes that Range asks for.",
            "content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}},
        },
        304: {"description": "The client has it already, as If-None-Match says."},
    },
)
def get_checkpoint_content(
    request: Request,
    checkpoint_id: Id,
    database: Db,
    if_none_match: Annotated[str | None, Header(description="ETags of what the client has, or `*`.")] = None,
    range_: Annotated[
        str | None, Header(alias="Range", description="Bytes to send, such as `bytes=1000-`.", examples=["bytes=0-99"])
    ] = None,
    if_range: Annotated[str | None, Header(description="ETag that Range presumes; otherwise all is sent.")] = None,
) -> Response:
    """The policy's bytes: weights and all that acting needs. A checkpoint's content never changes.

    A download that broke off goes on with `Range`.
    """
    with database.read() as session:
        row = store.get(session, checkpoint_id)
        tag = f'"{row.sha256}"'
        headers = {"etag": tag, "accept-ranges": "bytes", "cache-control": "private, max-age=31536000, immutable"}
        if if_none_match is not None and has_already(request.headers.getlist("if-none-match"), tag):
            return Response(status_code=304, headers=headers)
        data = store.content(session, checkpoint_id)
    headers["content-disposition"] = f'attachment; filename="{row.id}.safetensors"'
    part = wanted_part(range_, if_range, tag, len(data))
    if part is None:
        return Response(data, media_type=MEDIA_TYPE, headers=headers)
    headers["content-range"] = f"bytes {part.start}-{part.stop - 1}/{len(data)}"
    return Response(data[part.start : part.stop], 206, headers, media_type=MEDIA_TYPE)


def checkpoint_body(row: Row) -> Checkpoint:
    """A stored checkpoint as it is published."""
    return Checkpoint.model_validate(row, from_attributes=True)


def checkpoint_page(page: Slice[Row]) -> Page[Checkpoint]:
    """A page of stored checkpoints as it is published."""
    data = [checkpoint_body(row) for row in page.rows]
    return Page(data=data, has_more=page.has_more, next_cursor=page.next_cursor)
