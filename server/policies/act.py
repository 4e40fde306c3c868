"""Asking a policy for actions: the one path of the server that is made for speed.

    body → typed request → loaded policy (memory) → observations → actions → answer

A raw ASGI application, dispatched before FastAPI's router. It opens no transaction while the policy is in memory
(`loaded`). Whatever is long (a miss, a large body, a large batch) runs in a thread, so that small requests do not wait
behind it; large requests wait for one another, so that their memory does not add up.
"""

import asyncio
import gc
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
from starlette.datastructures import QueryParams
from starlette.requests import ClientDisconnect

from pgengine.errors import ObservationError
from pgengine.spec import LARGEST_INTEGER
from server.bodies import check_containers, decode
from server.database import Database
from server.errors import FieldError, InvalidRequest, invalid, pointer_to
from server.metrics import Metrics
from server.policies.batches import Rows, rows_of
from server.policies.loaded import CHECKPOINT_EXPECTED, STALE_SECONDS, Loaded, PolicyCache
from server.request import check_parameters

__all__ = ["OPENAPI", "STALE_SECONDS", "ActEndpoint"]

INLINE_BYTES = 8_192
SMALL_BYTES = 512
INLINE_WORK = 4_000_000
"""Bodies of so many bytes, and so many multiplications, take about half a millisecond on one core and stay on the
event loop, where a thread would add a tenth of a millisecond to each; what is larger would keep others waiting."""

IN_PIECES = 1_000_000
"""Bodies of so many bytes are not made into lists all at once."""

LARGE_AT_ONCE = 2
"""Larger requests that are read or computed at the same time: each takes memory, and a core."""

MOST_NUMBERS = 4_000_000
"""Numbers of probabilities, means or samples in the answer to a batch."""

AGE_HEADER = "Policy-Age-Seconds"

T = TypeVar("T")
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class ActRequest(msgspec.Struct, forbid_unknown_fields=True, frozen=True, gc=False):
    """The body of a request for actions. Observations stay as they came; the policy knows what they must look like."""

    observation: Any = msgspec.UNSET
    observations: list[Any] | msgspec.UnsetType = msgspec.UNSET
    history: Any = msgspec.UNSET
    histories: list[Any] | msgspec.UnsetType = msgspec.UNSET
    deterministic: bool = False
    seed: Annotated[int, msgspec.Meta(ge=0, le=LARGEST_INTEGER)] | None = None
    checkpoint: str = "latest"


class _Unread(ActRequest, frozen=True, gc=False):
    """The same, with batches that are not read yet: JSON, and then its rows."""

    observations: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET  # type: ignore[assignment]
    histories: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET  # type: ignore[assignment]


