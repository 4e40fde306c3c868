"""The gate: everything that is true of every request before a route sees it.

One layer of plain ASGI, because layers that wrap responses break streams, and because the act path has no time for
more. In this order: request id, Host, Origin, key, scope, size and media type of the body; then the act endpoint or
the application. What raises behind it becomes a problem document. Knows no feature and no table.
"""

import asyncio
import json
import logging
import re
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from hashlib import sha256
from time import monotonic, perf_counter, time
from typing import Any, Protocol

import uuid_utils
from starlette.requests import ClientDisconnect

from server.addresses import Hosts, Proxies
from server.errors import (
    PROBLEM_MEDIA_TYPE,
    ApiError,
    Forbidden,
    HostNotAllowed,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    OriginNotAllowed,
    PayloadTooLarge,
    Unauthorized,
    Unavailable,
    UnsupportedMediaType,
    problem,
)
from server.lanes import Lane
from server.logs import AccessLog, Answered, audit
from server.metrics import Metrics
from server.settings import Settings

__all__ = [
    "ACT_ROUTE",
    "KEY_CACHE_SECONDS",
    "SECURITY_HEADERS",
    "Asgi",
    "Caller",
    "Gate",
    "Receive",
    "Scope",
    "Send",
    "request_id_for",
]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

KEY_CACHE_SECONDS = 5.0
"""A revoked key works at most so long in each API process, while the database answers."""

KEY_WAIT_SECONDS = 2.0
"""How long a request with a key that was valid lately waits for the database to say so again."""

ACT_ROUTE = "/v1/policies/{policy_id}/act"

_MAX_CACHED = 10_000
_PROBES = frozenset({"/livez", "/readyz"})
_UNSEEN = _PROBES | {"/metrics"}
"""Asked so often by programs that a line for each would hide the others."""
_OPEN = _PROBES | {"/", "/docs", "/openapi.json"}
_OPEN_BELOW = "/docs/"
_ACT_PREFIX = "/v1/policies/"
_ACT_SUFFIX = "/act"
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._\-]{1,128}")
_SCHEME = re.compile(r"^https?://")
_COMPUTES = re.compile(r"/v1/training-jobs/[^/]*/updates/[^/]*")
"""What is read by computing it anew: a key that may only read what is kept must not take the processors."""
_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})
_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_FORWARDED = frozenset({b"x-forwarded-for", b"x-forwarded-prefix"})
_ONCE = (
    b"x-forwarded-prefix",
    b"host",
    b"origin",
    b"authorization",
    b"content-length",
    b"content-type",
    b"idempotency-key",
    b"x-idempotency-key",
)
SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
)
_PREFLIGHT_HEADERS = (
    (b"access-control-allow-methods", b"GET, HEAD, POST, DELETE"),
    (
        b"access-control-allow-headers",
        b"authorization, content-type, idempotency-key, if-none-match, if-range, last-event-id, range, x-request-id",
    ),
    (b"access-control-max-age", b"600"),
)
_EXPOSED_HEADERS = (
    b"access-control-expose-headers",
    b"accept-ranges, allow, content-disposition, content-range, etag, location, policy-age-seconds, retry-after, "
    b"x-request-id, x-should-retry",
)

_log = logging.getLogger(__name__)


class Caller(Protocol):
    """Who sends a request, as the key store says."""

    @property
    def key_id(self) -> str:
        """Id of the key, for the log."""
        ...

    @property
    def scopes(self) -> Collection[str]:
        """What the key allows: read, act, train, admin."""
        ...


