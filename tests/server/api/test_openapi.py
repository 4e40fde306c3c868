"""The description of the API: a change of it is seen, and what it promises holds.

Renew the snapshot with `python tests/server/api/test_openapi.py`, and read what has changed.
"""

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from pydantic import TypeAdapter

from server.app import create_app
from server.database import Database
from server.environments.schemas import BANDIT, CARTPOLE
from server.jobs import store
from server.jobs.events import Event
from server.jobs.history import EVENT_TYPES
from server.jobs.reports import Measured, Outcome, Progress, Report, Snapshot
from server.settings import Settings

SNAPSHOT = Path(__file__).parent / "openapi.json"


def described() -> dict[str, Any]:
    """What the application says of itself; nothing is asked of a database for it."""
    with tempfile.TemporaryDirectory() as directory:
        database = Database(f"sqlite:///{directory}/unused.db")
        return create_app(Settings(), database).fastapi.openapi()


def written(schema: dict[str, Any]) -> str:
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def operations(schema: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return described()


def test_the_description_is_the_snapshot(schema: dict[str, Any]) -> None:
    assert json.loads(SNAPSHOT.read_text()) == json.loads(written(schema)), (
        "the API has changed; if that is wanted: python tests/server/api/test_openapi.py"
    )


def test_every_operation_says_what_it_does_and_how_it_fails(schema: dict[str, Any]) -> None:
    identifiers = []
    for method, path, operation in operations(schema):
        identifiers.append(operation["operationId"])
        assert operation["summary"]
        assert operation["tags"]
        for status in ("401", "403", "422", "500", "503"):
            content = operation["responses"][status]["content"]
            assert content == {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}, path
        if "{" in path:
            assert "404" in operation["responses"]
        if "requestBody" in operation:
            assert {"413", "415"} <= operation["responses"].keys()
            assert operation["requestBody"]["content"]["application/json"]["examples"]
        assert method in ("get", "post", "delete")
    assert len(set(identifiers)) == len(identifiers)


def test_every_reference_leads_somewhere(schema: dict[str, Any]) -> None:
    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                yield node["$ref"]
            for value in node.values():
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    found = set(references(schema))
    assert found
    for reference in found:
        node: Any = schema
        for part in reference.removeprefix("#/").split("/"):
            node = node[part]
    assert "HTTPValidationError" not in json.dumps(schema)


def test_every_field_of_a_body_is_explained(schema: dict[str, Any]) -> None:
    for name, component in schema["components"]["schemas"].items():
        if name == "Problem" or name.startswith("Page_"):
            continue
        for field, described_field in component.get("properties", {}).items():
            assert {"description", "$ref"} & described_field.keys(), f"{name}.{field}"


# --- what generators of clients make of it


def objects(node: Any) -> Iterator[dict[str, Any]]:
    """All schemas of objects below a node; examples are none."""
    if isinstance(node, dict):
        if node.get("type") == "object" and isinstance(node.get("properties"), dict):
            yield node
        for name, value in node.items():
            if name not in ("example", "examples", "default"):
                yield from objects(value)
    elif isinstance(node, list):
        for value in node:
            yield from objects(value)


def reached(schema: dict[str, Any], *roots: Any) -> list[Any]:
    """The roots, and all components that they lead to."""
    found: dict[str, Any] = {}
    pending = list(roots)
    while pending:
        for name in re.findall(r"#/components/schemas/(\w+)", json.dumps(pending.pop())):
            if name not in found:
                found[name] = schema["components"]["schemas"][name]
                pending.append(found[name])
    return [*roots, *found.values()]


def test_what_need_not_be_sent_has_no_default_that_generators_take_for_always_there(schema: dict[str, Any]) -> None:
    """openapi-typescript makes a field with a default one that must be sent."""
    bodies = [operation["requestBody"] for _, _, operation in operations(schema) if "requestBody" in operation]
    sent = [one for root in reached(schema, *bodies) for one in objects(root)]
    assert len(sent) > 30
    for one in sent:
        for name, of in one["properties"].items():
            assert "default" not in of, (one.get("title"), name)
    algorithm = schema["components"]["schemas"]["AlgorithmSpec"]
    assert "required" not in algorithm
    assert algorithm["properties"]["trajectories"]["description"].endswith("Default: 16.")


def test_what_is_always_answered_is_required_in_answers(schema: dict[str, Any]) -> None:
    components = schema["components"]["schemas"]
    answers = [operation["responses"] for _, _, operation in operations(schema)]
    # events are answered as they were stored, perhaps by an earlier version; whatever else is answered is whole
    events = [one["title"] for one in reached(schema, components["EventPage"])]
    for one in reached(schema, *answers)[len(answers) :]:
        if one["title"] not in events and one["title"] != "Problem" and one.get("properties"):
            assert one["required"] == list(one["properties"]), one["title"]
    algorithm = components["TrainingJob"]["properties"]["algorithm"]
    assert algorithm["$ref"] == "#/components/schemas/AlgorithmSpecOutput"


def test_the_kind_is_required_where_it_tells_unions_apart(schema: dict[str, Any]) -> None:
    seen = set()

    def check(node: Any) -> None:
        if isinstance(node, dict):
            discriminator = node.get("discriminator")
            if isinstance(discriminator, dict):
                for tag, reference in discriminator["mapping"].items():
                    name = reference.rpartition("/")[2]
                    member = schema["components"]["schemas"][name]
                    seen.add(name)
                    assert discriminator["propertyName"] in member["required"], name
                    assert member["properties"][discriminator["propertyName"]]["const"] == tag
            for value in node.values():
                check(value)
        elif isinstance(node, list):
            for value in node:
                check(value)

    check(schema)
    assert {"GymnasiumSpec", "AdamSpec", "AdamSpecOutput", "MlpPolicySpec", "StatusEvent", "BoxSpace"} <= seen


def test_types_have_names_that_programs_can_have(schema: dict[str, Any]) -> None:
    components = schema["components"]["schemas"]
    titles = [component.get("title", name) for name, component in components.items()]
    assert len(set(titles)) == len(titles)
    assert all(re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{1,48}", name) for name in components)


# --- what is answered is what is described


class Described:
    """A client that holds every answer against the description: its status, its body and its headers."""

    GENERAL = frozenset({"content-type", "content-length", "x-content-type-options", "x-frame-options"}) | {
        "referrer-policy",
        "x-accel-buffering",
        "accept-ranges",
        "content-range",
        "vary",
        "allow",
    }

    def __init__(self, api: Any, schema: dict[str, Any]) -> None:
        self._api = api
        self._schema = schema
        self._routes = [
            (method, re.compile(re.sub(r"\{\w+\}", "[^/]+", path) + r"(\?.*)?"), path)
            for path, methods in schema["paths"].items()
            for method in methods
        ]
        self.seen: set[tuple[str, int]] = set()

    def __call__(self, method: str, path: str, **more: Any) -> Any:
        response = self._api(method, path, **more)
        operation = next(
            self._schema["paths"][template][known]
            for known, pattern, template in self._routes
            if known == method.lower() and pattern.fullmatch(path)
        )
        self.seen.add((operation["operationId"], response.status_code))
        described = operation["responses"].get(str(response.status_code))
        assert described is not None, (method, path, response.status_code, response.text)
        undocumented = set(response.headers) - self.GENERAL - {name.lower() for name in described["headers"]}
        assert not undocumented, (method, path, response.status_code)
        if "content" in described:
            media_type = response.headers["content-type"].partition(";")[0]
            assert media_type in described["content"], (method, path)
            if media_type.endswith("json"):
                self._check(described["content"][media_type]["schema"], response.json())
        else:
            assert response.content == b""
        return response

    def created(self, path: str, body: Any) -> dict[str, Any]:
        response = self("POST", path, json=body)
        assert response.status_code in (200, 201), response.text
        found: dict[str, Any] = response.json()
        return found

    def _check(self, schema: dict[str, Any], value: Any) -> None:
        validator = Draft202012Validator({**schema, "components": self._schema["components"]})
        fault = best_match(validator.iter_errors(value))
        assert fault is None, (fault.json_path, fault.message[:300])


@pytest.fixture
def described_api(api: Any, schema: dict[str, Any]) -> Described:
    return Described(api, schema)


@pytest.mark.slow
def test_every_example_works_and_is_answered_as_described(described_api: Described, schema: dict[str, Any]) -> None:
    policy = described_api.created("/v1/policies", {"environment": CARTPOLE})
    bodies = [
        (method.upper(), path, example["value"])
        for method, path, operation in operations(schema)
        if "requestBody" in operation
        for example in operation["requestBody"]["content"]["application/json"]["examples"].values()
    ]
    for method, path, body in bodies:
        response = described_api(method, path.format(policy_id=policy["id"]), json=body)
        assert response.status_code in (200, 201), response.text
    assert len(bodies) >= 20


def test_every_example_of_a_parameter_works(described_api: Described, schema: dict[str, Any]) -> None:
    job = described_api.created("/v1/training-jobs", {"environment": CARTPOLE})
    ids = {"job_id": job["id"], "policy_id": job["policy_id"], "environment_id": job["environment_id"]}
    tried = set()
    for method, path, operation in operations(schema):
        for parameter in operation.get("parameters", ()):
            examples = [*parameter.get("examples", {}).values(), *parameter["schema"].get("examples", ())]
            for example in examples:
                value = example.get("value", example) if isinstance(example, dict) else example
                name, place = parameter["name"], parameter["in"]
                if method == "get" and path.startswith("/v1/training-jobs"):
                    sent = {"params": {name: value}} if place == "query" else {"headers": {name: value}}
                    response = described_api("GET", path.format(**ids, update=1), **sent)
                    assert response.status_code == 200, response.text
                tried.add(name)
    assert {"keys", "after", "lastEventId", "Idempotency-Key"} <= tried


def test_answers_are_as_described(described_api: Described) -> None:
    """Every kind of answer that takes no engine, once."""
    call = described_api
    once = {"idempotency-key": "one"}
    environment = call("POST", "/v1/environments", json=CARTPOLE).json()
    assert call("POST", "/v1/environments", json=CARTPOLE).status_code == 200
    tabular = call.created("/v1/environments", BANDIT)
    policy = call.created("/v1/policies", {"environment": environment["id"], "name": "a", "metadata": {"b": "c"}})
    job = call.created("/v1/training-jobs", {"environment": BANDIT})
    for _ in range(2):
        call("POST", "/v1/policies", json={"environment": tabular["id"]}, headers=once)
    call.created("/v1/training-jobs?validate_only=true", {"environment": CARTPOLE})
    for path in ("environments", "policies", "training-jobs", "gradient-checks", "environment-types"):
        assert call("GET", f"/v1/{path}").status_code == 200
    for one in (f"environments/{tabular['id']}", f"policies/{policy['id']}", f"training-jobs/{job['id']}"):
        assert call("GET", f"/v1/{one}").status_code == 200
    checkpoint = call("GET", f"/v1/policies/{policy['id']}/checkpoints").json()["data"][0]
    content = call("GET", f"/v1/checkpoints/{checkpoint['id']}/content")
    tag = {"if-none-match": content.headers["etag"]}
    assert call("GET", f"/v1/checkpoints/{checkpoint['id']}/content", headers=tag).status_code == 304
    for one in ("", "/parameters"):
        assert call("GET", f"/v1/checkpoints/{checkpoint['id']}{one}").status_code == 200
    act = f"/v1/policies/{policy['id']}/act"
    assert call("POST", act, json={"observation": [0, 0, 0, 0]}).status_code == 200
    assert call("POST", act, json={"observations": [[0, 0, 0, 0]] * 2}).status_code == 200
    jobs = f"/v1/training-jobs/{job['id']}"
    for one in ("/events", "/metrics", "/checkpoints"):
        assert call("GET", jobs + one).status_code == 200
    stream = {"accept": "text/event-stream"}
    assert call("GET", f"{jobs}/events?follow=false", headers=stream).status_code == 200
    body = {"environment": BANDIT, "policy": job["policy_id"]}
    refused = [
        call("POST", "/v1/training-jobs", json=body),
        call("DELETE", jobs),
        call("GET", jobs, key=None),
        call("POST", act, json={"observation": 0}, key=call._api.new_key("read")),
        call("GET", "/v1/policies?limit=0"),
        call("GET", f"/v1/policies/pol_{'0' * 32}"),
        call("POST", "/v1/policies", content=b"{}", headers={"content-type": "text/plain"}),
        call("GET", f"{jobs}/metrics", headers={"accept": "image/png"}),
        call("POST", "/v1/policies", json={"environment": CARTPOLE}, headers=once),
    ]
    assert [one.status_code for one in refused] == [409, 409, 401, 403, 422, 404, 415, 406, 422]
    assert call("POST", f"{jobs}/cancel").status_code == 200
    assert call("GET", f"{jobs}/events", headers=stream | {"last-event-id": "9"}).status_code == 204
    assert call("DELETE", jobs).status_code == 204


def test_events_are_as_described(described_api: Described, api: Any) -> None:
    job = described_api.created("/v1/training-jobs", {"environment": BANDIT})
    with api.database.write() as session:
        claim = store.claim(session, "worker", 30.0)
    assert claim is not None
    assert claim.policy_bytes is not None
    evaluation = {"mean_return": 1.0, "confidence_interval": [0.5, float("nan")], "episodes": 10}
    snapshot = Snapshot(1, Progress(1, 2, 3, 0.5), claim.policy_bytes, b"state", evaluation)
    measured = (Measured(1, 2, {"mean_return": 1.0, "entropy": float("nan")}), Measured(2, 4, {"mean_return": 0.5}))
    for fingerprint in ({"torch": "1"}, {"torch": "2"}):
        with api.database.write() as session:
            told = Report(Progress(2, 4, 6, 0.6), measured, snapshot, fingerprint)
            store.report(session, claim.job_id, claim.token, told)
    with api.database.write() as session:
        store.lose(session, claim.job_id, claim.token, "a crash")
        claim = store.claim(session, "worker", 30.0)
        assert claim is not None
        result = {"evaluation": evaluation, "stopped_by": "updates", "target_reached": None}
        store.finish(session, claim.job_id, claim.token, Outcome("succeeded", result=result))
    events = described_api("GET", f"/v1/training-jobs/{job['id']}/events").json()["data"]
    assert {event["type"] for event in events} == set(EVENT_TYPES)
    for event in events:
        # nothing is told that is not described
        described_event = TypeAdapter(Event).validate_python(event).model_dump(mode="json", exclude_unset=True)
        assert described_event["data"].keys() == event["data"].keys()


def test_only_the_key_is_asked_for(schema: dict[str, Any]) -> None:
    assert schema["security"] == [{"key": []}]
    assert schema["components"]["securitySchemes"]["key"]["scheme"] == "bearer"


if __name__ == "__main__":
    SNAPSHOT.write_text(written(described()))
