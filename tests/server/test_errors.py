import ast
import inspect
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from server import errors
from server.errors import ApiError, Conflict, FieldError, InvalidRequest, error_types, problem

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "errors.md"


def test_every_code_is_documented_with_its_status_and_meaning() -> None:
    documented = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert documented == [f"| {e.status} | `{e.code}` | {inspect.getdoc(e)} |" for e in error_types()]


def field_codes() -> Iterator[str]:
    """Codes of fields as they stand in the code: the second argument of what makes such an error."""
    for path in sorted((ROOT / "server").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
                code = node.args[1]
                made = node.func.id in ("invalid", "FieldError", "SpecError")
                if made and isinstance(code, ast.Constant) and isinstance(code.value, str):
                    yield code.value


def test_every_code_of_a_field_is_documented() -> None:
    page = PAGE.read_text()
    codes = set(field_codes())
    assert len(codes) > 20
    assert sorted(code for code in codes if f"`{code}`" not in page) == []


def test_codes_are_unique_public_and_drawn_at_the_head() -> None:
    types = list(error_types())
    assert len({error.code for error in types}) == len(types)
    assert {error.__name__ for error in types} <= set(errors.__all__)
    assert errors.__doc__ is not None
    for error in types:
        assert f" {error.__name__} " in errors.__doc__
        assert f" {error.code}\n" in errors.__doc__


@pytest.mark.parametrize("error_type", list(error_types()), ids=lambda error: error.code)
def test_a_problem_document(error_type: type[ApiError]) -> None:
    error = error_type(errors=[FieldError("/a~1b/0", "missing", "is required")], headers={"x-more": "1"})
    body = problem(error, "req-1")
    assert list(body) == ["type", "title", "status", "detail", "code", "errors", "request_id"]
    assert body["detail"] == body["title"] == error_type.title
    assert body["errors"] == [{"pointer": "/a~1b/0", "code": "missing", "message": "is required"}]
    assert 400 <= body["status"] < 600
    assert error.headers["x-more"] == "1"
    assert (error.headers.get("x-should-retry") == "false") >= issubclass(error_type, Conflict)
    json.dumps(body)


def test_a_message_of_its_own() -> None:
    assert problem(InvalidRequest("gamma must be at most 1"), "r")["detail"] == "gamma must be at most 1"
