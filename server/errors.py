"""What the API raises, and how it is written.

    ApiError
    ├── MalformedRequest        400  malformed_request
    ├── Unauthorized            401  unauthorized
    ├── Forbidden               403  forbidden
    ├── HostNotAllowed          403  host_not_allowed
    ├── OriginNotAllowed        403  origin_not_allowed
    ├── NotFound                404  not_found
    ├── MethodNotAllowed        405  method_not_allowed
    ├── NotAcceptable           406  not_acceptable
    ├── RequestTimeout          408  request_timeout
    ├── Conflict                409                        never worth repeating as it is: x-should-retry: false
    │   ├── PolicyBusy               policy_busy
    │   ├── InUse                    in_use
    │   ├── NotTerminal              not_terminal
    │   ├── NotCancellable           not_cancellable
    │   └── CannotBeRepeated         cannot_be_repeated
    ├── PayloadTooLarge         413  payload_too_large
    ├── UnsupportedMediaType    415  unsupported_media_type
    ├── RangeNotSatisfiable     416  range_not_satisfiable
    ├── InvalidRequest          422  invalid_request
    │   └── InvalidCursor            invalid_cursor
    ├── IdempotencyKeyReused    422  idempotency_key_reused
    ├── TooManyRequests         429  too_many_requests
    ├── HeadTooLarge            431  head_too_large
    ├── InternalError           500  internal
    ├── Unavailable             503  unavailable
    ├── TooManyConnections      503  too_many_connections
    └── TookTooLong             503  took_too_long

The leaves of this tree are the closed list of codes; docs/errors.md explains each one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

__all__ = [
    "PROBLEM_MEDIA_TYPE",
    "ApiError",
    "CannotBeRepeated",
    "Conflict",
    "FieldError",
    "Forbidden",
    "HeadTooLarge",
    "HostNotAllowed",
    "IdempotencyKeyReused",
    "InUse",
    "InternalError",
    "InvalidCursor",
    "InvalidRequest",
    "MalformedRequest",
    "MethodNotAllowed",
    "NotAcceptable",
    "NotCancellable",
    "NotFound",
    "NotTerminal",
    "OriginNotAllowed",
    "PayloadTooLarge",
    "PolicyBusy",
    "RangeNotSatisfiable",
    "RequestTimeout",
    "TooManyConnections",
    "TooManyRequests",
    "TookTooLong",
    "Unauthorized",
    "Unavailable",
    "UnsupportedMediaType",
    "error_types",
    "invalid",
    "pointer_to",
    "problem",
]

PROBLEM_MEDIA_TYPE = "application/problem+json"


@dataclass(frozen=True, slots=True)
class FieldError:
    """What is wrong with one field of a request.

    Attributes:
        pointer: JSON Pointer (RFC 6901) into the submitted body; of a parameter in path or query a slash and its name.
        code: Machine-readable code such as `greater_than_equal`.
        message: What was expected, for people; never repeats the value that was sent.
    """

    pointer: str
    code: str
    message: str


class ApiError(Exception):
    """An answer that is not a success.

    Attributes:
        status: HTTP status.
        code: Closed machine-readable code.
        title: What the code means, the same for every occurrence.
        message: What happened this time and what to do, for people; absent it is the title.
        errors: The fields at fault, if there are any.
        headers: Headers of the answer.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = ""
    title: ClassVar[str] = ""
    default_headers: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        message: str | None = None,
        *,
        errors: Sequence[FieldError] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.message = message or self.title
        self.errors = tuple(errors)
        self.headers = {**self.default_headers, **(headers or {})}
        super().__init__(self.message)


class MalformedRequest(ApiError):
    """What was sent is not HTTP; the connection is closed."""

    status = 400
    code = "malformed_request"
    title = "What was sent is not a request of HTTP/1.1."


class Unauthorized(ApiError):
    """No key was sent, or it is unknown or revoked."""

    status = 401
    code = "unauthorized"
    title = "A valid API key is required."
    default_headers = {"www-authenticate": "Bearer"}


class Forbidden(ApiError):
    """The key is valid but lacks the scope that the route asks for."""

    status = 403
    code = "forbidden"
    title = "The API key does not have the scope that this request needs."


class HostNotAllowed(ApiError):
    """The Host header names a host that this server does not answer for."""

    status = 403
    code = "host_not_allowed"
    title = "This server does not answer for that host; PGENGINE_ALLOWED_HOSTS names those it answers for."


class OriginNotAllowed(ApiError):
    """The request comes from a web page of another origin."""

    status = 403
    code = "origin_not_allowed"
    title = "Web pages of that origin may not use this server; PGENGINE_ALLOWED_ORIGINS names those that may."


class NotFound(ApiError):
    """There is no such route or object."""

    status = 404
    code = "not_found"
    title = "There is nothing here."


class MethodNotAllowed(ApiError):
    """The route exists, with other methods; the Allow header names them."""

    status = 405
    code = "method_not_allowed"
    title = "The method is not allowed here."


class NotAcceptable(ApiError):
    """None of the media types that the Accept header names can be given."""

    status = 406
    code = "not_acceptable"
    title = "None of the accepted media types can be given."


