"""What a route gets from its request: a body read strictly, the caller, the database.

Knows HTTP and FastAPI; knows no feature.
"""

import re
from asyncio import iscoroutinefunction
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Union, cast, get_args, get_origin

from fastapi import Depends, Header, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.dependencies.models import Dependant
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo
from sqlalchemy.orm import Session
from starlette.datastructures import QueryParams

from server.bodies import LARGEST_INTEGER, MAX_ERRORS, MAX_NAME, decode, takes_long
from server.database import Database
from server.errors import FieldError, InvalidRequest, NotAcceptable, invalid, pointer_to
from server.faults import value_at, walked
from server.idempotency import LONGEST_KEY, Reply, Today, kept, once
from server.lanes import Lanes
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
    "Threads",
    "check_parameters",
    "invalid",
    "negotiated",
    "written",
]


async def _database(request: Request) -> Database:
    return cast(Database, request.app.state.database)


async def _settings(request: Request) -> Settings:
    return cast(Settings, request.app.state.settings)


async def _lanes(request: Request) -> Lanes:
    return cast(Lanes, request.app.state.lanes)


Db = Annotated[Database, Depends(_database)]
"""The database; a route opens its own transaction, so that it is committed before the response is sent."""
Configured = Annotated[Settings, Depends(_settings)]
"""The server's settings."""
Threads = Annotated[Lanes, Depends(_lanes)]
"""Threads for what an asynchronous route asks of the database; a plain route is in its lane as a whole."""

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


class _Creation:
    """A request that creates something, and answers the same when it is repeated with its Idempotency-Key."""

    def __init__(self, request: Request, key: str | None) -> None:
        self._request = request
        self._key = key

    @property
    def key_id(self) -> str:
        """Whose request it is."""
        key_id: str = self._request.state.identity.key_id
        return key_id

    def answer(self, session: Session, create: Callable[[], Reply], today: Today) -> Reply:
        """What `create` answers, or what it has answered before.

        Args:
            session: The writing transaction in which `create` works; nothing may have been written in it yet.
            create: Creates and answers.
            today: The answer as it would be now.
        """
        return once(session, *self._identity(), create, today)

    def answered(self, database: Database, today: Today) -> Reply | None:
        """What was answered before, or None: asked before the work that `create` needs done."""
        if self._key is None:
            return None
        with database.read() as session:
            return kept(session, *self._identity(), today)

    def _identity(self) -> tuple[str, str | None, str, bytes]:
        state = self._request.state
        route = f"{self._request.method} {self._request.scope['route'].path}"
        return self.key_id, self._key, route, state.body


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
    """A route that reads its JSON body by `decode`, and its parameters strictly.

    Unknown ones are refused, single ones may stand once, lists are repeated or separated by commas, and a whole number
    is written in digits. A plain function runs in a thread of the lane for what reads, or of that for what writes.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, with parameters checked and the body read before it."""
        handle = self._in_lane(super().get_route_handler())
        known = dict(_parameters(self.dependant))
        whole = [field.alias for field in self.dependant.path_params if _type_of(field.field_info) is int]
        has_body = self.body_field is not None

        async def strict(request: Request) -> Response:
            query = _read_query(request.query_params.multi_items(), known)
            _check_whole({name: request.path_params[name] for name in whole})
            raw, value = b"", None
            if has_body:
                raw = await request.body()
                depth = cast(Settings, request.app.state.settings).max_body_depth
                value = await run_in_threadpool(decode, raw, depth) if takes_long(raw) else decode(raw, depth)
                # what was sent, to the byte, is what an Idempotency-Key stands for
                request.state.body = raw
            try:
                return await handle(_Strict(request, query, raw, value))
            except RequestValidationError as error:
                # nothing of the route has run yet
                if not (has_body and _mend_whole(error.errors(), value)):
                    raise
            return await handle(_Strict(request, query, raw, value))

        return strict

    def _in_lane(
        self, handle: Callable[[Request], Coroutine[Any, Any, Response]]
    ) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        if iscoroutinefunction(self.endpoint):
            return handle
        writes = not (self.methods or set()) <= {"GET", "HEAD"}

        async def in_lane(request: Request) -> Response:
            lanes = cast(Lanes, request.app.state.lanes)
            # its place is free before the answer is sent, which may take as long as the client likes
            async with (lanes.writing if writes else lanes.reading).place():
                return await handle(request)

        return in_lane


