"""The description of the API made so that generators of clients read it as it is meant.

A field with a default need not be sent and is always answered. One schema for both cannot say so: what generators make
of it demands every default in a request, or calls what is always answered absent. So requests and answers have schemas
of their own where they differ (`AlgorithmSpec`, `AlgorithmSpecOutput`). Knows OpenAPI; knows nothing of ours.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from typing import Any

__all__ = ["for_generators"]

PREFIX = "#/components/schemas/"
SUFFIX = "Output"


def for_generators(schema: dict[str, Any], raw: str) -> None:
    """Rewrite the schemas of an OpenAPI document in place.

    Args:
        schema: The document.
        raw: The component whose answers are given as they were once stored, perhaps by an earlier version: what has a
            default may be absent in them.
    """
    components: dict[str, Any] = schema["components"]["schemas"]
    operations = [operation for methods in schema["paths"].values() for operation in methods.values()]
    sent = [operation["requestBody"] for operation in operations if "requestBody" in operation]
    answered = [operation["responses"] for operation in operations]
    in_requests, in_answers = _reached(sent, components), _reached(answered, components)
    both = in_requests & in_answers
    for name in sorted(both):
        # generators name their types by the title
        components[f"{name}{SUFFIX}"] = deepcopy(components[name]) | {"title": f"{name}{SUFFIX}"}
    outputs = {name if name not in both else f"{name}{SUFFIX}" for name in in_answers}
    for node in (*answered, *(components[name] for name in outputs)):
        _rename(node, both)
    tagged = {name for name in in_requests if _is_tagged(name, (*sent, *(components[one] for one in in_requests)))}
    for name in in_requests:
        _each_object(components[name], _as_sent)
        if name in tagged:
            required = components[name].setdefault("required", [])
            components[name]["required"] = ["kind", *(one for one in required if one != "kind")]
    for node in sent:
        _each_object(node, _as_sent)
    stored = _reached([components[raw]], components)
    for name in outputs:
        is_stored = name in stored and not name.endswith(SUFFIX)
        _each_object(components[name], _as_it_is if is_stored else _as_answered)


def _reached(roots: Iterable[Any], components: dict[str, Any]) -> set[str]:
    """Names of the components that are referred to, from wherever."""
    found: set[str] = set()
    pending = list(roots)
    while pending:
        for name in _references(pending.pop()):
            if name not in found:
                found.add(name)
                pending.append(components[name])
    return found


def _references(node: Any) -> Iterator[str]:
    for one in _walk(node):
        reference = one.get("$ref")
        if isinstance(reference, str) and reference.startswith(PREFIX):
            yield reference.removeprefix(PREFIX)


def _walk(node: Any) -> Iterator[dict[str, Any]]:
    """All objects of a document; what stands under `example` is none of it."""
    if isinstance(node, dict):
        yield node
        for name, value in node.items():
            if name not in ("example", "examples", "default", "const", "enum"):
                yield from _walk(value)
    elif isinstance(node, list):
        for value in node:
            yield from _walk(value)


def _rename(node: Any, names: set[str]) -> None:
    renamed = {f"{PREFIX}{name}": f"{PREFIX}{name}{SUFFIX}" for name in names}
    for one in _walk(node):
        if one.get("$ref") in renamed:
            one["$ref"] = renamed[one["$ref"]]
        if "mapping" in one.get("discriminator", ()):
            mapping = one["discriminator"]["mapping"]
            one["discriminator"]["mapping"] = {tag: renamed.get(to, to) for tag, to in mapping.items()}


def _is_tagged(name: str, nodes: Iterable[Any]) -> bool:
    """Whether a union tells the component from others by its kind."""
    return any(
        one["discriminator"]["propertyName"] == "kind" and f"{PREFIX}{name}" in one["discriminator"]["mapping"].values()
        for node in nodes
        for one in _walk(node)
        if isinstance(one.get("discriminator"), dict) and "mapping" in one["discriminator"]
    )


def _each_object(node: Any, change: Callable[[dict[str, Any]], None]) -> None:
    for one in _walk(node):
        if isinstance(one.get("properties"), dict) and one.get("type") == "object":
            change(one)


def _as_sent(schema: dict[str, Any]) -> None:
    # a generator takes a field with a default for one that is always there
    for name, of in schema["properties"].items():
        if name not in schema.get("required", ()) and "default" in of:
            default = of.pop("default")
            if "const" not in of:
                of["description"] = f"{of.get('description', '')} Default: {json.dumps(default)}.".strip()


def _as_answered(schema: dict[str, Any]) -> None:
    _as_it_is(schema)
    if schema["properties"]:
        schema["required"] = list(schema["properties"])


def _as_it_is(schema: dict[str, Any]) -> None:
    for of in schema["properties"].values():
        of.pop("default", None)