class RequestTimeout(ApiError):
    """The head or the body of the request came too slowly; the connection is closed."""

    status = 408
    code = "request_timeout"
    title = "The request did not come in time."


class Conflict(ApiError):
    """The state of the object does not allow it; repeating the same request does not help."""

    status = 409
    # client libraries repeat a 409 by themselves unless they are told
    default_headers = {"x-should-retry": "false"}


class PolicyBusy(Conflict):
    """A training job of this policy, which `detail` names, has not ended; at most one may be at work."""

    code = "policy_busy"
    title = "Another training job of this policy has not ended."


class InUse(Conflict):
    """Other objects refer to this one, so it cannot be deleted."""

    code = "in_use"
    title = "Other objects refer to this one."


class NotTerminal(Conflict):
    """A job that has not ended cannot be deleted; cancel it first."""

    code = "not_terminal"
    title = "The job has not ended."


class CannotBeRepeated(Conflict):
    """An update cannot be played again as it was; `detail` says what is gone, or what comes out otherwise and why."""

    code = "cannot_be_repeated"
    title = "The update cannot be played again as it was."


class NotCancellable(Conflict):
    """A job that has succeeded or failed cannot be cancelled any more."""

    code = "not_cancellable"
    title = "The job has already ended."


class PayloadTooLarge(ApiError):
    """The body is larger than PGENGINE_MAX_BODY_BYTES."""

    status = 413
    code = "payload_too_large"
    title = "The body is too large."


class UnsupportedMediaType(ApiError):
    """The body has another media type than the route takes, `application/json` nearly everywhere."""

    status = 415
    code = "unsupported_media_type"
    title = "The body's media type is not supported."


class RangeNotSatisfiable(ApiError):
    """The Range header asks for bytes that the content does not have."""

    status = 416
    code = "range_not_satisfiable"
    title = "The content has no such bytes."


class InvalidRequest(ApiError):
    """The body or a parameter is not what was expected; `errors` names each field."""

    status = 422
    code = "invalid_request"
    title = "The request is not valid."


class InvalidCursor(InvalidRequest):
    """`after` is neither a `next_cursor` of this list nor the id of one of its objects."""

    code = "invalid_cursor"
    title = "`after` must be the next_cursor of a page of this list, or the id of an object in it."


class IdempotencyKeyReused(ApiError):
    """The Idempotency-Key was used before, with another body or for another route."""

    status = 422
    code = "idempotency_key_reused"
    title = "The Idempotency-Key was already used for another request."
    default_headers = {"x-should-retry": "false"}


class TooManyRequests(ApiError):
    """A bound such as PGENGINE_MAX_STREAMS, PGENGINE_MAX_EXPLANATIONS or PGENGINE_MAX_OPEN_JOBS is reached."""

    status = 429
    code = "too_many_requests"
    title = "Too much at once; try again later."
    default_headers = {"retry-after": "1"}


class HeadTooLarge(ApiError):
    """The request line and the headers are too many bytes, or there are too many headers; the connection is closed."""

    status = 431
    code = "head_too_large"
    title = "The head of the request is too large."


class InternalError(ApiError):
    """A mistake of the server; its log has the request_id and the traceback."""

    status = 500
    code = "internal"
    title = "The server made a mistake."


class Unavailable(ApiError):
    """The database does not answer, has another revision or is busy with others, or the server is shutting down."""

    status = 503
    code = "unavailable"
    title = "The server cannot answer now."
    default_headers = {"retry-after": "1"}


class TooManyConnections(ApiError):
    """PGENGINE_MAX_CONNECTIONS is reached, and all of them are in use."""

    status = 503
    code = "too_many_connections"
    title = "Too many connections are open."
    default_headers = {"retry-after": "1"}


class TookTooLong(ApiError):
    """The engine did not answer within PGENGINE_EXPLAIN_SECONDS; it would not do so the next time either."""

    status = 503
    code = "took_too_long"
    title = "The answer takes too long."
    default_headers = {"x-should-retry": "false"}


def pointer_to(pointer: str, part: str | int) -> str:
    """The JSON Pointer one level below another."""
    return f"{pointer}/{str(part).replace('~', '~0').replace('/', '~1')}"


def invalid(pointer: str, code: str, message: str) -> InvalidRequest:
    """The problem of a single field."""
    return InvalidRequest(errors=[FieldError(pointer, code, message)])


def error_types() -> Iterator[type[ApiError]]:
    """Every class that has a code, from the top of the tree to the bottom."""
    pending: list[type[ApiError]] = [ApiError]
    while pending:
        error_type = pending.pop(0)
        if error_type.code:
            yield error_type
        pending[:0] = error_type.__subclasses__()


def problem(error: ApiError, request_id: str) -> dict[str, Any]:
    """The body of an answer of type `application/problem+json` (RFC 9457)."""
    return {
        "type": "about:blank",
        "title": error.title,
        "status": error.status,
        "detail": error.message,
        "code": error.code,
        "errors": [{"pointer": e.pointer, "code": e.code, "message": e.message} for e in error.errors],
        "request_id": request_id,
    }
