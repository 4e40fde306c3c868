"""docker-compose.yml without an engine: each service's very command runs as a process with that service's environment.

Only what containers give is replaced: the host of the database's URL and the port to listen on.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from sqlalchemy import URL, create_engine, make_url, text

ROOT = Path(__file__).parents[2]
SECRETS = {"POSTGRES_PASSWORD": "0123456789abcdef", "PGENGINE_API_KEY": "a-secret-of-the-operator"}


def _interpolate(value: Any, environment: Mapping[str, str]) -> Any:
    """`${NAME:?message}` and `${NAME:-default}` in all texts, as compose reads them; the file has no others."""

    def replace(match: re.Match[str]) -> str:
        name, kind, rest = match.groups()
        if environment.get(name):
            return environment[name]
        if kind == "?":
            raise LookupError(rest)
        return rest

    if isinstance(value, dict):
        return {key: _interpolate(item, environment) for key, item in value.items()}
    if isinstance(value, list):
        return [_interpolate(item, environment) for item in value]
    return re.sub(r"\$\{(\w+):([?-])([^}]*)\}", replace, value) if isinstance(value, str) else value


def _services(environment: Mapping[str, str] = SECRETS) -> dict[str, dict[str, Any]]:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    return dict(_interpolate(services, environment))


@pytest.mark.parametrize("missing", SECRETS)
def test_nothing_starts_without_a_key_and_a_password(missing: str) -> None:
    with pytest.raises(LookupError, match=f"set {missing}"):
        _services({name: value for name, value in SECRETS.items() if name != missing})


def test_the_order_of_the_services() -> None:
    services = _services()
    assert services["postgres"]["image"] == "postgres:18"
    assert services["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    assert services["migrate"]["restart"] == "no"
    for name in ("api", "worker"):
        assert services[name]["depends_on"] == {"migrate": {"condition": "service_completed_successfully"}}
        assert services[name]["restart"] == "unless-stopped"
    assert all("healthcheck" in services[name] for name in ("postgres", "api"))


def test_the_image_is_made_of_what_the_build_context_holds() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    allowed = {
        line[1:].rstrip("/") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")
    }
    assert copied == allowed
    user = next(line.split()[1] for line in lines if line.startswith("USER"))
    assert user not in ("root", "0")


@pytest.mark.slow
def test_what_is_installed_from_the_build_context_is_whole(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("pgengine", "server", "migrations"):
        shutil.copytree(ROOT / name, tmp_path / name)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "."],
        cwd=tmp_path,
        check=True,
    )
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        installed = set(wheel.namelist())
    sources = {
        str(path.relative_to(ROOT))
        for package in ("pgengine", "server", "migrations")
        for pattern in ("*.py", "*.mako", "py.typed")
        for path in (ROOT / package).rglob(pattern)
    }
    assert sources <= installed


@pytest.fixture
def database_url(postgresql_server: str) -> Iterator[str]:
    """The URL that the compose file names, with the host of a real server."""
    named = make_url(_services()["api"]["environment"]["PGENGINE_DATABASE_URL"])
    assert (named.host, named.port) == ("postgres", 5432)
    admin = create_engine(
        make_url(postgresql_server).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT"
    )
    with admin.connect() as connection:
        connection.execute(text(f"CREATE ROLE {named.username} LOGIN PASSWORD '{named.password}'"))
        connection.execute(text(f"CREATE DATABASE {named.database} OWNER {named.username}"))
    real = make_url(postgresql_server)
    yield URL.create(
        named.drivername, named.username, named.password, real.host, real.port, named.database, real.query
    ).render_as_string(hide_password=False)
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {named.database} WITH (FORCE)"))
        connection.execute(text(f"DROP ROLE {named.username}"))
    admin.dispose()


@pytest.mark.slow
def test_the_loop_through_the_services_of_the_compose_file(database_url: str, start: Any) -> None:
    services = _services()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    environment = {
        name: service.get("environment", {}) | {"PGENGINE_DATABASE_URL": database_url}
        for name, service in services.items()
    }
    environment["api"]["PGENGINE_PORT"] = port
    # `python` of the image is the one that runs the tests
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def run(name: str, command: list[str] | None = None) -> Any:
        return start(command=command or services[name]["command"], **environment[name], PATH=path)

    assert run("migrate").wait() == 0
    api = run("api")
    worker = run("worker")
    api.wait_for(r"^key +the one in PGENGINE_API_KEY")
    kind, *healthcheck = services["api"]["healthcheck"]["test"]
    assert kind == "CMD"
    assert run("api", healthcheck).wait() == 0

    headers = {"authorization": f"Bearer {SECRETS['PGENGINE_API_KEY']}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}/v1", headers=headers, timeout=60) as client:
        body = {
            "environment": {"kind": "gymnasium", "id": "CartPole-v1"},
            "stop": {"updates": 3},
            "evaluation": {"episodes": 2},
        }
        job = client.post("/training-jobs", json=body).raise_for_status().json()
        with client.stream(
            "GET", f"/training-jobs/{job['id']}/events", headers={"accept": "text/event-stream"}
        ) as stream:
            events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
        assert events[-1]["data"]["status"] == "succeeded"
        acted = client.post(f"/policies/{job['policy_id']}/act", json={"observation": [0, 0, 0, 0]})
        assert acted.raise_for_status().json()["action"] in (0, 1)
        assert acted.json()["updates"] == 3

    assert worker.end() == 0
    assert api.end() == 0
    assert run("api", healthcheck).wait() != 0
    # a second `up` finds nothing to migrate
    again = run("migrate")
    assert again.wait() == 0
    assert "already" in again.lines[-1]
