"""The description of the API: a change of it is seen, and what it promises holds.

Renew the snapshot with `python tests/server/api/test_openapi.py`, and read what has changed.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.app import create_app
from server.database import Database
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


@pytest.mark.slow
def test_every_example_works(api: Any, schema: dict[str, Any]) -> None:
    policy = api.created("/v1/policies", {"environment": {"kind": "gymnasium", "id": "CartPole-v1"}})
    for method, path, operation in operations(schema):
        if "requestBody" in operation:
            for example in operation["requestBody"]["content"]["application/json"]["examples"].values():
                response = api(method.upper(), path.format(policy_id=policy["id"]), json=example["value"])
                assert response.status_code in (200, 201), response.text


def test_only_the_key_is_asked_for(schema: dict[str, Any]) -> None:
    assert schema["security"] == [{"key": []}]
    assert schema["components"]["securitySchemes"]["key"]["scheme"] == "bearer"


if __name__ == "__main__":
    SNAPSHOT.write_text(written(described()))