class ActEndpoint:
    """Answers `POST /v1/policies/{policy_id}/act`.

    Args:
        database: Where policies are read from when they are not in memory.
        metrics: What counts the answers.
        max_batch: Most observations, or histories, in one request.
        max_depth: How many lists and objects may lie inside each other in a body.
        cache_policies: Most policies kept in memory.
        cache_bytes: Most bytes of checkpoints kept in memory; the newest one is kept however large it is.
    """

    def __init__(
        self,
        database: Database,
        *,
        metrics: Metrics,
        max_batch: int,
        max_depth: int,
        cache_policies: int = 64,
        cache_bytes: int = 256 * 2**20,
    ) -> None:
        self._cache = PolicyCache(database, cache_policies, cache_bytes)
        self._metrics = metrics
        self._max_batch = max_batch
        self._max_depth = max_depth
        self._large = ThreadPoolExecutor(LARGE_AT_ONCE, thread_name_prefix="act")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request.

        Raises:
            ApiError: before anything is sent; the gate writes it as a problem document.
        """
        if scope["query_string"]:
            check_parameters(QueryParams(scope["query_string"]), ())
        body = await _read(receive)
        began = time.perf_counter()
        request = await self._request(body)
        rows = self._rows(request)
        loaded, age = self._cache.peek(scope["state"]["policy_id"], request.checkpoint), 0.0
        if loaded is None:
            loaded, age = await self._cache.find(scope["state"]["policy_id"], request.checkpoint)
        if len(body) <= INLINE_BYTES and rows * loaded.work <= INLINE_WORK:
            answer = self._answer(loaded, request, body)
        else:
            answer = await self._apart(self._answer, loaded, request, body)
        self._metrics.act_answered(rows, time.perf_counter() - began)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(answer)).encode())]
        if age >= STALE_SECONDS:
            headers.append((AGE_HEADER.lower().encode(), str(int(age)).encode()))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    async def stop(self) -> None:
        """Waits a moment for what is still being read."""
        self._large.shutdown(wait=False, cancel_futures=True)
        await self._cache.stop()

    def _answer(self, loaded: Loaded, request: ActRequest, body: bytes) -> bytes:
        field, value = _asked(request)
        _check_memory(loaded, field)
        if field in _BATCHES:
            _check_numbers(loaded, field, value)
        try:
            observations = _observations(loaded, field, value)
        except msgspec.DecodeError as error:
            raise _explain(decode(body, self._max_depth, MAX_CONTAINERS), error) from None
        # one number tells whether a large one may be among them: no square is larger than the sum of all
        if _squares(loaded, observations) >= _LARGE_SQUARE:
            decode(body, self._max_depth, MAX_CONTAINERS)
        return _written(loaded, request, observations, field)

    async def _request(self, body: bytes) -> ActRequest:
        if len(body) <= INLINE_BYTES:
            return _decode(body, self._max_depth)
        return await self._apart(_decode, body, self._max_depth)

    async def _apart(self, compute: Callable[..., T], *arguments: Any) -> T:
        """Runs what is large in one of the few threads for it, when its turn comes."""
        return await asyncio.get_running_loop().run_in_executor(self._large, compute, *arguments)

    def _rows(self, request: ActRequest) -> int:
        """How many observations or histories there are; refuses none, several kinds, and too many."""
        field, value = _asked(request)
        if field not in _BATCHES:
            return 1
        rows = len(value)
        if not 1 <= rows <= self._max_batch:
            code = "too_short" if rows == 0 else "too_long"
            raise invalid(f"/{field}", code, f"Expected 1 to {self._max_batch} {field}.")
        return rows


# --- body -------------------------------------------------------------------------------------------------------------


async def _read(receive: Receive) -> bytes:
    message = await receive()
    body: bytes = message.get("body", b"")
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    if not message.get("more_body", False):
        return body
    parts = [body]
    while message.get("more_body", False):
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
    return b"".join(parts)


_decoder = msgspec.json.Decoder(ActRequest)
_unread_decoder = msgspec.json.Decoder(_Unread)
_EXTREME = re.compile(rb"[eE][-+]?0*[123]\d\d")
"""Numbers near the smallest or the largest float: for each of them msgspec takes eight microseconds, which is a hundred
times as long as for others and five times as long as Python's own reader."""
MAX_CONTAINERS = 1_000_000
"""Lists of the largest batch of histories, or of images whose pixels are lists of their colours."""
_FIELD = re.compile(r"`\$\.(\w+)")
_NAMES = tuple(f'"{name}"'.encode() for name in ActRequest.__struct_fields__)
_LARGE_SQUARE = float(LARGEST_INTEGER + 1) ** 2
_EXPECTED = {
    "observations": ("list_type", "Expected a list of observations."),
    "histories": ("list_type", "Expected a list of histories, each of them a list of observations."),
    "deterministic": ("bool_type", "Expected true or false."),
    "seed": ("int_type", f"Expected an integer from 0 to {LARGEST_INTEGER}, or null."),
    "checkpoint": CHECKPOINT_EXPECTED,
}


def _decode(body: bytes, max_depth: int) -> ActRequest:
    """The request, checked as far as it can be without the policy."""
    if len(body) > INLINE_BYTES:
        check_containers(body, MAX_CONTAINERS)
    try:
        if len(body) > SMALL_BYTES and _EXTREME.search(body):
            return msgspec.convert(decode(body, max_depth, MAX_CONTAINERS), ActRequest)
        request = _decoder.decode(body) if len(body) <= INLINE_BYTES else _decode_large(body)
    except (ValueError, RecursionError) as error:
        # the reader that all other routes use takes longer, and says where and what is wrong
        value = decode(body, max_depth, MAX_CONTAINERS)
        if (mended := _with_whole_seed(value)) is not None:
            return mended
        raise _explain(value, error) from None
    # msgspec keeps the last of repeated names; a body with two quotes has a single one
    if body.count(b'"') > 2 and (b"\\" in body or any(body.count(name) > 1 for name in _NAMES)):
        decode(body, max_depth, MAX_CONTAINERS)
    return request


