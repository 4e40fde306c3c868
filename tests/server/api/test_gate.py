"""What is true of every request: who may ask, from where, and how much."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from server.addresses import Proxies
from server.database import Database
from server.keys import store as keys
from server.middleware import KEY_CACHE_SECONDS
from server.settings import Settings
from server.tables import ApiKey

OBJECT = "0" * 32
ROUTES = [
    ("GET", "/v1/environment-types", "read"),
    ("GET", "/v1/environments", "read"),
    ("GET", f"/v1/environments/env_{OBJECT}", "read"),
    ("POST", "/v1/environments", "train"),
    ("DELETE", f"/v1/environments/env_{OBJECT}", "train"),
    ("GET", "/v1/policies", "read"),
    ("GET", f"/v1/policies/pol_{OBJECT}", "read"),
    ("GET", f"/v1/policies/pol_{OBJECT}/checkpoints", "read"),
    ("POST", "/v1/policies", "train"),
    ("POST", f"/v1/policies/pol_{OBJECT}/act", "act"),
    ("DELETE", f"/v1/policies/pol_{OBJECT}", "train"),
    ("GET", "/v1/training-jobs", "read"),
    ("GET", f"/v1/training-jobs/job_{OBJECT}", "read"),
    ("GET", f"/v1/training-jobs/job_{OBJECT}/events", "read"),
    ("GET", f"/v1/training-jobs/job_{OBJECT}/metrics", "read"),
    ("GET", f"/v1/training-jobs/job_{OBJECT}/checkpoints", "read"),
    ("POST", "/v1/training-jobs", "train"),
    ("POST", f"/v1/training-jobs/job_{OBJECT}/cancel", "train"),
    ("DELETE", f"/v1/training-jobs/job_{OBJECT}", "train"),
    ("GET", f"/v1/checkpoints/ckpt_{OBJECT}", "read"),
    ("GET", f"/v1/checkpoints/ckpt_{OBJECT}/content", "read"),
    ("GET", f"/v1/training-jobs/job_{OBJECT}/updates/1", "train"),
    ("GET", f"/v1/checkpoints/ckpt_{OBJECT}/parameters", "read"),
    ("GET", "/v1/gradient-checks", "read"),
    ("GET", f"/v1/gradient-checks/job_{OBJECT}", "read"),
    ("GET", f"/v1/gradient-checks/job_{OBJECT}/events", "read"),
    ("POST", "/v1/gradient-checks", "train"),
    ("POST", f"/v1/gradient-checks/job_{OBJECT}/cancel", "train"),
    ("DELETE", f"/v1/gradient-checks/job_{OBJECT}", "train"),
    ("GET", "/metrics", "read"),
    ("GET", "/v1/nothing-here", "read"),
]
SCOPES: tuple[keys.Scope, ...] = ("read", "act", "train")


def test_every_route_is_in_the_matrix(api: Any) -> None:
    documented = {
        (method.upper(), path)
        for path, operations in api.get("/openapi.json").json()["paths"].items()
        for method in operations
    }
    listed = {(method, path.replace(OBJECT, "{}")) for method, path, _ in ROUTES}
    names = {
        "environment_id": "env_{}",
        "policy_id": "pol_{}",
        "job_id": "job_{}",
        "checkpoint_id": "ckpt_{}",
        "check_id": "job_{}",
    }
    for method, path in documented:
        for name, shape in names.items():
            path = path.replace(f"{{{name}}}", shape).replace("{update}", "1")
        assert (method, path) in listed


def test_without_a_key_every_route_is_closed(api: Any, problem: Callable[..., Any]) -> None:
    for method, path, _ in ROUTES:
        response = api(method, path, key=None)
        problem(response, 401, "unauthorized")
        assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "authorization", ["Bearer pgk_wrong", "Bearer ", "Basic YTpi", "nonsense", "Bearer \xff\xfe", "Bearer a b c"]
)
def test_with_a_bad_key_every_route_is_closed(api: Any, problem: Callable[..., Any], authorization: str) -> None:
    for method, path, _ in ROUTES:
        response = api(method, path, key=None, headers={"authorization": authorization.encode("latin-1")})
        problem(response, 401, "unauthorized")


@pytest.mark.parametrize("scope", SCOPES)
def test_a_key_opens_the_routes_of_its_scope_and_no_other(
    api: Any, problem: Callable[..., Any], scope: keys.Scope
) -> None:
    key = api.new_key(scope)
    for method, path, needed in ROUTES:
        response = api(method, path, key=key)
        if needed == scope:
            assert response.status_code not in (401, 403), (method, path)
        else:
            assert f"`{needed}`" in problem(response, 403, "forbidden")["detail"]


def test_an_admin_key_opens_everything(api: Any) -> None:
    for method, path, _ in ROUTES:
        assert api(method, path).status_code not in (401, 403)


@pytest.mark.parametrize("path", ["/livez", "/docs", "/openapi.json", "/docs/assets/swagger-ui-bundle.js"])
def test_probes_and_documentation_are_open(api: Any, path: str) -> None:
    assert api.get(path, key=None).status_code == 200


def test_the_documentation_loads_nothing_from_elsewhere(api: Any) -> None:
    page = api.get("/docs", key=None).text
    assert "/docs/assets/swagger-ui-bundle.js" in page
    assert "http://" not in page
    assert "https://" not in page


@pytest.mark.parametrize("path", ["/docsx", "/livez/x", "/livez//", "/redoc", "/v1", "/docs/../v1/policies"])
def test_nothing_else_is_open(api: Any, path: str) -> None:
    assert api.get(path, key=None).status_code in (401, 404)


def test_a_revoked_key_is_refused_once_the_cache_forgets_it(
    sqlite_database: Database, serve: Callable[..., Any]
) -> None:
    assert KEY_CACHE_SECONDS <= 5.0
    clock = 1000.0
    with serve(Settings(), sqlite_database, lambda: clock) as api:
        key = api.new_key("read")
        assert api.get("/v1/policies", key=key).status_code == 200
        with sqlite_database.write() as session:
            key_id = session.scalars(select(ApiKey.id).order_by(ApiKey.id.desc()).limit(1)).one()
            keys.revoke(session, key_id)
        clock += KEY_CACHE_SECONDS - 0.1
        assert api.get("/v1/policies", key=key).status_code == 200
        clock += 0.2
        assert api.get("/v1/policies", key=key).status_code == 401


def test_the_use_of_a_key_is_noted(sqlite_database: Database, serve: Callable[..., Any]) -> None:
    with serve(Settings(renew_seconds=0.02), sqlite_database) as api:
        api.get("/v1/policies")
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with sqlite_database.read() as session:
                if session.scalars(select(ApiKey.last_used_at)).one() is not None:
                    return
    pytest.fail("the key's last use was not noted")


def test_without_authentication_everybody_may_ask(sqlite_database: Database, serve: Callable[..., Any]) -> None:
    with serve(Settings(no_auth=True), sqlite_database) as api:
        assert api.get("/v1/policies", key=None).status_code == 200
        assert api.post("/v1/environments", {"kind": "gymnasium", "id": "CartPole-v1"}, key=None).status_code == 201


# --- where requests come from


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "LOCALHOST:1", "127.0.0.1:8000", "[::1]:8000", "[::1]", "localhost."]
)
def test_loopback_names_are_answered(api: Any, host: str) -> None:
    assert api.get("/v1/policies", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "localhost:8000@evil.example", "", "[::2]"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS", "HEAD"])
def test_other_names_are_refused_with_every_method(
    api: Any, problem: Callable[..., Any], host: str, method: str
) -> None:
    response = api(method, "/v1/policies", headers={"host": host})
    assert response.status_code == 403
    if method != "HEAD":
        problem(response, 403, "host_not_allowed")


def test_probes_are_answered_under_any_name(api: Any) -> None:
    assert api.get("/livez", key=None, headers={"host": "10.1.2.3:8000"}).status_code == 200


def test_configured_hosts_are_answered(sqlite_database: Database, serve: Callable[..., Any]) -> None:
    with serve(Settings(allowed_hosts=["lab.example"]), sqlite_database) as api:
        assert api.get("/v1/policies", headers={"host": "lab.example:443"}).status_code == 200
        assert api.get("/v1/policies", headers={"host": "other.example"}).status_code == 403
    with serve(Settings(allowed_hosts=["*"]), sqlite_database) as api:
        assert api.get("/v1/policies", headers={"host": "other.example"}).status_code == 200


def test_two_host_headers_are_refused(api: Any, problem: Callable[..., Any]) -> None:
    messages: list[dict[str, Any]] = []
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/v1/policies",
        "headers": [(b"host", b"localhost"), (b"host", b"evil.example")],
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        messages.append(message)

    asyncio.run(api.app(scope, receive, send))
    assert messages[0]["status"] == 422


@pytest.mark.parametrize(
    "origin", ["http://localhost:3000", "https://evil.example", "null", "http://127.0.0.1:8000", "http://[", ""]
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS"])
def test_pages_of_other_origins_are_refused(api: Any, problem: Callable[..., Any], origin: str, method: str) -> None:
    problem(api(method, "/v1/policies", headers={"origin": origin}), 403, "origin_not_allowed")


def test_pages_of_the_server_itself_may_ask(api: Any) -> None:
    response = api.get("/v1/policies", headers={"origin": "http://localhost:8000"})
    assert response.status_code == 200
    assert "access-control-allow-origin" not in response.headers


def test_pages_of_a_configured_origin_may_ask(sqlite_database: Database, serve: Callable[..., Any]) -> None:
    origin = {"origin": "https://lab.example"}
    with serve(Settings(allowed_origins=["https://lab.example"]), sqlite_database) as api:
        response = api.get("/v1/policies", headers=origin)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "https://lab.example"
        asked = origin | {"access-control-request-method": "POST"}
        preflight = api("OPTIONS", "/v1/policies", key=None, headers=asked)
        assert preflight.status_code == 204
        assert "authorization" in preflight.headers["access-control-allow-headers"]
        refused = api.get("/v1/policies", key=None, headers=origin)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://lab.example"


# --- how much


def test_the_request_id_is_the_clients_if_it_can_be(api: Any) -> None:
    assert api.get("/livez", headers={"x-request-id": "trace-1.2_3"}).headers["x-request-id"] == "trace-1.2_3"
    for bad in ("", "a b", "a" * 129, 'x"y', "\xe9"):
        given = api.get("/livez", headers={"x-request-id": bad.encode("latin-1")}).headers["x-request-id"]
        assert given != bad
        assert len(given) == 32


@pytest.mark.parametrize("path", ["/v1/environments", f"/v1/policies/pol_{OBJECT}/act"])
def test_a_body_that_is_too_large_is_refused(
    sqlite_database: Database, serve: Callable[..., Any], problem: Callable[..., Any], path: str
) -> None:
    async def chunks() -> Any:
        for _ in range(5):
            yield b" " * 500

    with serve(Settings(max_body_bytes=2000), sqlite_database) as api:
        json_type = {"content-type": "application/json"}
        problem(api.post(path, content=b" " * 2001, headers=json_type), 413, "payload_too_large")
        problem(api.post(path, content=chunks(), headers=json_type), 413, "payload_too_large")


@pytest.mark.parametrize("path", ["/v1/environments", f"/v1/policies/pol_{OBJECT}/act"])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/jsonx"},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
def test_a_body_of_another_media_type_is_refused(
    api: Any, problem: Callable[..., Any], path: str, headers: dict[str, str]
) -> None:
    problem(api.post(path, content=b"{}", headers=headers), 415, "unsupported_media_type")


def test_json_with_a_charset_is_json(api: Any) -> None:
    body = b'{"kind": "gymnasium", "id": "CartPole-v1"}'
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert api.post("/v1/environments", content=body, headers=headers).status_code == 201


# --- what the router answers by itself


def test_an_unknown_route_is_a_problem(api: Any, problem: Callable[..., Any]) -> None:
    problem(api.get("/v1/nothing-here"), 404, "not_found")
    problem(api.get("/v1/policies/"), 404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("PUT", "/v1/policies", "GET, HEAD, OPTIONS, POST"),
        ("PATCH", f"/v1/policies/pol_{OBJECT}", "DELETE, GET, HEAD, OPTIONS"),
        ("GET", f"/v1/policies/pol_{OBJECT}/act", "OPTIONS, POST"),
        ("DELETE", "/v1/environment-types", "GET, HEAD, OPTIONS"),
    ],
)
def test_another_method_is_a_problem_that_names_those_that_work(
    api: Any, problem: Callable[..., Any], method: str, path: str, allow: str
) -> None:
    response = api(method, path)
    problem(response, 405, "method_not_allowed")
    assert response.headers["allow"] == allow


def test_a_mistake_of_ours_is_a_problem_without_a_traceback(
    api: Any, problem: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    api.app.fastapi.state.environments = None
    body = problem(api.get("/v1/environment-types"), 500, "internal")
    assert body["request_id"] in caplog.text
    assert "Traceback" in caplog.text


def test_a_database_that_does_not_answer_is_a_503(api: Any, problem: Callable[..., Any]) -> None:
    assert api.get("/v1/policies").status_code == 200
    with api.database.write() as session:
        session.connection().exec_driver_sql("ALTER TABLE policy RENAME TO gone")
    problem(api.get("/v1/policies"), 503, "unavailable")
    assert api.get("/livez").status_code == 200


def test_readiness_needs_the_expected_revision(api: Any, problem: Callable[..., Any]) -> None:
    assert api.get("/readyz", key=None).json() == {"status": "ready"}
    with api.database.write() as session:
        session.connection().exec_driver_sql("UPDATE alembic_version SET version_num = 'of a newer version'")
    assert "revision" in problem(api.get("/readyz", key=None), 503, "unavailable")["detail"]


def test_requests_are_counted_by_route_and_never_by_id(api: Any) -> None:
    api.get(f"/v1/policies/pol_{OBJECT}")
    api.post(f"/v1/policies/pol_{OBJECT}/act", {"observation": 0})
    api.get("/v1/no-such-route-7")
    text = api.get("/metrics").text
    assert 'pgengine_requests_total{method="GET",route="/v1/policies/{policy_id}",status="4xx"} 1.0' in text
    assert 'route="/v1/policies/{policy_id}/act"' in text
    assert 'route="unmatched"' in text
    assert OBJECT not in text
    assert "no-such-route-7" not in text


def test_every_response_carries_the_security_headers(api: Any) -> None:
    for path in ("/livez", "/docs", "/v1/policies", "/v1/nothing-here", "/metrics"):
        headers = api.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"


@pytest.mark.parametrize("name", ["idempotency-key", "x-idempotency-key"])
def test_two_idempotency_keys_are_refused(api: Any, problem: Callable[..., Any], name: str) -> None:
    given = {"host": "localhost", "authorization": f"Bearer {api.key}", "content-type": "application/json"}
    headers = [*given.items(), (name, "one"), (name, "two")]
    body = {"kind": "gymnasium", "id": "CartPole-v1"}

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api.app), base_url="http://localhost") as client:
            return await client.post("/v1/environments", json=body, headers=headers)

    response = asyncio.run(send())
    assert name in problem(response, 422, "invalid_request")["detail"]


@pytest.mark.parametrize("path", ["/v1/environments", f"/v1/policies/pol_{OBJECT}/act"])
def test_a_client_that_goes_away_within_its_body_is_no_mistake(
    api: Any, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    headers = {"host": "localhost", "authorization": f"Bearer {api.key}", "content-type": "application/json"}
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()]
        + [(b"content-length", b"1000")],
    }
    received = iter([{"type": "http.request", "body": b'{"kind"', "more_body": True}, {"type": "http.disconnect"}])
    sent: list[Any] = []

    async def receive() -> Any:
        return next(received)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(api.app(scope, receive, send))
    assert sent == []
    assert caplog.text == ""
    assert f'method="POST",route="{path.replace(f"pol_{OBJECT}", "{policy_id}")}"' not in api.get("/metrics").text


# --- methods


def test_head_is_answered_wherever_get_is_with_the_same_head_and_no_body(api: Any) -> None:
    api.created("/v1/policies", {"environment": {"kind": "gymnasium", "id": "CartPole-v1"}})
    ids = {"policy_id": api.get("/v1/policies").json()["data"][0]["id"]}
    ids["environment_id"] = api.get("/v1/environments").json()["data"][0]["id"]
    ids["checkpoint_id"] = api.get(f"/v1/policies/{ids['policy_id']}/checkpoints").json()["data"][0]["id"]
    ids |= {"job_id": f"job_{OBJECT}", "check_id": f"job_{OBJECT}", "update": "1"}
    paths = [path for path, operations in api.app.fastapi.openapi()["paths"].items() if "get" in operations]
    for path in [path.format(**ids) for path in paths] + ["/", "/docs", "/openapi.json", "/livez", "/readyz"]:
        got, head = api.get(path), api("HEAD", path)
        assert head.status_code == got.status_code, path
        assert head.content == b""
        kept = [name for name in got.headers if name != "x-request-id"]
        assert [head.headers[name] for name in kept] == [got.headers[name] for name in kept]


def test_head_of_a_stream_ends(api: Any) -> None:
    job = api.created("/v1/training-jobs", {"environment": {"kind": "gymnasium", "id": "CartPole-v1"}})
    path, headers = f"/v1/training-jobs/{job['id']}/events", {"accept": "text/event-stream"}
    assert api("HEAD", path, headers=headers).headers["content-type"].startswith("text/event-stream")
    assert "pgengine_open_streams 0.0" in api.get("/metrics").text


@pytest.mark.parametrize(
    ("path", "allow"),
    [
        ("/v1/policies", "GET, HEAD, OPTIONS, POST"),
        (f"/v1/policies/pol_{OBJECT}", "DELETE, GET, HEAD, OPTIONS"),
        (f"/v1/policies/pol_{OBJECT}/act", "OPTIONS, POST"),
        (f"/v1/training-jobs/job_{OBJECT}/cancel", "OPTIONS, POST"),
        ("/livez", "GET, HEAD, OPTIONS"),
        ("/docs", "GET, HEAD, OPTIONS"),
    ],
)
def test_options_names_the_methods_of_a_path(api: Any, path: str, allow: str) -> None:
    response = api("OPTIONS", path)
    assert (response.status_code, response.content) == (204, b"")
    assert response.headers["allow"] == allow


def test_options_of_no_route_is_a_problem(api: Any, problem: Callable[..., Any]) -> None:
    problem(api("OPTIONS", "/v1/nothing-here"), 404, "not_found")


# --- behind a proxy

FORWARDED = {"x-forwarded-prefix": "/lab/rl"}


def test_the_address_alone_leads_to_the_documentation(api: Any) -> None:
    response = api.get("/", key=None)
    assert (response.status_code, response.headers["location"]) == (307, "/docs")


@pytest.mark.parametrize("cut_off", [True, False])
@pytest.mark.parametrize("told", ["setting", "header"])
def test_below_a_prefix_everything_leads_back_below_it(
    sqlite_database: Database, serve: Callable[..., Any], cut_off: bool, told: str
) -> None:
    settings = Settings(root_path="/lab/rl/") if told == "setting" else Settings()
    headers = FORWARDED if told == "header" else {}
    before = "" if cut_off else "/lab/rl"
    with serve(settings, sqlite_database) as api:

        def ask(method: str, path: str, **more: Any) -> httpx.Response:
            response: httpx.Response = api(method, before + path, headers=headers, **more)
            return response

        body = {"environment": {"kind": "gymnasium", "id": "CartPole-v1"}}
        made = ask("POST", "/v1/training-jobs", json=body)
        assert made.headers["location"] == f"/lab/rl/v1/training-jobs/{made.json()['id']}"
        assert ask("GET", f"/v1/training-jobs/{made.json()['id']}").status_code == 200
        acted = ask("POST", f"/v1/policies/{made.json()['policy_id']}/act", json={"observation": [0.0] * 4})
        assert acted.status_code == 200
        assert ask("GET", "/", key=None).headers["location"] == "/lab/rl/docs"
        page = ask("GET", "/docs", key=None).text
        assert "'/lab/rl/openapi.json'" in page
        assert page.count("/docs/assets/") == page.count("/lab/rl/docs/assets/")
        assert ask("GET", "/docs/assets/swagger-ui-bundle.js", key=None).status_code == 200
        assert ask("GET", "/openapi.json", key=None).json()["servers"] == [{"url": "/lab/rl"}]
        assert ask("GET", "/livez", key=None).status_code == 200
        assert ask("GET", "/v1/policies", key=None).status_code == 401
        if not cut_off:
            assert api.get("/lab/rl", headers=headers, key=None).headers["location"] == "/lab/rl/docs"
            assert api.get("/lab/rlx/v1/policies", headers=headers).status_code == 404
    with serve(Settings(), sqlite_database) as api:
        assert "servers" not in api.get("/openapi.json").json()


@pytest.mark.parametrize(
    "prefix", ["//evil.example", "/a//b", "https://evil.example", "/a?b", "/a b", "/<x>", "", "/", "a"]
)
def test_a_prefix_that_is_none_is_ignored(api: Any, prefix: str) -> None:
    response = api.get("/", headers={"x-forwarded-prefix": prefix}, key=None)
    assert response.headers["location"] == "/docs"


def test_only_proxies_of_ours_are_believed(sqlite_database: Database, serve: Callable[..., Any]) -> None:
    # the client of these tests has the address 127.0.0.1
    with serve(Settings(trusted_proxies=["10.0.0.0/8"]), sqlite_database) as api:
        assert api.get("/", headers=FORWARDED).headers["location"] == "/docs"
    for trusted in (["127.0.0.0/8"], ["*"], ["10.0.0.1", "127.0.0.1"]):
        with serve(Settings(trusted_proxies=trusted), sqlite_database) as api:
            assert api.get("/", headers=FORWARDED).headers["location"] == "/lab/rl/docs"


@pytest.mark.parametrize(
    ("forwarded", "client"),
    [
        ("203.0.113.9", "203.0.113.9"),
        ("1.2.3.4, 203.0.113.9", "203.0.113.9"),
        ("1.2.3.4, 203.0.113.9, 10.0.0.7", "203.0.113.9"),
        ("10.0.0.8, 10.0.0.7", "10.0.0.8"),
        ("2001:db8::1", "2001:db8::1"),
        ("nonsense", "127.0.0.1"),
        ("", "127.0.0.1"),
        ("1.2.3.4, unknown", "127.0.0.1"),
    ],
)
def test_the_client_is_the_last_address_that_no_proxy_of_ours_is(forwarded: str, client: str) -> None:
    proxies = Proxies(Settings(trusted_proxies=["127.0.0.1", "10.0.0.0/8"]))
    assert proxies.client({b"x-forwarded-for": forwarded.encode()}, "127.0.0.1") == client
    assert proxies.are_trusted("::ffff:10.1.2.3")
    assert not proxies.are_trusted("11.1.2.3")
    assert not proxies.are_trusted("a socket")


def test_two_prefixes_are_refused(api: Any, problem: Callable[..., Any]) -> None:
    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api.app), base_url="http://localhost") as client:
            twice = [("x-forwarded-prefix", "/a"), ("x-forwarded-prefix", "/b")]
            return await client.get("/livez", headers=twice)

    assert "x-forwarded-prefix" in problem(asyncio.run(send()), 422, "invalid_request")["detail"]
