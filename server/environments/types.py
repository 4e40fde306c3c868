"""Which environments may be used here, and with which arguments: the server's allow-list.

Built in are the newest versions of Gymnasium's classic-control and toy-text ids, which need no extra package, and the
engine's own; the operator adds others. The engine itself takes any id, because who calls it can run code anyway; a
client of the server cannot, and must not be able to.
"""

import logging
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import cache
from importlib import import_module
from threading import Lock, Thread
from typing import Any

from pgengine.environments import EnvironmentFacts, near_ids, register_own_ids
from pgengine.environments.arguments import Arguments, constructor_arguments
from pgengine.environments.registry import making
from pgengine.errors import SpecError
from pgengine.spec import EnvironmentSpec, GymnasiumSpec
from server.environments.making import MAKE_SECONDS, in_time, made

__all__ = ["AllowList", "GymnasiumType", "ModuleNotImported"]

_BUILT_IN = ("gymnasium.envs.classic_control.", "gymnasium.envs.toy_text.", "pgengine.environments.")
_REACHES_FILES = re.compile(r"path|file|dir(ectory)?$|url|module|class|callable|function", re.IGNORECASE)
_REFUSED = frozenset({"render_mode"})

_log = logging.getLogger(__name__)


class ModuleNotImported(Exception):
    """A module that the operator has named cannot be imported."""


class GymnasiumType:
    """An id that may be used.

    Attributes:
        id: The registered id.
        max_episode_steps: Episode limit of the id; None if the request has to give one, or nothing registers the id.
        arguments: JSON Schema of the arguments that its constructor takes.
        facts: What is known of it with its own arguments, with a limit of one step where it has none; None if it cannot
            be made here.
        hint: Why it cannot be made here and what to do, for people; None if it can.
        is_settled: Whether it would be no use to try again; what has only taken too long may be ready the next time.
    """

    def __init__(self, environment_id: str, seconds: float = MAKE_SECONDS) -> None:
        """Makes the environment once and reads it."""
        self.id = environment_id
        self.max_episode_steps: int | None = None
        self.arguments: dict[str, Any] = _schema({}, open_=False)
        self.facts: EnvironmentFacts | None = None
        self.hint: str | None = None
        self.is_settled = True
        try:
            self.max_episode_steps = _registered(environment_id).max_episode_steps
        except SpecError as error:
            self.hint = error.message
            return
        limit = 1 if self.max_episode_steps is None else None
        try:
            self.facts = made(GymnasiumSpec(id=environment_id, max_episode_steps=limit), seconds)
        except SpecError as error:
            self.hint = error.message
            self.is_settled = error.code != "environment_not_made" or error.__cause__ is not None
        # of one that hangs nothing more is asked
        with suppress(SpecError):
            self.arguments = in_time(environment_id, lambda: argument_schema(environment_id), seconds)


class AllowList:
    """The ids that may be used here, with what is known of them once it has been asked for.

    Attributes:
        ids: All of them, sorted: built in, named by the operator, and registered by the operator's modules.
    """

    def __init__(
        self, ids: Iterable[str] = (), modules: Iterable[str] = (), *, make_seconds: float = MAKE_SECONDS
    ) -> None:
        """Imports the modules, and warns of every id of the operator's that cannot be used.

        Args:
            ids: Ids, or patterns of them such as `my/*`.
            modules: What they register is allowed by that.
            make_seconds: How long to wait for a constructor.

        Raises:
            ModuleNotImported: if one of the modules cannot be imported.
        """
        self._make_seconds = make_seconds
        self._types: dict[str, GymnasiumType] = {}
        self._lock = Lock()
        by_module = {environment_id for module in modules for environment_id in _registered_by(module)}
        named = set(ids)
        matched = {one for pattern in named if _is_pattern(pattern) for one in _matching(pattern)}
        single = {one for one in named if not _is_pattern(one)}
        self.ids: Sequence[str] = sorted(_built_in_ids() | by_module | matched | single)
        self._warn(sorted(single))
        # a module may register hundreds, which nobody has named one by one: the start does not wait for them
        if others := sorted((by_module | matched) - single - _built_in_ids()):
            Thread(target=self._warn, args=(others,), name="environments", daemon=True).start()

    def _warn(self, ids: Sequence[str]) -> None:
        for environment_id in ids:
            if (hint := self._type(environment_id).hint) is not None:
                _log.warning("%s cannot be used: %s", environment_id, hint)

    def described(self, spec: EnvironmentSpec) -> EnvironmentFacts:
        """What is known of an environment that this server makes.

        Raises:
            SpecError: if it cannot be made.
        """
        return made(spec, self._make_seconds)

    def check(self, spec: EnvironmentSpec) -> None:
        """Whether this server makes the environment.

        Raises:
            SpecError: if the id is not on the list, or an argument is not one of its own.
        """
        if not isinstance(spec, GymnasiumSpec):
            return
        if spec.id not in self.ids:
            near = near_ids(spec.id, self.ids)
            there = f"; {' and '.join(near)} {'is' if len(near) == 1 else 'are'} there" if near else ""
            raise SpecError(
                "/id",
                "environment_not_allowed",
                f"This server does not offer an environment with this id{there}. GET /v1/environment-types lists those "
                "it offers, and its operator adds others with PGENGINE_ENVIRONMENTS.",
            )
        _registered(spec.id)
        if spec.arguments:
            in_time(spec.id, lambda: _check_arguments(spec), self._make_seconds)

    def types(self) -> list[GymnasiumType]:
        """Every id that may be used, made once."""
        return [self._type(environment_id) for environment_id in self.ids]

    def _type(self, environment_id: str) -> GymnasiumType:
        with self._lock:
            known = self._types.get(environment_id)
            if known is None or not known.is_settled:
                known = self._types[environment_id] = GymnasiumType(environment_id, self._make_seconds)
            return known