class Gate:
    """The outermost ASGI application.

    Leaves `request_id`, `identity` and, for act, `policy_id` (as sent, not checked) in `scope["state"]`.

    Args:
        app: The application behind the gate.
        act: Answers POST /v1/policies/{policy_id}/act; no router stands before it.
        settings: Hosts, origins and the size of bodies.
        metrics: Counts and times requests.
        verify: The caller whose secret this is, or None; asked in a thread, at most every 5 seconds for one secret.
        anyone: The caller of every request when no keys are asked for.
        access: Where answered requests are written down, if anywhere.
        clock: Seconds that only rise, by which known keys grow old.
    """

    def __init__(
        self,
        app: Asgi,
        act: Asgi,
        *,
        settings: Settings,
        metrics: Metrics,
        verify: Callable[[str], Caller | None],
        anyone: Caller | None = None,
        access: AccessLog | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._app = app
        self._act = act
        self._metrics = metrics
        self._access = access
        self._max_body = settings.max_body_bytes
        self._anyone = anyone
        self._keys = _Keys(verify, clock, settings.key_outage_seconds)
        self._hosts = Hosts(settings)
        self._proxies = Proxies(settings)
        self._root_path = settings.root_path
        self._origins = frozenset(origin.lower() for origin in settings.allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection of the server."""
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            exchange = _Exchange(scope, send, self._metrics, headers.get(b"x-request-id"))
            if self._root_path or not _FORWARDED.isdisjoint(headers):
                self._behind_proxy(scope, headers, exchange)
            await self._http(scope, headers, receive, exchange)
            self._note(scope, exchange)
        elif scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def refused(self, answered: Answered) -> None:
        """Count and write down a request that was refused before it came here."""
        self._metrics.request_finished(answered.route, answered.method, answered.status or 0, answered.seconds)
        if self._access is not None and self._access.is_on:
            self._access.write(answered)

    def _behind_proxy(self, scope: Scope, headers: dict[bytes, bytes], exchange: "_Exchange") -> None:
        """Take from the path what stands before all paths, and the client from what a proxy of ours says."""
        client = scope.get("client")
        prefix: str | None = None
        if client and self._proxies.are_trusted(client[0]):
            exchange.address = self._proxies.client(headers, client[0])
            prefix = self._proxies.prefix(headers)
        exchange.prefix = self._root_path if prefix is None else prefix
        path = scope["path"]
        if exchange.prefix and f"{path}/".startswith(f"{exchange.prefix}/"):
            exchange.path = path[len(exchange.prefix) :] or "/"
        # what the router expects: the path with its prefix, whether the proxy has cut it off or not
        scope["root_path"], scope["path"] = exchange.prefix, exchange.prefix + exchange.path

    async def _http(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, exchange: "_Exchange") -> None:
        try:
            await self._pass(scope, headers, receive, exchange)
        except ApiError as error:
            await exchange.refuse(error)
        except asyncio.CancelledError:
            # the grace period of a stop is over, and what this request waits for is given up
            await exchange.refuse(Unavailable("The server is shutting down."))
        except ClientDisconnect:
            _log.debug("request %s: the client went away", exchange.request_id)
        # the last resort of the whole server
        except Exception:  # noqa: BLE001
            _log.exception("request %s: %s %s failed", exchange.request_id, scope["method"], exchange.path)
            await exchange.refuse(InternalError())

    def _note(self, scope: Scope, exchange: "_Exchange") -> None:
        """Write down what was answered, and once more what was destroyed."""
        if self._access is not None and self._access.is_on and exchange.path not in _UNSEEN:
            self._access.write(exchange.answered())
        if exchange.status is not None and exchange.status < 300 and _destroys(scope["method"], exchange.path):
            answered = exchange.answered()._asdict()
            del answered["ended_at"], answered["seconds"]
            audit(f"{scope['method']} {answered.pop('route')}", **answered)

    async def _pass(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, exchange: "_Exchange") -> None:
        state = scope.setdefault("state", {})
        state["request_id"] = exchange.request_id
        if len(headers) != len(scope["headers"]):
            _check_repeated(scope["headers"])
        method, path = scope["method"], exchange.path
        if path not in _PROBES and not self._hosts.allowed(headers.get(b"host", b"")):
            raise HostNotAllowed()
        if b"origin" in headers:
            exchange.origin = self._origin(headers)
            if method == "OPTIONS" and exchange.origin is not None and b"access-control-request-method" in headers:
                return await exchange.answer(204, _PREFLIGHT_HEADERS, b"")
        policy_id = _policy_to_act(path)
        if path not in _OPEN and not path.startswith(_OPEN_BELOW):
            state["identity"] = await self._caller(headers, _scope_of(method, path, policy_id))
        if method in _WITH_BODY:
            receive = self._body(headers, receive)
        if policy_id is None:
            if method == "HEAD":
                # what GET answers, without its body
                exchange.scope = {**scope, "method": "GET"}
                return await self._app(exchange.scope, receive, exchange.send_head)
            return await self._app(scope, receive, exchange.send)
        exchange.route = ACT_ROUTE
        if method == "OPTIONS":
            return await exchange.answer(204, [(b"allow", b"OPTIONS, POST")], b"")
        if method != "POST":
            raise MethodNotAllowed(headers={"allow": "OPTIONS, POST"})
        state["policy_id"] = policy_id
        await self._act(scope, receive, exchange.send)

    def _origin(self, headers: dict[bytes, bytes]) -> bytes | None:
        """The origin to name in CORS headers; None for a page of this server itself."""
        raw = headers[b"origin"]
        origin = raw.decode("latin-1").lower()
        if origin in self._origins:
            return raw
        # the Host was checked before, so this is not a name that somebody pointed at us
        if _SCHEME.sub("", origin) == headers.get(b"host", b"").decode("latin-1").lower():
            return None
        raise OriginNotAllowed()

    async def _caller(self, headers: dict[bytes, bytes], scope_name: str) -> Caller:
        caller = self._anyone or await self._keys.caller(headers.get(b"authorization"))
        if scope_name not in caller.scopes and "admin" not in caller.scopes:
            has = ", ".join(sorted(caller.scopes)) or "none"
            raise Forbidden(f"The key lacks the scope `{scope_name}`; it has: {has}.")
        return caller

    def _body(self, headers: dict[bytes, bytes], receive: Receive) -> Receive:
        length = headers.get(b"content-length")
        if length is None and b"transfer-encoding" not in headers:
            return _bounded(receive, self._max_body)
        if length != b"0":
            _check_media_type(headers)
        if length is None:
            return _bounded(receive, self._max_body)
        # the server hands over no more than was announced
        if not length.isdigit() or len(length) > 15 or int(length) > self._max_body:
            raise _too_large(self._max_body)
        return receive


class _Exchange:
    """One request's way back: what every response carries, and the count of it."""

    __slots__ = (
        "_began",
        "_method",
        "_metrics",
        "_send",
        "address",
        "origin",
        "path",
        "prefix",
        "request_id",
        "route",
        "scope",
        "status",
    )

    def __init__(self, scope: Scope, send: Send, metrics: Metrics, request_id: bytes | None) -> None:
        self.scope = scope
        self._method = scope["method"]
        self._send = send
        self._metrics = metrics
        self._began = perf_counter()
        self.request_id = request_id_for(request_id)
        client = scope.get("client")
        self.address: str | None = client[0] if client else None
        self.path: str = scope["path"]
        self.prefix = ""
        self.origin: bytes | None = None
        self.route: str | None = None
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        """Send a message of the response."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = message.get("headers", ())
            if self.prefix:
                headers = [(name, self._placed(value) if name == b"location" else value) for name, value in headers]
            headers = [*headers, (b"x-request-id", self.request_id.encode()), *SECURITY_HEADERS]
            if self.origin is not None:
                headers += [(b"access-control-allow-origin", self.origin), (b"vary", b"Origin"), _EXPOSED_HEADERS]
            message = {**message, "headers": headers}
            self._count(message["status"])
        await self._send(message)

    async def send_head(self, message: Message) -> None:
        """Send the head of a response, and nothing of its body; a stream ends with that."""
        if message["type"] == "http.response.start":
            await self.send(message)
            await self._send({"type": "http.response.body", "body": b""})

    def _placed(self, location: bytes) -> bytes:
        return self.prefix.encode() + location if location.startswith(b"/") else location

    async def answer(self, status: int, headers: Collection[tuple[bytes, bytes]], body: bytes) -> None:
        """Send a whole response."""
        await self.send({"type": "http.response.start", "status": status, "headers": list(headers)})
        await self.send({"type": "http.response.body", "body": body})

    async def refuse(self, error: ApiError) -> None:
        """Send a problem document; a response that has begun is cut off instead."""
        if self.status is not None:
            return
        body = json.dumps(problem(error, self.request_id)).encode()
        headers = [(name.encode(), value.encode("latin-1")) for name, value in error.headers.items()]
        headers += [(b"content-type", PROBLEM_MEDIA_TYPE.encode()), (b"content-length", str(len(body)).encode())]
        await self.answer(error.status, headers, body)

    def answered(self) -> Answered:
        """What there is to say of the request when it has ended."""
        caller: Caller | None = self.scope["state"].get("identity")
        return Answered(
            time(),
            self.request_id,
            None if caller is None else caller.key_id,
            self.address,
            self._method,
            self.path,
            self._template(),
            self.status,
            perf_counter() - self._began,
        )

    def _template(self) -> str:
        return self.route or str(getattr(self.scope.get("route"), "path", "unmatched"))

    def _count(self, status: int) -> None:
        # only the template of a route may become a label; paths are endless
        self._metrics.request_finished(self._template(), self._method, status, perf_counter() - self._began)


def request_id_for(sent: bytes | None) -> str:
    """The request id that a client has sent, if it can be one; otherwise a new one."""
    if sent is not None and _REQUEST_ID.fullmatch(sent):
        return sent.decode()
    return uuid_utils.uuid7().hex


class _Keys:
    """Callers by their secret, remembered for a few seconds. Only hashes of secrets are kept.

    While the database does not answer, a caller that it knew is trusted for longer, but not for ever.
    """

    def __init__(
        self, verify: Callable[[str], Caller | None], clock: Callable[[], float], outage_seconds: float
    ) -> None:
        self._verify = verify
        self._clock = clock
        self._outage_seconds = outage_seconds
        self._known: dict[bytes, tuple[Caller, float]] = {}
        # one question for each secret, however many requests wait for the answer
        self._asked: dict[bytes, tuple[asyncio.Task[Caller | None], float]] = {}
        self._lane = Lane(2)

    async def caller(self, authorization: bytes | None) -> Caller:
        if authorization is None:
            raise Unauthorized("Send an API key: `Authorization: Bearer <key>`.")
        digest = sha256(authorization).digest()
        known = self._known.get(digest)
        age = 0.0 if known is None else self._clock() - known[1]
        if known is not None and age < KEY_CACHE_SECONDS:
            return known[0]
        scheme, _, secret = authorization.decode("latin-1").partition(" ")
        if scheme.lower() != "bearer":
            raise Unauthorized("Send an API key: `Authorization: Bearer <key>`.")
        trusted = known is not None and age < self._outage_seconds
        try:
            caller = await self._answer(digest, secret.strip(), patient=not trusted)
        except Unavailable:
            if known is None or not trusted:
                raise
            return known[0]
        if caller is None:
            raise Unauthorized("The API key is unknown or revoked.")
        return caller

    async def _answer(self, digest: bytes, secret: str, *, patient: bool) -> Caller | None:
        """What the database says; who is not patient does not wait for one that hangs.

        Raises:
            Unavailable: if it does not answer, or not in time.
        """
        task, asked_at = self._asked.get(digest) or (None, 0.0)
        if task is None:
            task, asked_at = asyncio.create_task(self._ask(digest, secret)), monotonic()
            # where nobody waits any more, nobody has to hear of a failure
            task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            self._asked[digest] = (task, asked_at)
        seconds = None if patient else max(0.0, asked_at + KEY_WAIT_SECONDS - monotonic())
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if not done:
            raise Unavailable("The database does not answer.")
        return task.result()

    async def _ask(self, digest: bytes, secret: str) -> Caller | None:
        asked_at = self._clock()
        try:
            caller = await self._lane.run(self._verify, secret)
        finally:
            del self._asked[digest]
        if caller is None:
            self._known.pop(digest, None)
            return None
        if len(self._known) >= _MAX_CACHED:
            self._known.clear()
        self._known[digest] = (caller, asked_at)
        return caller


def _check_repeated(headers: Collection[tuple[bytes, bytes]]) -> None:
    # two readers that pick different ones of two values can be played off against each other
    for name in _ONCE:
        if sum(n == name for n, _ in headers) > 1:
            raise InvalidRequest(f"The header {name.decode()} may occur once.")


def _policy_to_act(path: str) -> str | None:
    """The policy that is asked to act, or None for every other path."""
    if not path.endswith(_ACT_SUFFIX) or not path.startswith(_ACT_PREFIX):
        return None
    policy_id = path[len(_ACT_PREFIX) : -len(_ACT_SUFFIX)]
    return policy_id if policy_id and "/" not in policy_id else None


def _scope_of(method: str, path: str, policy_id: str | None) -> str:
    """Which scope a request needs; a route that does not exist yet is covered, too."""
    if policy_id is not None:
        return "act"
    return "read" if method in _READING and not _COMPUTES.fullmatch(path) else "train"


def _destroys(method: str, path: str) -> bool:
    return method == "DELETE" or (method == "POST" and path.endswith("/cancel"))


def _check_media_type(headers: dict[bytes, bytes]) -> None:
    media_type = headers.get(b"content-type", b"")
    if media_type != b"application/json" and media_type.partition(b";")[0].strip().lower() != b"application/json":
        raise UnsupportedMediaType("Send JSON, with the header `Content-Type: application/json`.")
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise UnsupportedMediaType("Send the body without Content-Encoding.")


def _bounded(receive: Receive, limit: int) -> Receive:
    """A body of unannounced length, read up to the limit."""
    taken = 0

    async def bounded() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > limit:
            raise _too_large(limit)
        return message

    return bounded


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"A body may have {limit} bytes (PGENGINE_MAX_BODY_BYTES).")