def _with_whole_seed(value: Any) -> ActRequest | None:
    """The request with a seed such as 7.0 as the integer that it is; None if that is not what was wrong."""
    seed = value.get("seed") if isinstance(value, dict) else None
    if not isinstance(seed, float) or not seed.is_integer():
        return None
    try:
        return msgspec.convert(value | {"seed": int(seed)}, ActRequest)
    except msgspec.ValidationError:
        return None


def _decode_large(body: bytes) -> ActRequest:
    if len(body) >= IN_PIECES and (request := _in_pieces(body)) is not None:
        return request
    # looking for garbage after every few hundred new lists takes ten times as long as reading them does
    collects = gc.isenabled()
    gc.disable()
    try:
        return _decoder.decode(body)
    finally:
        if collects:
            gc.enable()


def _in_pieces(body: bytes) -> ActRequest | None:
    """The request with rows that are not read yet; None if it has no batch of lists."""
    request = _unread_decoder.decode(body)
    rows = {name: rows_of(memoryview(batch)) for name in _BATCHES if (batch := getattr(request, name))}
    return msgspec.structs.replace(request, **rows) if rows and None not in rows.values() else None


def _explain(value: Any, error: Exception) -> InvalidRequest:
    """Why a body that is good JSON is no request."""
    if not isinstance(value, dict):
        return invalid("", "object_type", "Expected an object.")
    fields = ActRequest.__struct_fields__
    unknown = [name for name in value if name not in fields][:20]
    if unknown:
        message = f"This field is not known here; expected {', '.join(fields)}."
        return InvalidRequest(
            errors=[FieldError(pointer_to("", name), "unknown_field", message) for name in unknown[:20]]
        )
    field = _FIELD.search(str(error))
    name = field[1] if field else "observation"
    return invalid(f"/{name}", *_EXPECTED.get(name, ("observation_kind", "Expected numbers.")))


# --- answer -----------------------------------------------------------------------------------------------------------

_encode = msgspec.json.Encoder().encode


_BATCHES = ("observations", "histories")
_HISTORIES = ("history", "histories")


def _asked(request: ActRequest) -> tuple[str, Any]:
    """The one field that says what was observed, and its value."""
    # the most common one first, and without a loop: this is asked for each action
    one = request.observation
    if one is not msgspec.UNSET and request.observations is request.history is request.histories is msgspec.UNSET:
        return "observation", one
    given = [(name, value) for name in _ASKED if (value := getattr(request, name)) is not msgspec.UNSET]
    if len(given) == 1:
        return given[0]
    what = "Expected one of observation and observations, or of history and histories for a policy with memory"
    if given:
        raise invalid(f"/{given[1][0]}", "conflict", f"{what}, not several.")
    raise invalid("/observation", "missing", f"{what}.")


_ASKED = ("observation", "observations", "history", "histories")


def _check_memory(loaded: Loaded, field: str) -> None:
    if loaded.has_memory is (field in _HISTORIES):
        return
    if loaded.has_memory:
        k = loaded.policy.memory
        several = field in _BATCHES
        what = f"histories, each a list of up to {k}" if several else f"history, a list of up to {k}"
        message = f"This policy reads the last {k} observations: send {what}, the newest last."
        raise invalid(f"/{field}", "history_expected", message)
    raise invalid(f"/{field}", "no_memory", "This policy reads a single observation: send observation.")