def _mend_whole(errors: Sequence[Any], body: Any) -> bool:
    """Make integers of whole numbers such as 100.0 where integers are expected; says whether there were any.

    JSON and its schemas know one kind of number, and some clients write all of them with a point. Done after the fact,
    so that it costs nothing where nothing is to be done.
    """
    mended = False
    for error in errors:
        place, *loc = error["loc"]
        if place != "body" or error["type"] != "int_type":
            continue
        *parent, last = walked(body, loc)
        holder = value_at(body, parent)
        # a list of integers says its first fault only
        places = range(len(holder)) if isinstance(holder, list) else [last]
        for place in places:
            number = holder[place]
            if isinstance(number, float) and number.is_integer() and abs(number) <= LARGEST_INTEGER:
                holder[place] = int(number)
                mended = True
    return mended


def _parameters(dependant: Dependant) -> Iterator[tuple[str, Any]]:
    """Names and types of the query parameters that a route and its dependencies read; None for lists of any type."""
    for field in dependant.query_params:
        model = field.field_info.annotation
        if isinstance(model, type) and issubclass(model, BaseModel):
            yield from ((name, _type_of(inner)) for name, inner in model.model_fields.items())
        else:
            yield field.alias, _type_of(field.field_info)
    for inner in dependant.dependencies:
        yield from _parameters(inner)


def _type_of(field: FieldInfo) -> Any:
    """What a single parameter is, or `list`, whether or not it may be absent."""
    annotation = field.annotation
    members = [one for one in get_args(annotation) if one is not type(None)]
    if get_origin(annotation) in (Union, UnionType) and len(members) == 1:
        annotation = members[0]
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return get_origin(annotation) or annotation


def _read_query(items: Sequence[tuple[str, str]], known: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The parameters of a query, lists written out."""
    check_parameters([name for name, _ in items], known)
    counts = Counter(name for name, _ in items)
    repeated = [name for name, count in counts.items() if count > 1 and known[name] is not list]
    if repeated:
        message = "This parameter may stand once."
        raise InvalidRequest(
            errors=[FieldError(pointer_to("", name), "repeated_parameter", message) for name in repeated]
        )
    _check_whole({name: value for name, value in items if known[name] is int})
    return [(name, one) for name, value in items for one in (_listed(value) if known[name] is list else [value])]


def _listed(value: str) -> list[str]:
    # what holds no name at all stays, so that it is not taken for absent
    return [name for part in value.split(",") if (name := part.strip())] or [""]


def _check_whole(values: Mapping[str, str]) -> None:
    """Whether parameters that are whole numbers are written so: Python also reads `1_0`, ` 1`, `+1`, `1.0` and `１`.

    Raises:
        InvalidRequest: naming those that are not.
    """
    faults = [name for name, value in values.items() if not re.fullmatch(r"-?[0-9]+", value)]
    if faults:
        message = "Expected a whole number, written with the digits 0 to 9 alone."
        raise InvalidRequest(errors=[FieldError(pointer_to("", name), "int_parsing", message) for name in faults])


def check_parameters(names: Iterable[str], known: Collection[str]) -> None:
    """Whether a route has these query parameters; one that it ignored would probably be misspelt.

    Raises:
        InvalidRequest: naming those that it has not.
    """
    unknown = dict.fromkeys(name for name in names if name not in known)
    if unknown:
        expected = f"expected {', '.join(sorted(known))}" if known else "this route has none"
        message = f"This parameter is not known here; {expected}."
        faults = [FieldError(pointer_to("", name[:MAX_NAME]), "unknown_field", message) for name in unknown]
        raise InvalidRequest(errors=faults[:MAX_ERRORS])


class _Strict(Request):
    """A request whose query and body have been read."""

    def __init__(self, request: Request, query: list[tuple[str, str]], raw: bytes, value: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._query_params = QueryParams(query)
        self._body = raw
        self._value = value

    async def json(self) -> Any:
        return self._value
