"""What a route gets from its request: a body read strictly, the caller, the database.

Python's JSON reader takes NaN, numbers beyond every float, lone surrogates and repeated names, each of which later
breaks something that is not the client's fault to see: a response, an index, a database. Here they are refused before
anything looks at the body. Knows HTTP and FastAPI; knows no feature.
"""

import json
import re
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from math import isfinite
from typing import Annotated, Any, cast

from fastapi import Depends, Header, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.dependencies.models import Dependant
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from server.database import Database
from server.errors import FieldError, InvalidRequest, NotAcceptable
from server.idempotency import LONGEST_KEY, Reply, kept, once
from server.settings import Settings

__all__ = [
    "LARGEST_INTEGER",
    "Answer",
    "Body",
    "Configured",
    "Creation",
    "Db",
    "Metadata",
    "Name",
    "StrictRoute",
    "check_parameters",
    "decode",
    "field_errors",
    "invalid",
    "negotiated",
    "pointer_to",
    "written",
]

LARGEST_INTEGER = 2**53 - 1
"""The largest integer that every JSON reader keeps exact."""
MAX_NAME = 256
MAX_NAMES = 1024
"""No object that we read has more fields; a million unknown ones would be a million errors."""
MAX_VALUES = 200_000
"""No list that makes sense is longer, unless it holds plain numbers; those are bounded by the body's size alone."""
MAX_ERRORS = 20
LARGE_BODY = 65_536
"""Bodies from here on are read in a thread: other requests do not wait for them."""


async def _database(request: Request) -> Database:
    return cast(Database, request.app.state.database)


async def _settings(request: Request) -> Settings:
    return cast(Settings, request.app.state.settings)


Db = Annotated[Database, Depends(_database)]
"""The database; a route opens its own transaction, so that it is committed before the response is sent."""
Configured = Annotated[Settings, Depends(_settings)]
"""The server's settings."""

Name = Annotated[str, Field(min_length=1, max_length=200)]
"""What people call an object."""
Metadata = Annotated[
    dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
]
"""What clients note on an object: 16 texts of 512 characters under names of 64."""

_IdempotencyKey = Annotated[str | None, Field(min_length=1, max_length=LONGEST_KEY, pattern=r"^[\x20-\x7e]+$")]


class Body(BaseModel):
    """Base of all request bodies: strict, finite, no unknown fields."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Answer(BaseModel):
    """Base of all response bodies."""

    model_config = ConfigDict(use_attribute_docstrings=True)


def invalid(pointer: str, code: str, message: str) -> InvalidRequest:
    """The problem of a single field."""
    return InvalidRequest(errors=[FieldError(pointer, code, message)])


class _Creation:
    """A request that creates something, and answers the same when it is repeated with its Idempotency-Key."""

    def __init__(self, request: Request, key: str | None) -> None:
        self._request = request
        self._key = key

    def answer(self, session: Session, create: Callable[[], Reply]) -> Reply:
        """What `create` answers, or what it has answered before.

        Args:
            session: The writing transaction in which `create` works; nothing may have been written in it yet.
            create: Creates and answers.
        """
        return once(session, *self._identity(), create)

    def answered(self, database: Database) -> Reply | None:
        """What was answered before, or None: asked before the work that `create` needs done."""
        if self._key is None:
            return None
        with database.read() as session:
            return kept(session, *self._identity())

    def _identity(self) -> tuple[str, str | None, str, bytes]:
        state = self._request.state
        route = f"{self._request.method} {self._request.scope['route'].path}"
        return state.identity.key_id, self._key, route, state.body


async def _creation(
    request: Request,
    key: Annotated[
        _IdempotencyKey,
        Header(
            alias="Idempotency-Key",
            description="Any text of your choice: repeating the request with it creates nothing twice and gives the "
            "same answer, for 24 hours.",
            examples=["0192f0c1-5b7e-7cc0-9d1a-9c5a2c1f0b11"],
        ),
    ] = None,
    old_key: Annotated[_IdempotencyKey, Header(alias="X-Idempotency-Key", include_in_schema=False)] = None,
) -> _Creation:
    return _Creation(request, key if key is not None else old_key)


Creation = Annotated[_Creation, Depends(_creation)]
"""What makes a creating request safe to repeat."""


def written(reply: Reply) -> JSONResponse:
    """A kept or fresh answer as a response."""
    return JSONResponse(reply.body, reply.status, reply.headers)


def negotiated(accept: str, offered: Sequence[str]) -> str:
    """The media type to answer with: of equally welcome ones the first that is offered.

    Raises:
        NotAcceptable: if none is welcome.
    """
    weights = {media_type: _weight(accept, media_type) for media_type in offered}
    best = max(offered, key=lambda media_type: weights[media_type])
    if weights[best] == 0:
        raise NotAcceptable(f"Accept one of: {', '.join(offered)}.")
    return best


def _weight(accept: str, media_type: str) -> float:
    """How welcome a media type is; the most specific range decides (RFC 9110, 12.5.1)."""
    found = (0, 0.0)
    for part in accept.split(","):
        media_range, *parameters = (piece.strip().lower() for piece in part.split(";"))
        ranges = ("*/*", f"{media_type.partition('/')[0]}/*", media_type)
        if media_range in ranges:
            quality = next((p[2:] for p in parameters if p.startswith("q=")), "1")
            weight = float(quality) if re.fullmatch(r"[01](\.\d{0,3})?", quality) else 0.0
            found = max(found, (ranges.index(media_range) + 1, weight))
    return found[1]


# --- bodies -----------------------------------------------------------------------------------------------------------


class StrictRoute(APIRoute):
    """A route whose JSON body is read by `decode`, and that refuses query parameters which it does not know."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, with the query checked and the body read before it."""
        handle = super().get_route_handler()
        known = frozenset(_parameters(self.dependant))
        has_body = self.body_field is not None

        async def strict(request: Request) -> Response:
            check_parameters(request.query_params, known)
            if not has_body:
                return await handle(request)
            raw = await request.body()
            depth = cast(Settings, request.app.state.settings).max_body_depth
            value = decode(raw, depth) if len(raw) < LARGE_BODY else await run_in_threadpool(decode, raw, depth)
            # what was sent, to the byte, is what an Idempotency-Key stands for
            request.state.body = raw
            return await handle(_Decoded(request, raw, value))

        return strict


