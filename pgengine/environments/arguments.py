"""What an environment's constructor takes, read from its signature: as JSON Schema, and as a check of JSON values.

A parameter's annotation says what fits (Literal, unions, enumerations, lists, tuples, dictionaries, ranges by
`Annotated`), or, where it has none, its default does. JSON has no tuples and no enumerations; a value that fits is
given to the constructor as what it asks for. This file knows signatures; which arguments strangers may give is for
others to decide.
"""

import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from types import UnionType
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic_core import PydanticSerializationError, to_jsonable_python

from pgengine.errors import SpecError

__all__ = ["Arguments", "Parameter", "constructor_arguments"]

Adapter = Any
"""A `pydantic.TypeAdapter` of any type; those who check types while running do not know it as one."""

_MADE_WITH = frozenset({"id", "disable_env_checker", "max_episode_steps"})  # gymnasium.make takes these itself

_Share = Annotated[float, Field(ge=0.0, le=1.0)]
_LakeRow = Annotated[str, Field(pattern=r"^[SFHG]{1,16}$")]

# what Gymnasium's own classes document and do not check, or, of a map, as much as a table is made for
_DOCUMENTED: dict[str, dict[str, Any]] = {
    "gymnasium.envs.toy_text.frozen_lake.FrozenLakeEnv": {
        "desc": Annotated[list[_LakeRow], Field(min_length=1, max_length=16)] | None,
        "map_name": Literal["4x4", "8x8"] | None,
        "success_rate": _Share,
    },
    "gymnasium.envs.toy_text.taxi.TaxiEnv": {"rainy_probability": _Share, "fickle_probability": _Share},
}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a constructor that JSON can give.

    Attributes:
        schema: JSON Schema of its values, with the default.
        read: From a JSON value to what the constructor gets.
    """

    schema: dict[str, Any]
    read: Callable[[Any], Any] = field(repr=False)


@dataclass(frozen=True)
class Arguments:
    """What a constructor takes.

    Attributes:
        parameters: By name, those that JSON can give.
        unnamed: Whether it also takes names that its signature does not list (`**kwargs`).
    """

    parameters: dict[str, Parameter]
    unnamed: bool

    def converted(self, environment_id: str, values: dict[str, Any]) -> dict[str, Any]:
        """JSON values as the constructor gets them.

        Raises:
            SpecError: `unknown_argument`, `argument_type` or `argument_value`, at the argument.
        """
        return {name: self._converted(environment_id, name, value) for name, value in values.items()}

    def _converted(self, environment_id: str, name: str, value: Any) -> Any:
        pointer = f"/arguments/{name.replace('~', '~0').replace('/', '~1')}"
        if name == "max_episode_steps":
            message = "max_episode_steps is a field of its own beside arguments, not one of them"
            raise SpecError(pointer, "unknown_argument", message)
        if name in self.parameters:
            parameter = self.parameters[name]
            try:
                return parameter.read(value)
            except ValidationError as error:
                wrong_type = all("type" in one["type"] for one in error.errors(include_url=False))
                code = "argument_type" if wrong_type else "argument_value"
                raise SpecError(pointer, code, f"expected {_in_words(parameter.schema)}") from None
        if self.unnamed and name not in _MADE_WITH:
            return value
        known = ", ".join(self.parameters) or "none"
        raise SpecError(pointer, "unknown_argument", f"{environment_id} takes no such argument; it takes: {known}")


def constructor_arguments(registered: Any) -> Arguments:
    """What the constructor of a registered environment takes.

    Args:
        registered: A `gymnasium.envs.registration.EnvSpec`.

    Raises:
        Exception: whatever importing the environment raises.
    """
    from gymnasium.envs.registration import load_env_creator

    entry_point = registered.entry_point
    creator = load_env_creator(entry_point) if isinstance(entry_point, str) else entry_point
    constructor = creator.__init__ if inspect.isclass(creator) else creator
    signature = inspect.signature(creator)
    hints = _hints(constructor) | _DOCUMENTED.get(_name_of(creator), {})
    defaults = {name: one.default for name, one in signature.parameters.items()} | registered.kwargs
    unnamed = any(one.kind is one.VAR_KEYWORD for one in signature.parameters.values())
    names = [
        name for name, one in signature.parameters.items() if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
    ]
    if unnamed:
        names += [name for name in registered.kwargs if name not in names]
    read = {name: _parameter(hints.get(name, inspect.Parameter.empty), defaults[name]) for name in names}
    return Arguments({name: one for name, one in read.items() if one is not None}, unnamed)


def _name_of(creator: Any) -> str:
    return f"{getattr(creator, '__module__', '')}.{getattr(creator, '__qualname__', '')}"


def _hints(constructor: Any) -> dict[str, Any]:
    """Annotations by name; one that cannot be evaluated is left out, and says nothing."""
    constructor = inspect.unwrap(getattr(constructor, "func", constructor))
    found: dict[str, Any] = {}
    for name, hint in getattr(constructor, "__annotations__", {}).items():
        try:
            one = {name: hint}
            holder = type("Holder", (), {"__annotations__": one})
            names = getattr(constructor, "__globals__", {})
            found |= typing.get_type_hints(holder, globalns=names, localns=names, include_extras=True)
        # it is another project's text, and what it names may be there for type checkers alone
        except Exception:  # noqa: BLE001
            continue
    return found


def _parameter(hint: Any, default: Any) -> Parameter | None:
    """A parameter as JSON sees it; None if no JSON value is one."""
    # Any says nothing; a default says more
    said = hint is not inspect.Parameter.empty and hint is not Any
    fitting = _fitting(hint if said else _kind_of(default))
    if fitting is None:
        return None
    adapter = _adapter(fitting)
    schema = _plain(adapter.json_schema())
    if schema == {"type": "null"}:
        return None
    if default is not inspect.Parameter.empty:
        try:
            written = to_jsonable_python(default)
            _read(adapter, written)
            schema["default"] = written
        except (PydanticSerializationError, ValidationError, ValueError, TypeError):
            pass  # a default that JSON cannot write, or that its own annotation does not allow
    return Parameter(schema, lambda value: _read(adapter, value))


def _read(adapter: Adapter, value: Any) -> Any:
    """The value as the constructor wants it; a whole number may be written 4.0."""
    text = _json(value)
    try:
        return adapter.validate_json(text)
    except ValidationError:
        whole = _whole(value)
        if _json(whole) == text:
            raise
        try:
            return adapter.validate_json(_json(whole))
        except ValidationError:
            pass
        raise


def _json(value: Any) -> bytes:
    written: bytes = _ANY.dump_json(value)
    return written


_ANY: Adapter = TypeAdapter(JsonValue)


def _whole(value: Any) -> Any:
    if isinstance(value, list):
        return [_whole(one) for one in value]
    if isinstance(value, dict):
        return {name: _whole(one) for name, one in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _kind_of(default: Any) -> Any:
    """What a default says of a parameter without annotation."""
    if isinstance(default, bool | str | list | dict | tuple | Enum):
        return type(default)
    if isinstance(default, int | float):
        return float | int  # a default of 0 says only that any number fits
    return JsonValue if default is None or default is inspect.Parameter.empty else type(default)


def _fitting(hint: Any) -> Any:
    """The annotation without what no JSON value can be; None if nothing is left."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, UnionType):
        members = [one for member in typing.get_args(hint) if (one := _fitting(member)) is not None]
        return typing.Union[tuple(members)] if members else None  # noqa: UP007  made while running
    if (origin or hint) is np.ndarray:
        return Annotated[list[JsonValue], AfterValidator(np.asarray)]
    if isinstance(hint, type) and issubclass(hint, np.integer | np.floating | np.bool_):
        return {"f": float, "b": bool}.get(np.dtype(hint).kind, int)
    try:
        _adapter(hint).json_schema()
    # a class of another project, a function, a module: nothing that JSON has; a model may raise anything besides
    except Exception:  # noqa: BLE001
        return None
    return hint


