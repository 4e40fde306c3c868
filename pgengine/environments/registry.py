"""What Gymnasium has registered: this package's own ids, look-ups, and what goes wrong when something is made."""

import copy
import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

from pgengine.errors import SpecError
from pgengine.spec import GymnasiumSpec

__all__ = ["making", "near_ids", "register_own_ids", "registered"]

LONGEST_REASON = 500  # characters of what a constructor says; it may say anything

# ids of this package: where the class is, and the episode limit
OWN_IDS: dict[str, tuple[str, int]] = {
    "pgengine/Aliased-v0": ("pgengine.environments.catalogue:Aliased", 200),
    "pgengine/Bandit-v0": ("pgengine.environments.catalogue:Bandit", 1),
    "pgengine/Chain-v0": ("pgengine.environments.catalogue:Chain", 100),
    "pgengine/GridWorld-v0": ("pgengine.environments.catalogue:GridWorld", 100),
    "pgengine/Particle-v0": ("pgengine.environments.particle:Particle", 50),
    "pgengine/ParticleContinuous-v0": ("pgengine.environments.particle:ContinuousParticle", 50),
    "pgengine/TMaze-v0": ("pgengine.environments.catalogue:TMaze", 100),
}
_registering = Lock()


def register_own_ids() -> None:
    """Makes this package's environments known to Gymnasium, so that `gymnasium.make` finds them, too.

    Called before an id is looked up; calling it again changes nothing.
    """
    import gymnasium

    with _registering:
        for name, (entry_point, limit) in OWN_IDS.items():
            if name not in gymnasium.registry:
                gymnasium.register(name, entry_point=entry_point, max_episode_steps=limit)


@contextmanager
def making(spec: GymnasiumSpec) -> Iterator[None]:
    """What goes wrong while an environment is imported and made, with the reason that it gives."""
    try:
        yield
    except SpecError:
        raise
    # a constructor is code of another project: it may raise anything, and may even try to leave
    except (Exception, SystemExit) as error:
        own = spec.id in OWN_IDS or type(error).__name__ == "DependencyNotInstalled"
        reason = str(error) if own else f"{type(error).__name__}: {error}"
        raise SpecError(
            "/arguments" if spec.arguments else "/id",
            "environment_not_made",
            f"{spec.id} could not be made: {reason[:LONGEST_REASON]}",
        ) from error


def registered(spec: GymnasiumSpec) -> Any:
    """What Gymnasium knows of an id, without its order-enforcing wrapper.

    Raises:
        SpecError: if there is no such id; it names those that may have been meant.
    """
    import gymnasium

    if ":" in spec.id:  # Gymnasium would import the module before the colon
        raise SpecError("/id", "unknown_environment", "expected the id of a registered environment, without a colon")
    register_own_ids()
    try:
        found = copy.deepcopy(gymnasium.spec(spec.id))
    except gymnasium.error.Error as error:
        near = near_ids(spec.id, gymnasium.registry)
        hint = f"; there is {' and '.join(near)}" if near else f": {error}"
        raise SpecError("/id", "unknown_environment", f"no environment has the id {spec.id!r}{hint}") from error
    found.order_enforce = False
    return found


def near_ids(wrong: str, known: Iterable[str]) -> list[str]:
    """Up to three ids that somebody may have meant who wrote another one: the newest version, another spelling."""
    names: dict[str, list[str]] = {}
    for name in known:
        names.setdefault(_plain(name), []).append(name)

    def best(plain: str) -> str:
        return max(names[plain], key=lambda name: (name.casefold() == wrong.casefold(), *_likeness(name, wrong)))

    if _plain(wrong) in names:
        return [best(_plain(wrong))]
    return [best(plain) for plain in difflib.get_close_matches(_plain(wrong), names, n=3, cutoff=0.75)]


def _parts(name: str) -> tuple[str, str, int]:
    """Namespace, name and version of an id."""
    rest, dash, version = name.rpartition("-v")
    namespace, _, own = (rest if dash and version.isdigit() else name).rpartition("/")
    return namespace, own, int(version) if dash and version.isdigit() else -1


def _plain(name: str) -> str:
    return _parts(name)[1].casefold().replace("-", "").replace("_", "")


def _likeness(name: str, wrong: str) -> tuple[bool, int]:
    return _parts(name)[0].casefold() == _parts(wrong)[0].casefold(), _parts(name)[2]