def _parameters(dependant: Dependant) -> Iterator[str]:
    """Names of the query parameters that a route and its dependencies read."""
    for field in dependant.query_params:
        model = field.field_info.annotation
        if isinstance(model, type) and issubclass(model, BaseModel):
            yield from model.model_fields
        else:
            yield field.alias
    for inner in dependant.dependencies:
        yield from _parameters(inner)


def check_parameters(names: Iterable[str], known: Collection[str]) -> None:
    """Whether a route has these query parameters; one that it ignored would probably be misspelt.

    Raises:
        InvalidRequest: naming those that it has not.
    """
    unknown = [name for name in names if name not in known]
    if unknown:
        expected = f"expected {', '.join(sorted(known))}" if known else "this route has none"
        message = f"This parameter is not known here; {expected}."
        faults = [FieldError(pointer_to("", name[:MAX_NAME]), "unknown_field", message) for name in unknown]
        raise InvalidRequest(errors=faults[:MAX_ERRORS])


class _Decoded(Request):
    def __init__(self, request: Request, raw: bytes, value: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._body = raw
        self._value = value

    async def json(self) -> Any:
        return self._value


class _Repeated(dict[str, Any]):
    """An object in which a name occurs twice."""


def decode(raw: bytes, max_depth: int) -> Any:
    """A JSON body as Python values: finite numbers, integers within 2^53, clean text, bounded depth.

    Args:
        raw: The body as it was sent.
        max_depth: How many lists and objects may lie inside each other.

    Raises:
        InvalidRequest: with a pointer to each fault.
    """
    try:
        value = json.loads(raw.decode(), parse_int=_integer, object_pairs_hook=_object)
    except RecursionError:
        raise invalid("", *_too_deep(max_depth)) from None
    except UnicodeDecodeError:
        raise invalid("", "malformed_json", "Expected JSON in UTF-8.") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise invalid("", "malformed_json", f"Expected JSON; {where}: {error.msg}.") from None
    faults = _faults(value, max_depth)
    if faults:
        raise InvalidRequest(errors=faults)
    return value


def _integer(digits: str) -> int:
    # Python refuses to read integers of thousands of digits, and takes quadratic time for those before
    return int(digits) if len(digits) <= 17 else LARGEST_INTEGER + 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    return members if len(members) == len(pairs) else _Repeated(members)


def _too_deep(max_depth: int) -> tuple[str, str]:
    return "too_deep", f"Expected at most {max_depth} levels of nesting."


def _faults(root: Any, max_depth: int) -> list[FieldError]:
    """What JSON readers and databases disagree about, each with its place."""
    faults: list[FieldError] = []
    pending: list[tuple[Any, str, int]] = [(root, "", 0)]
    while pending and len(faults) < MAX_ERRORS:
        value, pointer, depth = pending.pop()
        if not isinstance(value, list | dict):
            faults += [] if _clean(value) else [FieldError(pointer, *_fault(value))]
        elif depth == max_depth:
            faults.append(FieldError(pointer, *_too_deep(max_depth)))
        elif isinstance(value, list):
            # most of a large body is numbers in lists: only what needs a second look gets a pointer
            if _clean_numbers(value):
                continue
            if len(value) > MAX_VALUES:
                faults.append(FieldError(pointer, "too_many_values", f"Expected at most {MAX_VALUES} values here."))
                continue
            pending += [(v, f"{pointer}/{i}", depth + 1) for i, v in enumerate(value) if not _clean(v)]
        elif len(value) > MAX_NAMES:
            faults.append(FieldError(pointer, "too_many_fields", f"Expected at most {MAX_NAMES} fields."))
        else:
            faults += _name_faults(value, pointer)
            pending += [(v, pointer_to(pointer, name), depth + 1) for name, v in value.items() if not _clean(v)]
    return faults


def _clean_numbers(values: list[Any]) -> bool:
    """Whether they are numbers of one kind without fault, at the speed of C."""
    kinds = set(map(type, values))
    if kinds == {float}:
        return all(map(isfinite, values))
    return kinds == {int} and min(values) >= -LARGEST_INTEGER and max(values) <= LARGEST_INTEGER


def _clean(value: Any) -> bool:
    kind = type(value)
    if kind is float:
        return isfinite(cast(float, value))
    if kind is int:
        return -LARGEST_INTEGER <= cast(int, value) <= LARGEST_INTEGER
    if kind is str:
        return _clean_text(value)
    return value is None or kind is bool


def _clean_text(text: str) -> bool:
    if "\x00" in text:
        return False
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _fault(value: Any) -> tuple[str, str]:
    if isinstance(value, float):
        return "not_finite", "Expected a finite number."
    if isinstance(value, int):
        return "integer_too_large", "Expected an integer within 2^53 of zero, as every JSON reader keeps it exact."
    return "invalid_text", "Expected text without NUL and without unpaired surrogates."


def _name_faults(members: dict[str, Any], pointer: str) -> Iterable[FieldError]:
    if isinstance(members, _Repeated):
        yield FieldError(pointer, "repeated_name", "Expected each field name once in an object.")
    # a name that is at fault is not repeated in the pointer: it could not be written
    if any(len(name) > MAX_NAME or not _clean_text(name) for name in members):
        message = f"Expected field names of at most {MAX_NAME} characters, without NUL and unpaired surrogates."
        yield FieldError(pointer, "invalid_name", message)


# --- pointers ---------------------------------------------------------------------------------------------------------


def pointer_to(pointer: str, part: str | int) -> str:
    """The JSON Pointer one level below another."""
    return f"{pointer}/{str(part).replace('~', '~0').replace('/', '~1')}"


def field_errors(errors: Sequence[Mapping[str, Any]], body: Any) -> list[FieldError]:
    """Validation errors of pydantic as ours: places in the submitted body, no echo of what was sent.

    Pydantic's places hold tags of unions, which the body does not have; so they are walked against the body.
    """
    found: dict[str, list[FieldError]] = {}
    for error in errors:
        one = _field_error(error, body)
        alternatives = found.setdefault(one.pointer, [])
        if one not in alternatives:
            alternatives.append(one)
    return [_merged(alternatives) for alternatives in list(found.values())[:MAX_ERRORS]]


def _field_error(error: Mapping[str, Any], body: Any) -> FieldError:
    place, *parts = error["loc"]
    context = error.get("ctx") or {}
    kind = error["type"]
    pointer = _walk(body, parts, missing=kind == "missing") if place == "body" else _joined(parts)
    match kind:
        case "extra_forbidden":
            return FieldError(pointer, "unknown_field", "This field is not known here.")
        case "model_attributes_type" | "model_type" | "dict_type":
            return FieldError(pointer, "object_type", "Expected an object.")
        case "union_tag_invalid":
            expected = str(context["expected_tags"]).replace("'", "")
            return FieldError(f"{pointer}/kind", "unknown_kind", f"Expected one of: {expected}.")
        case "union_tag_not_found":
            return FieldError(f"{pointer}/kind", "missing", "Expected an object with this field, which names its kind.")
        case "string_pattern_mismatch" if identifier := re.match(r"\^(\w+)_\[0-9a-f\]", context["pattern"]):
            prefix = identifier.group(1)
            return FieldError(pointer, "malformed_id", f"Expected an id: {prefix}_ and 32 hexadecimal digits.")
    # a validator of ours that looks at a whole object names the field in its context
    pointer = pointer_to(pointer, context["field"]) if "field" in context else pointer
    return FieldError(pointer, kind, error["msg"])


def _walk(body: Any, parts: Sequence[str | int], *, missing: bool) -> str:
    pointer, node, tagged = "", body, False
    for index, part in enumerate(parts):
        if missing and index == len(parts) - 1:
            return pointer_to(pointer, part)
        is_tag = isinstance(node, dict) and not tagged and node.get("kind") == part
        is_member = isinstance(node, dict) and part in node
        is_item = isinstance(node, list) and isinstance(part, int) and part < len(node)
        if is_tag or not (is_member or is_item):
            tagged = is_tag
            continue
        pointer, node, tagged = pointer_to(pointer, part), node[part], False
    return pointer


def _joined(parts: Sequence[str | int]) -> str:
    pointer = ""
    for part in parts:
        pointer = pointer_to(pointer, part)
    return pointer


def _merged(alternatives: list[FieldError]) -> FieldError:
    """One error of a field for which every member of a union gave its own."""
    if len(alternatives) == 1:
        return alternatives[0]
    messages = " Or: ".join(one.message for one in alternatives)
    return FieldError(alternatives[0].pointer, "no_alternative_fits", messages)
