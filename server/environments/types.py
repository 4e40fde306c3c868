"""Which environments may be used here, and with which arguments: the server's allow-list.

Built in are the newest versions of Gymnasium's classic-control and toy-text ids, which need no extra package, and the
engine's own; the operator adds others. The engine itself takes any id, because who calls it can run code anyway; a
client of the server cannot, and must not be able to.
"""

import inspect
import logging
import re
import typing
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import import_module
from threading import Lock
from types import UnionType
from typing import Any

from pgengine.environments import EnvironmentFacts, describe, register_own_ids
from pgengine.errors import SpecError
from pgengine.spec import EnvironmentSpec, GymnasiumSpec

__all__ = ["AllowList", "GymnasiumType", "ModuleNotImported"]

_BUILT_IN = ("gymnasium.envs.classic_control.", "gymnasium.envs.toy_text.", "pgengine.environments.")
_SCALARS: dict[type, str] = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
_REACHES_FILES = re.compile(r"path|file|dir(ectory)?$|url|module|class|callable|function")
_REFUSED = frozenset({"self", "render_mode", "max_episode_steps", "disable_env_checker"})

_log = logging.getLogger(__name__)


class ModuleNotImported(Exception):
    """A module that the operator has named cannot be imported."""


class GymnasiumType:
    """An id that may be used.

    Attributes:
        id: The registered id.
        arguments: JSON Schema of the arguments that its constructor takes.
        max_episode_steps: Episode limit of the id; None if the request has to give one.
        facts: What is known of it with its own arguments, with a limit of one step where it has none.
    """

    def __init__(self, environment_id: str) -> None:
        """Makes the environment once and reads it.

        Raises:
            SpecError: if it cannot be made or a space is not supported.
        """
        self.id = environment_id
        self.max_episode_steps: int | None = _registered(environment_id).max_episode_steps
        self.arguments = argument_schema(environment_id)
        limit = 1 if self.max_episode_steps is None else None
        self.facts: EnvironmentFacts = describe(GymnasiumSpec(id=environment_id, max_episode_steps=limit))


class AllowList:
    """The environments of one server.

    Args:
        ids: Ids beside the built-in ones.
        modules: Modules that are imported now because they register environments.

    Raises:
        ModuleNotImported: if one of them cannot be.
    """

    def __init__(self, ids: Iterable[str] = (), modules: Iterable[str] = ()) -> None:
        for module in modules:
            _import(module)
        added = set(ids)
        for environment_id in sorted(added):
            _warn_of_unknown(environment_id)
        self.ids: Sequence[str] = sorted(_built_in_ids() | added)
        self._types: list[GymnasiumType] | None = None
        self._lock = Lock()

    def check(self, spec: EnvironmentSpec) -> None:
        """Whether this server makes the environment.

        Raises:
            SpecError: if the id is not on the list, or an argument is not one of its own.
        """
        if not isinstance(spec, GymnasiumSpec):
            return
        if spec.id not in self.ids:
            raise SpecError(
                "/id",
                "environment_not_allowed",
                "This server does not offer an environment with this id; GET /v1/environment-types lists those it "
                "offers, and its operator adds others with PGENGINE_ENVIRONMENTS.",
            )
        _check_arguments(spec)

    def types(self) -> list[GymnasiumType]:
        """Every id that can be made here and whose spaces are supported; made once."""
        with self._lock:
            if self._types is None:
                self._types = [found for environment_id in self.ids if (found := _type(environment_id)) is not None]
            return self._types


def _import(module: str) -> None:
    try:
        import_module(module)
    # it is the operator's code, and may fail in any way
    except Exception as error:
        raise ModuleNotImported(f"{module} cannot be imported: {type(error).__name__}: {error}") from error


def _warn_of_unknown(environment_id: str) -> None:
    try:
        _registered(environment_id)
    except SpecError as error:
        _log.warning("%s cannot be used: %s", environment_id, error.message)


def _type(environment_id: str) -> GymnasiumType | None:
    try:
        return GymnasiumType(environment_id)
    except SpecError:
        return None


@cache
def _built_in_ids() -> frozenset[str]:
    from gymnasium.envs.registration import find_highest_version, registry

    register_own_ids()
    return frozenset(
        spec.id
        for spec in registry.values()
        if str(spec.entry_point).startswith(_BUILT_IN)
        and spec.version == find_highest_version(spec.namespace, spec.name)
    )


# --- arguments --------------------------------------------------------------------------------------------------------


@cache
def argument_schema(environment_id: str) -> dict[str, Any]:
    """JSON Schema of the arguments that may be given: named parameters of the constructor that are scalars.

    Whatever could reach a file, a module or a screen is left out.
    """
    registered = _registered(environment_id)
    creator = _creator(environment_id, registered.entry_point)
    constructor = creator.__init__ if inspect.isclass(creator) else creator
    properties = {}
    for name, parameter in inspect.signature(constructor).parameters.items():
        default = registered.kwargs.get(name, parameter.default)
        types = _types_of(constructor, parameter, default)
        if _may_be_given(parameter) and types:
            properties[name] = _property(types, default)
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _registered(environment_id: str) -> Any:
    import gymnasium

    try:
        return gymnasium.spec(environment_id)
    except gymnasium.error.Error as error:
        raise SpecError("/id", "environment_not_found", "No environment is registered with this id.") from error


def _creator(environment_id: str, entry_point: Any) -> Any:
    from gymnasium.envs.registration import load_env_creator

    if not isinstance(entry_point, str):
        return entry_point
    try:
        return load_env_creator(entry_point)
    except ImportError as error:
        message = f"{environment_id} needs a package that is not installed here."
        raise SpecError("/id", "environment_not_made", message) from error


def _may_be_given(parameter: inspect.Parameter) -> bool:
    named = parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return named and parameter.name not in _REFUSED and not _REACHES_FILES.search(parameter.name)


def _types_of(constructor: Any, parameter: inspect.Parameter, default: Any) -> list[str]:
    """JSON types of a parameter by its annotation, else by its default; [] if it is no scalar."""
    try:
        hint = typing.get_type_hints(constructor).get(parameter.name)
    except (NameError, TypeError):  # an annotation that cannot be evaluated says nothing
        hint = None
    if hint is None or hint is Any:
        hint = type(default)
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)
    if any(member not in _SCALARS for member in members) or set(members) == {type(None)}:
        return []
    names = {_SCALARS[member] for member in members}
    if parameter.annotation is parameter.empty and names == {"integer"}:
        # without an annotation a default of 0 says only that any number fits
        return ["number"]
    return sorted(names)


def _property(types: list[str], default: Any) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": types[0] if len(types) == 1 else types}
    if isinstance(default, bool | int | float | str):
        schema["default"] = default
    return schema


def _check_arguments(spec: GymnasiumSpec) -> None:
    properties = argument_schema(spec.id)["properties"]
    for name, value in spec.arguments.items():
        pointer = f"/arguments/{name.replace('~', '~0').replace('/', '~1')}"
        if name not in properties:
            known = ", ".join(properties) or "none"
            raise SpecError(pointer, "unknown_argument", f"{spec.id} takes no such argument; it takes: {known}.")
        types = properties[name]["type"]
        expected = [types] if isinstance(types, str) else types
        if not any(_fits(value, one) for one in expected):
            raise SpecError(pointer, "argument_type", f"Expected a value of type {' or '.join(expected)}.")


def _fits(value: Any, name: str) -> bool:
    if name == "number":
        return type(value) in (int, float)
    return _SCALARS[type(value)] == name