def _check_numbers(loaded: Loaded, field: str, value: list[Any]) -> None:
    width = loaded.policy.distribution.width
    if len(value) > 1 and len(value) * width > MOST_NUMBERS:
        most = max(1, MOST_NUMBERS // width)
        message = f"Expected 1 to {most} {field}: the answer to each has {width} numbers."
        raise invalid(f"/{field}", "too_long", message)


def _squares(loaded: Loaded, observations: np.ndarray) -> float:
    if loaded.has_memory:
        # places of a window that are not filled yet are not numbers
        return float(np.fmax.reduce(np.abs(observations), axis=None)) ** 2
    return float(np.vdot(observations, observations))


def _observations(loaded: Loaded, field: str, value: Any) -> np.ndarray:
    if not isinstance(value, Rows):
        return _parsed(loaded, field, value)
    return np.concatenate([_parsed(loaded, field, rows, first) for first, rows in value.pieces()])


def _parsed(loaded: Loaded, field: str, value: Any, first: int = 0) -> np.ndarray:
    """What is seen, of rows the first of which has this number."""
    batch = field in _BATCHES
    try:
        try:
            return loaded.policy.parse(value, batch=batch)
        except ObservationError as error:
            if error.code != "observation_kind":
                raise
            # JSON knows one kind of number: 3.0 is the integer 3, as the schema of the observation says
            return loaded.policy.parse(_with_integers(value), batch=batch)
    except ObservationError as error:
        pointer = _counted_on(error.pointer, first) if batch else error.pointer
        raise invalid(f"/{field}{pointer}", error.code, error.message) from None


def _counted_on(pointer: str, first: int) -> str:
    """A pointer into some rows as one into all of them."""
    row = re.match(r"/(\d+)", pointer)
    return pointer if row is None else f"/{first + int(row[1])}{pointer[row.end() :]}"


def _with_integers(value: Any) -> Any:
    """Nested lists with whole numbers such as 3.0 as integers."""
    if isinstance(value, list):
        return [_with_integers(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _written(loaded: Loaded, request: ActRequest, observations: np.ndarray, field: str) -> bytes:
    """The whole answer as JSON; numbers that are not finite are null."""
    try:
        acted = loaded.policy.answer(observations, seed=request.seed, deterministic=request.deterministic)
    except ObservationError as error:
        # here the pointer counts rows, of which a single observation is the only one
        pointer = error.pointer if field in _BATCHES else ""
        raise invalid(f"/{field}{pointer}", error.code, error.message) from None
    answer: dict[str, Any]
    if field in _BATCHES:
        answer = {"actions": acted.actions.tolist(), "log_probs": acted.log_probs.tolist()}
        if acted.probabilities is not None:
            answer["probabilities"] = _by_row(acted.probabilities)
        if acted.mean is not None and acted.sigma is not None:
            answer["means"] = acted.mean.tolist()
            answer["sigmas"] = np.broadcast_to(acted.sigma, acted.mean.shape).tolist()
            answer["samples"] = acted.samples.tolist()
    else:
        answer = {"action": acted.actions[0].tolist(), "log_prob": acted.log_probs[0].tolist()}
        if acted.probabilities is not None:
            answer["probabilities"] = _by_row(acted.probabilities)[0]
        if acted.mean is not None and acted.sigma is not None:
            answer["mean"] = acted.mean[0].tolist()
            answer["sigma"] = np.broadcast_to(acted.sigma, acted.mean.shape)[0].tolist()
            answer["sample"] = acted.samples[0].tolist()
    answer["checkpoint_id"] = loaded.checkpoint_id
    answer["updates"] = loaded.updates
    return _encode(answer)


def _by_row(probabilities: np.ndarray | list[np.ndarray]) -> list[Any]:
    """Probabilities as lists, row by row; of an action of several components a list for each of them."""
    if isinstance(probabilities, list):
        return [list(row) for row in zip(*(component.tolist() for component in probabilities), strict=True)]
    rows: list[Any] = probabilities.tolist()
    return rows


# --- description ------------------------------------------------------------------------------------------------------

_OBSERVATION: dict[str, Any] = {
    "description": (
        "One observation: an integer of a discrete space, a nested list of numbers of a box, a list of integers of a "
        "multi_discrete or multi_binary space."
    ),
    "anyOf": [{"type": "integer"}, {"type": "number"}, {"type": "array", "items": {}}],
}
_ACTION: dict[str, Any] = {
    "description": "One action for the environment: an integer, a list of integers, or a nested list of numbers.",
    "anyOf": [{"type": "integer"}, {"type": "number"}, {"type": "array", "items": {}}],
}
_NUMBER: dict[str, Any] = {"type": ["number", "null"]}
_NUMBERS: dict[str, Any] = {"type": "array", "items": _NUMBER}
_ROWS: dict[str, Any] = {"type": "array", "items": _NUMBERS}
_HISTORY: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "items": _OBSERVATION,
    "description": (
        "The last observations of an episode, oldest first, as many as there are and at most as many as the policy "
        "reads (`memory`)."
    ),
}
_PROBABILITIES: dict[str, Any] = {
    "type": "array",
    "items": {"anyOf": [_NUMBER, _NUMBERS]},
    "description": (
        "Of each action; of a multi_discrete action a list for each component; of a multi_binary action the "
        "probability of 1 for each component."
    ),
}
_PROBABILITY_ROWS: dict[str, Any] = {"type": "array", "items": _PROBABILITIES}
_CHECKPOINT: dict[str, Any] = {
    "checkpoint_id": {"type": "string", "description": "Exactly the checkpoint that answered."},
    "updates": {"type": "integer", "description": "Updates that it has had."},
}
_HOW: dict[str, Any] = {
    "deterministic": {
        "type": "boolean",
        "default": False,
        "description": "The most probable action instead of a draw.",
    },
    "seed": {
        "type": ["integer", "null"],
        "minimum": 0,
        "maximum": LARGEST_INTEGER,
        "default": None,
        "description": (
            "Makes the draws repeatable. Row i draws the same in every batch that has a row i, so the first row of a "
            "batch gets what the single observation gets. Null draws from the operating system."
        ),
    },
    "checkpoint": {
        "type": "string",
        "default": "latest",
        "description": "`latest`, `best` (highest mean return in a selection), or the id of a checkpoint.",
    },
}

OPENAPI: dict[str, Any] = {
    "operationId": "act",
    "summary": "Ask a policy for actions",
    "description": (
        "Answers before, while and after the policy trains. A policy with memory (`memory` above 1) is asked with "
        "`history` or `histories`, any other with `observation` or `observations`. What `latest` and `best` mean, and "
        f"whether the policy still exists, is at most {STALE_SECONDS:g} seconds old; the answer names the checkpoint "
        "that gave it. While the server's database does not answer, a policy that is in memory goes on acting, and "
        f"`{AGE_HEADER}` says how old the knowledge of it is; a policy that is not is 503."
    ),
    "tags": ["policies"],
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "oneOf": [
                        {
                            "title": "ActOnOne",
                            "type": "object",
                            "additionalProperties": False,
                            "required": ["observation"],
                            "properties": {"observation": _OBSERVATION, **_HOW},
                        },
                        {
                            "title": "ActOnBatch",
                            "type": "object",
                            "additionalProperties": False,
                            "required": ["observations"],
                            "properties": {
                                "observations": {"type": "array", "minItems": 1, "items": _OBSERVATION},
                                **_HOW,
                            },
                        },
                        {
                            "title": "ActOnHistory",
                            "type": "object",
                            "additionalProperties": False,
                            "required": ["history"],
                            "properties": {"history": _HISTORY, **_HOW},
                        },
                        {
                            "title": "ActOnHistories",
                            "type": "object",
                            "additionalProperties": False,
                            "required": ["histories"],
                            "properties": {
                                "histories": {"type": "array", "minItems": 1, "items": _HISTORY},
                                **_HOW,
                            },
                        },
                    ]
                },
                "examples": {
                    "one": {"value": {"observation": [0.01, -0.02, 0.03, 0.04]}},
                    "batch": {"value": {"observations": [[0.01, -0.02, 0.03, 0.04]], "deterministic": True}},
                },
            }
        },
    },
    "responses": {
        "200": {
            "headers": {
                AGE_HEADER: {
                    "description": (
                        "Only while the database does not answer: seconds since it was last known which checkpoint "
                        "is the newest, and that the policy exists."
                    ),
                    "schema": {"type": "integer"},
                }
            },
            "description": (
                "The action and its log-probability; of a softmax policy the probabilities, of a Gaussian policy mean, "
                "sigma and the raw draw that the log-probability belongs to, "
                "in the `unit` of the distribution. For a batch the same in plural."
            ),
            "content": {
                "application/json": {
                    "schema": {
                        "oneOf": [
                            {
                                "title": "Acted",
                                "type": "object",
                                "required": ["action", "log_prob", "checkpoint_id", "updates"],
                                "properties": {
                                    "action": _ACTION,
                                    "log_prob": _NUMBER,
                                    "probabilities": _PROBABILITIES,
                                    "mean": _NUMBERS,
                                    "sigma": _NUMBERS,
                                    "sample": _NUMBERS,
                                    **_CHECKPOINT,
                                },
                            },
                            {
                                "title": "ActedBatch",
                                "type": "object",
                                "required": ["actions", "log_probs", "checkpoint_id", "updates"],
                                "properties": {
                                    "actions": {"type": "array", "items": _ACTION},
                                    "log_probs": _NUMBERS,
                                    "probabilities": _PROBABILITY_ROWS,
                                    "means": _ROWS,
                                    "sigmas": _ROWS,
                                    "samples": _ROWS,
                                    **_CHECKPOINT,
                                },
                            },
                        ]
                    }
                }
            },
        }
    },
}
"""The OpenAPI operation, as it stands under `paths`: no route of FastAPI describes this endpoint."""