def _adapter(hint: Any) -> Adapter:
    try:
        return TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False))
    except PydanticUserError as error:
        if error.code != "type-adapter-config-unused":  # models bring a configuration of their own
            raise
        return TypeAdapter(hint)


# --- schemas ----------------------------------------------------------------------------------------------------------


def _plain(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema that stands for itself: references written out, without titles, unions of scalars as one list."""
    body = {name: one for name, one in schema.items() if name != "$defs"}
    written: dict[str, Any] = _written_out(body, schema.get("$defs", {}), ())
    return written


def _written_out(schema: Any, definitions: dict[str, Any], inside: tuple[str, ...]) -> Any:
    if isinstance(schema, list):
        return [_written_out(one, definitions, inside) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if name in inside:  # it holds itself: any depth is allowed, and one is written
            return {}
        return _written_out(definitions.get(name, {}), definitions, (*inside, name))
    left_out = {"title"} if not isinstance(schema.get("title"), dict) else set()
    written = {name: _written_out(one, definitions, inside) for name, one in schema.items() if name not in left_out}
    if all(set(one) == {"type"} and isinstance(one["type"], str) for one in written.get("anyOf", [{}])):
        names = {one["type"] for one in written.pop("anyOf")}
        names -= {"integer"} if "number" in names else set()
        written["type"] = min(names) if len(names) == 1 else sorted(names)
    return written


_WORDS = {
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "string": "a text",
    "null": "null",
    "array": "a list",
    "object": "an object",
}


def _in_words(schema: dict[str, Any]) -> str:
    """What fits a schema, for people."""
    if "anyOf" in schema:
        ways = dict.fromkeys(_in_words(one) for one in schema["anyOf"])
        # a list comes last, so that nobody takes what follows for one of its values
        return " or ".join(sorted(ways, key=lambda way: way.startswith("a list")))
    if "const" in schema:
        return _quoted(schema["const"])
    if "enum" in schema:
        return f"one of {', '.join(_quoted(value) for value in schema['enum'])}"
    types = schema.get("type", [])
    if isinstance(types, list):
        return " or ".join(_WORDS[one] for one in types) or "a JSON value"
    return _WORDS[types] + _range(schema) + _length(schema) + _pattern(schema)


def _range(schema: dict[str, Any]) -> str:
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f" from {low:g} to {high:g}"
    said = [
        f"{words} {value:g}"
        for words, value in (("at least", low), ("above", above), ("at most", high), ("below", below))
        if value is not None
    ]
    return f" {' and '.join(said)}" if said else ""


def _length(schema: dict[str, Any]) -> str:
    least, most = schema.get("minItems"), schema.get("maxItems")
    said = ""
    if most is not None and least == most:
        said = f" of {most}"
    elif most is not None:
        said = f" of {least or 0} to {most}"
    elif least:
        said = f" of {least} or more"
    if "prefixItems" in schema:
        return f"{said}: {', '.join(_in_words(one) for one in schema['prefixItems'])}"
    return f"{said}, each {_in_words(schema['items'])}" if schema.get("items") else said


def _pattern(schema: dict[str, Any]) -> str:
    return f" that matches {schema['pattern']}" if "pattern" in schema else ""


def _quoted(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else f"{value!r}"
