"""What is wrong with the fields of a request, said so that the sender can mend it.

Pydantic says what it did not like; here it becomes a place in the body that was sent, and the way out: the fields that
are known there, where a field of that name belongs, the kinds of a union and what they look like. All of this is read
from the JSON Schema of the body, so a field that is added is known here too. Values that were sent are never repeated.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any

from pydantic import TypeAdapter

from server.bodies import MAX_ERRORS, MAX_NAME
from server.errors import FieldError, pointer_to

__all__ = ["Schema", "field_errors", "schema_of", "value_at", "walked"]

Parts = Sequence[str | int]
LONGEST_SEARCHED = 64
"""A name that is longer than all of ours is no misspelling of one."""
CLOSE = 0.75
"""How alike two names are, in [0, 1], so that one may be meant by the other."""


def field_errors(errors: Sequence[Mapping[str, Any]], body: Any, model: Any = None) -> list[FieldError]:
    """Validation errors of pydantic as ours: places in the submitted body, no echo of what was sent.

    Pydantic's places hold tags of unions, which the body does not have; so they are walked against the body.

    Args:
        errors: Pydantic's errors.
        body: What was sent.
        model: The type of the body; None where there is none.
    """
    schema = None if model is None else schema_of(model)
    found: dict[str, list[FieldError]] = {}
    for error in errors:
        one = _field_error(error, body, schema)
        if one.pointer not in found and len(found) == MAX_ERRORS:
            break
        alternatives = found.setdefault(one.pointer, [])
        if one not in alternatives:
            alternatives.append(one)
    return [_merged(alternatives) for alternatives in found.values()]


_IDENTIFIER = re.compile(r"\^(\w+)_\[0-9a-f\]")


def _field_error(error: Mapping[str, Any], body: Any, schema: "Schema | None") -> FieldError:
    place, *loc = error["loc"]
    context = error.get("ctx") or {}
    kind = error["type"]
    if place != "body":
        # of a list in the query it matters which one it is, not the place in it
        pointer = _pointer(loc[:1])
        if kind == "string_pattern_mismatch" and (identifier := _IDENTIFIER.match(context["pattern"])):
            return FieldError(pointer, "malformed_id", f"Expected an id: {identifier[1]}_ and 32 hexadecimal digits.")
        return FieldError(pointer, kind, error["msg"])
    parts = walked(body, loc, missing=kind == "missing")
    pointer = _pointer(parts)
    match kind:
        case "extra_forbidden":
            return FieldError(pointer, "unknown_field", _unknown(body, parts, schema))
        case "model_attributes_type" | "model_type" | "dict_type":
            return FieldError(pointer, "object_type", f"Expected an object{_shown(body, parts, schema)}.")
        case "id_or_object":
            return FieldError(pointer, kind, f"{error['msg'].rstrip('.')}{_shown(body, parts, schema)}.")
        case "missing":
            shown = _shown(body, parts, schema)
            return FieldError(pointer, kind, f"This field is required{f': an object{shown}' if shown else ''}.")
        case "union_tag_invalid":
            kinds = str(context["expected_tags"]).replace("'", "")
            return FieldError(f"{pointer}/kind", "unknown_kind", f"Expected one of: {kinds}.")
        case "union_tag_not_found":
            shown = _shown(body, parts, schema)
            return FieldError(f"{pointer}/kind", "missing", f"Expected an object with its kind{shown}.")
        case "string_pattern_mismatch" if identifier := _IDENTIFIER.match(context["pattern"]):
            shown = _shown(body, parts, schema)
            expected = f"Expected an id: {identifier[1]}_ and 32 hexadecimal digits"
            return FieldError(pointer, "malformed_id", f"{expected}{f'; or an object{shown}' if shown else ''}.")
    # a validator of ours that looks at a whole object names the field in its context
    pointer = pointer_to(pointer, context["field"]) if "field" in context else pointer
    return FieldError(pointer, kind, error["msg"])


def _merged(alternatives: list[FieldError]) -> FieldError:
    """One error of a field for which every member of a union gave its own."""
    if len(alternatives) == 1:
        return alternatives[0]
    messages = " Or: ".join(one.message for one in alternatives)
    return FieldError(alternatives[0].pointer, "no_alternative_fits", messages)


# --- places in a body -------------------------------------------------------------------------------------------------


def walked(body: Any, loc: Parts, *, missing: bool = False) -> list[str | int]:
    """The place in a body that pydantic means: without the tags of unions.

    Args:
        body: What was sent.
        loc: Pydantic's place, without what says that it is of the body.
        missing: Whether nothing stands there.
    """
    parts: list[str | int] = []
    node, tagged = body, False
    for index, part in enumerate(loc):
        if missing and index == len(loc) - 1:
            return [*parts, part]
        is_tag = isinstance(node, dict) and not tagged and node.get("kind") == part
        is_member = isinstance(node, dict) and part in node
        is_item = isinstance(node, list) and isinstance(part, int) and part < len(node)
        if is_tag or not (is_member or is_item):
            tagged = is_tag
            continue
        parts.append(part)
        node, tagged = node[part], False
    return parts


def value_at(body: Any, parts: Parts) -> Any:
    """What stands at a place of a body; None if there is nothing."""
    for part in parts:
        fits = isinstance(body, dict) or (isinstance(body, list) and isinstance(part, int) and part < len(body))
        body = (body.get(part) if isinstance(body, dict) else body[part]) if fits else None
    return body


def _pointer(parts: Parts) -> str:
    pointer = ""
    for part in parts:
        pointer = pointer_to(pointer, part)
    return pointer


# --- what a body may be -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Place:
    """A field somewhere in a body: its path, and the kinds that have it where not all have."""

    path: str
    kinds: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.path} (of kind {' or '.join(self.kinds)})" if self.kinds else self.path


class Schema:
    """The JSON Schema of a body, asked what fits at a place."""

    def __init__(self, schema: dict[str, Any]) -> None:
        """Takes a schema with its definitions under `$defs`."""
        self._schema = schema
        self._places: dict[str, list[_Place]] | None = None

    def at(self, body: Any, parts: Parts) -> list[dict[str, Any]]:
        """The schemas that may hold at a place of a body, references followed and unions taken apart."""
        node, found = body, self._members(self._schema)
        for part in parts:
            inner = [_inside(one, part) for one in _of_kind(found, node)]
            found = [member for one in inner if one is not None for member in self._members(one)]
            fits = isinstance(part, str) and isinstance(node, dict) and part in node
            fits = fits or (isinstance(part, int) and isinstance(node, list) and part < len(node))
            node = node[part] if fits else None
        return found

    def places(self) -> dict[str, list[_Place]]:
        """Every field name with the places that it has in a body; those that more kinds know come first."""
        if self._places is None:
            found: dict[str, list[_Place]] = {}
            for name, place in self._walk("", self._members(self._schema)):
                found.setdefault(name, []).append(place)
            for places in found.values():
                places.sort(key=lambda place: (place.path.count("."), bool(place.kinds)))
            self._places = found
        return self._places

    def _walk(self, path: str, members: list[dict[str, Any]]) -> Iterator[tuple[str, _Place]]:
        # a union may be reached through several members of another one
        objects = list({id(one): one for one in members if "properties" in one}.values())
        for name in dict.fromkeys(name for one in objects for name in one["properties"]):
            owners = [one for one in objects if name in one["properties"]]
            kinds = tuple(kind for one in owners for kind in _kinds(one)) if len(owners) < len(objects) else ()
            inner = f"{path}.{name}" if path else name
            if name != "kind":
                yield name, _Place(inner, kinds)
            yield from self._walk(inner, [m for one in owners for m in self._members(one["properties"][name])])
        for one in members:
            if "items" in one:
                yield from self._walk(f"{path}[]", self._members(one["items"]))

    def _members(self, schema: dict[str, Any]) -> list[dict[str, Any]]:
        if "$ref" in schema:
            return self._members(self._schema["$defs"][schema["$ref"].rpartition("/")[2]])
        choices = schema.get("oneOf") or schema.get("anyOf")
        return [schema] if choices is None else [member for one in choices for member in self._members(one)]


@cache
def schema_of(model: Any) -> Schema:
    """The schema of a type of bodies."""
    return Schema(TypeAdapter(model).json_schema())


def _inside(schema: dict[str, Any], part: str | int) -> dict[str, Any] | None:
    found = schema.get("items") if isinstance(part, int) else schema.get("properties", {}).get(part)
    return found if isinstance(found, dict) else None


def _kinds(schema: dict[str, Any]) -> list[str]:
    """What `kind` may say in an object; one where it tells the members of a union apart."""
    kind = schema.get("properties", {}).get("kind", {})
    return [kind["const"]] if "const" in kind else list(kind.get("enum", ()))


def _of_kind(members: list[dict[str, Any]], node: Any) -> list[dict[str, Any]]:
    """Those of the kind that an object says, or all."""
    kind = node.get("kind") if isinstance(node, dict) else None
    return [one for one in members if kind in _kinds(one)] or members


# --- the way out ------------------------------------------------------------------------------------------------------


def _shown(body: Any, parts: Parts, schema: Schema | None) -> str:
    """What an object at a place looks like, as the end of a sentence; "" where none is expected."""
    objects = [one for one in schema.at(body, parts) if "properties" in one] if schema else []
    if not objects:
        return ""
    kinds = [(kind, one) for one in objects for kind in _kinds(one)]
    if not kinds:
        return f", such as {_example(objects[0], None)}; its fields: {', '.join(objects[0]['properties'])}"
    # who sends the name of a kind alone is shown that kind; who sends fields alone, the first that has most of them
    sent = value_at(body, parts)
    meant = _plain(sent) if isinstance(sent, str) else None
    fields = set(sent) if isinstance(sent, dict) else set[str]()
    kind, owner = max(kinds, key=lambda one: (_plain(one[0]) == meant, len(fields.intersection(one[1]["properties"]))))
    return f", such as {_example(owner, kind)}; its kinds: {', '.join(kind for kind, _ in kinds)}"


def _example(schema: dict[str, Any], kind: str | None) -> str:
    """The shortest object that fits, as text; where no field is required one of them stands for all."""
    properties = {name: of for name, of in schema["properties"].items() if name != "kind"}
    required = [name for name in properties if name in schema.get("required", ())]
    pairs = [] if kind is None else [f'"kind": "{kind}"']
    pairs += [f'"{name}": {_example_value(properties[name])}' for name in required]
    return "{" + ", ".join(pairs or [f'"{name}": …' for name in list(properties)[:1]]) + "}"


def _example_value(schema: dict[str, Any]) -> str:
    if "examples" in schema:
        return f'"{schema["examples"][0]}"'
    return {"array": "[…]", "object": "{…}", "string": '"…"'}.get(schema.get("type", ""), "…")


def _unknown(body: Any, parts: Parts, schema: Schema | None) -> str:
    """Which fields are known in the place of an unknown one, and which of all is probably meant."""
    message = "This field is not known here"
    if schema is None:
        return f"{message}."
    *parent, name = parts
    here = _of_kind([one for one in schema.at(body, parent) if "properties" in one], value_at(body, parent))
    known = list(dict.fromkeys(name for one in here for name in one["properties"]))
    meant = _meant(str(name), known, schema) if len(str(name)) <= min(LONGEST_SEARCHED, MAX_NAME) else []
    if not meant and "arguments" in known:
        # what an environment's constructor takes is no field of ours
        meant = ["a field of arguments"]
    hint = f" Perhaps {' or '.join(meant)} is meant." if meant else ""
    return f"{message}; known are: {', '.join(known)}.{hint}"


def _meant(name: str, known: Sequence[str], schema: Schema) -> list[str]:
    """What may be meant by a name, the likeliest first: the same name elsewhere before one that looks alike."""
    places = schema.places()
    plain = _plain(name)
    if same := [one for one in known if _plain(one) == plain]:
        return same[:1]
    for like in (_plain, _initials):
        if elsewhere := [str(place) for one in places if like(one) == plain for place in places[one]]:
            return elsewhere[:2]
    if close := _close(name, known):
        return close
    return [str(places[one][0]) for one in _close(name, list(places))]


def _close(name: str, names: Sequence[str]) -> list[str]:
    """The name that is most like another one, or begins with it, or has all of its words."""
    if close := get_close_matches(name.lower(), names, n=1, cutoff=CLOSE):
        return close
    plain, words = _plain(name), set(re.findall(r"[a-z0-9]+", name.lower()))
    longer = [one for one in names if len(plain) >= 3 and _plain(one).startswith(plain)]
    return (longer or [one for one in names if words and words < set(one.split("_"))])[:1]


def _plain(name: str) -> str:
    """A name without what people write in several ways: learningRate, learning-rate, learning_rate."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _initials(name: str) -> str:
    words = name.split("_")
    return "".join(word[:1] for word in words) if len(words) > 1 else ""
