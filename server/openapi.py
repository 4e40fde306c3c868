"""The description of the API, as clients are generated from it.

FastAPI describes its routes; what it cannot know is added here: who may call, what problems look like, and the act
endpoint, which no router of FastAPI serves.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from server.errors import (
    PROBLEM_MEDIA_TYPE,
    ApiError,
    Conflict,
    Forbidden,
    InternalError,
    InvalidRequest,
    NotAcceptable,
    NotFound,
    PayloadTooLarge,
    TooManyRequests,
    Unauthorized,
    Unavailable,
    UnsupportedMediaType,
    error_types,
)
from server.generators import for_generators
from server.middleware import ACT_ROUTE
from server.policies import act

__all__ = ["describe"]

DESCRIPTION = """Trains reinforcement-learning policies by policy gradient, and serves them.

Describe an environment and a policy, post a training job, follow its events, ask the policy for actions.
The shortest job, which solves CartPole, is `{"environment": {"kind": "gymnasium", "id": "CartPole-v1"}}`.
"""

TAGS = {
    "training jobs": "Requests to train a policy: created, followed, cancelled.",
    "gradient checks": "Are estimators what their labels say? Compared with the exact gradient.",
    "policies": "What is trained and asked for actions.",
    "environments": "What policies learn in.",
    "checkpoints": "Policies as they were after so many updates.",
}


def describe(app: FastAPI) -> None:
    """Let the application describe itself; the description is made when it is first asked for."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _schema(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _schema(app: FastAPI) -> dict[str, Any]:
    schema = get_openapi(
        title=app.title,
        version=app.version,
        summary="A policy-gradient engine and the server that trains with it",
        description=DESCRIPTION,
        routes=app.routes,
        tags=[{"name": name, "description": description} for name, description in TAGS.items()],
    )
    schema["paths"][ACT_ROUTE] = {"post": _act()}
    schema["security"] = [{"key": []}]
    components = schema["components"]
    components["securitySchemes"] = {
        "key": {
            "type": "http",
            "scheme": "bearer",
            "description": "An API key. Its scopes: read for GET, act for act, train for the rest and for explaining "
            "an update, admin for all.",
        }
    }
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    components["schemas"]["Problem"] = _problem_schema()
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            operation["responses"] |= _problems(path, method, operation)
            _add_headers(operation)
    components["headers"] = {name: _header(name) for name in HEADERS}
    for_generators(schema, raw="EventPage")
    return schema


# --- headers ----------------------------------------------------------------------------------------------------------

HEADERS = {
    "X-Request-Id": "The request's id: the one that it was sent with, or a new one. It is in the server's log too.",
    "Location": "Path of the object.",
    "Idempotency-Replayed": "`true` where the answer was given before to the same Idempotency-Key.",
    "WWW-Authenticate": "`Bearer`: which kind of key is expected.",
    "X-Should-Retry": "`false` where repeating the same request cannot help.",
    "Retry-After": "Seconds after which to send the request again.",
    "ETag": "Tells this content from others.",
    "Cache-Control": "Whether and how long the answer may be kept.",
    "Content-Disposition": "Name of the file.",
}
_ON_ERRORS = {"401": "WWW-Authenticate", "409": "X-Should-Retry", "422": "X-Should-Retry", "429": "Retry-After"}
_ON_503 = ("Retry-After", "X-Should-Retry")
_ON_CREATING = ("Location", "Idempotency-Replayed")
_ON_STREAMS = ("Cache-Control",)
_ON_CONTENT = ("ETag", "Cache-Control", "Content-Disposition")


def _add_headers(operation: dict[str, Any]) -> None:
    """Say which headers each response may have, beside those that a route has declared."""
    for status, response in operation["responses"].items():
        names = ["X-Request-Id", *_names_of_headers(operation, status)]
        documented = {name: {"$ref": f"#/components/headers/{name}"} for name in names}
        response["headers"] = documented | response.get("headers", {})


def _names_of_headers(operation: dict[str, Any], status: str) -> Iterable[str]:
    if status >= "400":
        return _ON_503 if status == "503" else [name for one, name in _ON_ERRORS.items() if one == status]
    identifier = operation["operationId"]
    if any(parameter["name"] == "Idempotency-Key" for parameter in operation.get("parameters", ())):
        return _ON_CREATING
    if identifier.endswith("_events"):
        return _ON_STREAMS
    if identifier == "get_checkpoint_content":
        return _ON_CONTENT if status == "200" else _ON_CONTENT[:2]
    return ()


def _header(name: str) -> dict[str, Any]:
    kind = "integer" if name == "Retry-After" else "string"
    return {"description": HEADERS[name], "schema": {"type": kind}}


# --- the act endpoint and problems ------------------------------------------------------------------------------------


def _act() -> dict[str, Any]:
    parameter = {
        "name": "policy_id",
        "in": "path",
        "required": True,
        "description": "Id of a policy.",
        "schema": {"type": "string", "pattern": "^pol_[0-9a-f]{32}$", "title": "Policy Id"},
    }
    return {**act.OPENAPI, "parameters": [parameter], "responses": {**act.OPENAPI["responses"]}}


def _problems(path: str, method: str, operation: dict[str, Any]) -> dict[str, Any]:
    return {str(error.status): _response(error) for error in _errors_of(path, method, operation)}


def _errors_of(path: str, method: str, operation: dict[str, Any]) -> Iterator[type[ApiError]]:
    yield from (Unauthorized, Forbidden, InvalidRequest, InternalError, Unavailable)
    if "{" in path or "requestBody" in operation:
        yield NotFound
    if "requestBody" in operation:
        yield from (PayloadTooLarge, UnsupportedMediaType)
    if (
        method == "delete"
        or (path.startswith(("/v1/training-jobs", "/v1/gradient-checks")) and method == "post")
        or operation["operationId"] == "explain_training_job_update"
    ):
        yield Conflict
    if path.endswith(("/events", "/metrics")):
        yield NotAcceptable
    if path.endswith("/events") or operation["operationId"] in _BOUNDED:
        yield TooManyRequests


_BOUNDED = ("explain_training_job_update", "create_gradient_check", "create_training_job")
"""Operations of which only so many are taken: they ask the engine in a program of its own, or queue a job."""


def _response(error: type[ApiError]) -> dict[str, Any]:
    # several codes may share a status: the text names them all
    codes = [one.code for one in error_types() if one.status == error.status]
    return {
        "description": f"{error.title or 'The state of the object does not allow it.'} Code: {', '.join(codes)}.",
        "content": {PROBLEM_MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }


def _problem_schema() -> dict[str, Any]:
    text = {"type": "string"}
    fault = {
        "type": "object",
        "required": ["pointer", "code", "message"],
        "properties": {
            "pointer": {
                **text,
                "description": "JSON Pointer into the body; of a parameter in path or query a slash and its name.",
            },
            "code": {**text, "description": "Machine-readable code."},
            "message": {**text, "description": "What was expected."},
        },
    }
    return {
        "type": "object",
        "title": "Problem",
        "description": "What went wrong, after RFC 9457.",
        "required": ["type", "title", "status", "detail", "code", "errors", "request_id"],
        "properties": {
            "type": text,
            "title": {**text, "description": "What the code means."},
            "status": {"type": "integer", "description": "The HTTP status."},
            "detail": {**text, "description": "What happened this time, and what to do."},
            "code": {**text, "enum": sorted({error.code for error in error_types()})},
            "errors": {"type": "array", "items": fault, "description": "The fields at fault."},
            "request_id": {**text, "description": "Also in the header x-request-id, and in the server's log."},
        },
    }