# --- which ids --------------------------------------------------------------------------------------------------------

_by_module: dict[str, frozenset[str]] = {}
_importing = Lock()


def _registered_by(module: str) -> frozenset[str]:
    """Imports a module and tells which ids that registers; a module is imported once, and remembered with them."""
    from gymnasium.envs.registration import registry

    register_own_ids()
    with _importing:
        if module in _by_module:
            return _by_module[module]
        before = dict(registry)
        try:
            import_module(module)
        # it is the operator's code, and may fail in any way
        except (Exception, SystemExit) as error:
            raise ModuleNotImported(f"{module} cannot be imported: {type(error).__name__}: {error}") from error
        _by_module[module] = frozenset(
            name
            for name, spec in registry.items()
            # something may have imported it before: then the entry points tell
            if before.get(name) is not spec or _module_of(spec.entry_point).startswith(module + ".")
        )
        return _by_module[module]


def _module_of(entry_point: Any) -> str:
    """Where a constructor is, with a dot behind it."""
    named = entry_point.partition(":")[0] if isinstance(entry_point, str) else getattr(entry_point, "__module__", "")
    return f"{named}."


def _is_pattern(text: str) -> bool:
    return any(character in text for character in "*?[")


def _matching(pattern: str) -> set[str]:
    from gymnasium.envs.registration import registry

    register_own_ids()
    found = {name for name in registry if fnmatchcase(name, pattern)}
    if not found:
        _log.warning("%s in PGENGINE_ENVIRONMENTS fits no registered environment", pattern)
    return found


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


def argument_schema(environment_id: str) -> dict[str, Any]:
    """JSON Schema of the arguments that may be given; whatever could reach a file, a module or a screen is left out.

    Raises:
        SpecError: if no environment has this id, or what it needs is not installed.
    """
    arguments = _arguments(GymnasiumSpec(id=environment_id))
    properties = {name: one.schema for name, one in arguments.parameters.items() if _may_be_given(name, one.schema)}
    return _schema(properties, open_=arguments.unnamed)


def _schema(properties: dict[str, Any], *, open_: bool) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": open_}


def _registered(environment_id: str) -> Any:
    import gymnasium

    try:
        return gymnasium.spec(environment_id)
    except gymnasium.error.Error as error:
        message = (
            f"no environment is registered with the id {environment_id}: its package is missing, or the module that "
            "registers it has to be named in PGENGINE_ENVIRONMENT_MODULES"
        )
        raise SpecError("/id", "environment_not_found", message) from error


def _arguments(spec: GymnasiumSpec) -> Arguments:
    registered = _registered(spec.id)
    with making(spec):
        return constructor_arguments(registered)


def _may_be_given(name: str, schema: dict[str, Any] | None = None) -> bool:
    reaches = schema is not None and "path" in str(schema.get("format", schema.get("anyOf", "")))
    return name not in _REFUSED and not _REACHES_FILES.search(name) and not reaches


def _check_arguments(spec: GymnasiumSpec) -> None:
    arguments = _arguments(spec)
    offered = {name: one for name, one in arguments.parameters.items() if _may_be_given(name, one.schema)}
    for name in spec.arguments:
        if not _may_be_given(name):
            pointer = f"/arguments/{name.replace('~', '~0').replace('/', '~1')}"
            known = ", ".join(offered) or "none"
            message = "this server takes no argument that could reach a screen, a file or code"
            raise SpecError(pointer, "unknown_argument", f"{message}; {spec.id} takes: {known}")
    Arguments(offered, arguments.unnamed).converted(spec.id, spec.arguments)
