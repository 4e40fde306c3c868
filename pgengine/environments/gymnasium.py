"""Gymnasium's environments as episodes.

A batch is a list of single environments, each episode begun by `reset(seed=…)` with a seed of its own. Gymnasium's
vector environments reset inside `step` without a seed, step ended lanes too and share a generator, so an episode
would depend on its neighbours. The episode limit is ours: it is counted here, and the id's own wrapper for it is left
out.
"""

import copy
import inspect
from contextlib import suppress
from threading import Lock
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped, UInt64

from pgengine.environments.episodes import EnvironmentFacts, Step
from pgengine.errors import EnvironmentFailure, SpecError
from pgengine.spaces import array_dtype, array_shape, inside, read_space
from pgengine.spec import GymnasiumSpec

__all__ = ["GymnasiumEpisodes", "register_own_ids"]

# ids whose episodes never terminate, so that the limit fixes their length (read off their step functions)
NEVER_TERMINATES = frozenset({"Pendulum-v1", "pgengine/Particle-v0", "pgengine/ParticleContinuous-v0"})

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


class GymnasiumEpisodes:
    """A registered environment, one instance for each live episode; instances are made once and used again."""

    def __init__(self, spec: GymnasiumSpec) -> None:
        """Makes the first instance and reads it.

        Raises:
            SpecError: if the id is unknown, an argument is refused, there is no episode limit, or a space is not
                supported.
        """
        self.spec = spec
        self._registered = _registered(spec)
        self._pool: list[Any] = [self._make()]
        self.facts = self._describe(self._pool[0])
        self._observation_shape = array_shape(self.facts.observation_space)
        self._observation_dtype = array_dtype(self.facts.observation_space)
        self._live: list[Any] = []
        self._steps = 0

    def _make(self) -> Any:
        import gymnasium

        try:
            made = gymnasium.make(
                self._registered, max_episode_steps=-1, disable_env_checker=True, **self.spec.arguments
            )
        except Exception as error:
            # what our own constructors say is meant for the caller; that of others may say anything
            reason = str(error) if self.spec.id in OWN_IDS else f"its constructor raised {type(error).__name__}"
            raise SpecError(
                "/arguments" if self.spec.arguments else "/id",
                "environment_not_made",
                f"{self.spec.id} could not be made: {reason}",
            ) from error
        _quicken(made.unwrapped)
        return made

    def _describe(self, environment: Any) -> EnvironmentFacts:
        limit = self.spec.max_episode_steps or self._own_limit
        if limit is None:
            raise SpecError(
                "/max_episode_steps",
                "episode_limit_missing",
                f"{self.spec.id} has no episode limit of its own; give max_episode_steps, it is part of the objective",
            )
        return EnvironmentFacts(
            observation_space=read_space(environment.observation_space, "observation"),
            action_space=read_space(environment.action_space, "action"),
            max_episode_steps=limit,
            limit_from="id" if self.spec.max_episode_steps is None else "declared",
            fixed_steps=limit if self.spec.id in NEVER_TERMINATES else None,
            reward_threshold=self._registered.reward_threshold,
        )

    @property
    def _own_limit(self) -> int | None:
        limit = self._registered.max_episode_steps
        return None if limit is None else int(limit)

    @property
    def instance(self) -> Any:
        """One of the instances, to be read and not to be played."""
        return self._pool[0]

    @property
    def uniforms(self) -> int:
        """Each instance has a generator of its own, seeded at the beginning of each episode."""
        return 0

    def begin(self, noise: UInt64[np.ndarray, "K"]) -> Shaped[np.ndarray, "K ..."]:
        """Resets one instance for each seed."""
        while len(self._pool) < len(noise):
            self._pool.append(self._make())
        self._live = self._pool[: len(noise)]
        self._steps = 0
        observations = self._room()
        try:
            for lane, (environment, word) in enumerate(zip(self._live, noise.tolist(), strict=True)):
                observations[lane] = self._shaped(environment.reset(seed=word >> 1)[0])
        except (Exception, SystemExit) as error:
            raise self._failure("reset", error) from error
        self._check(observations)
        return observations

    def step(self, actions: Shaped[np.ndarray, "N ..."], noise: Float[np.ndarray, "N U"] | None) -> Step:
        """Steps the instances one after the other."""
        N = len(self._live)
        observations = self._room()
        rewards = np.empty(N)
        terminated = np.zeros(N, dtype=bool)
        truncated = np.zeros(N, dtype=bool)
        # numpy integers, not Python ones: Discrete.contains takes a slower path for the latter
        each = list(actions)
        try:
            for lane in range(N):
                seen, rewards[lane], terminated[lane], truncated[lane], _ = self._live[lane].step(each[lane])
                observations[lane] = self._shaped(seen)
        # code of another project may raise anything, and may even try to leave
        except (Exception, SystemExit) as error:
            raise self._failure("step", error) from error
        if not np.isfinite(rewards).all():
            raise EnvironmentFailure(f"{self.spec.id} gave a reward that is not finite in step {self._steps}")
        self._check(observations)
        self._steps += 1
        if self._steps >= self.facts.max_episode_steps:
            truncated[:] = True
        return Step(observations, rewards, terminated, truncated & ~terminated)

    def _shaped(self, observation: Any) -> Any:
        """The observation, unless numpy would stretch it to the shape that was promised."""
        shape = observation.shape if type(observation) is np.ndarray else np.shape(observation)
        if shape != self._observation_shape:
            raise ValueError(f"an observation has shape {shape}, promised was {self._observation_shape}")
        return observation

    def _check(self, observations: np.ndarray) -> None:
        """What numpy takes without a word and a policy could not read."""
        if not inside(self.facts.observation_space, observations).all():
            raise EnvironmentFailure(f"{self.spec.id} gave an observation outside of its space at step {self._steps}")

    def _room(self) -> np.ndarray:
        return np.empty((len(self._live), *self._observation_shape), dtype=self._observation_dtype)

    def _failure(self, verb: str, error: BaseException) -> EnvironmentFailure:
        return EnvironmentFailure(
            f"{self.spec.id} raised {type(error).__name__} in {verb} at step {self._steps}: {str(error)[:300]}"
        )

    def keep(self, mask: Bool[np.ndarray, "N"]) -> None:
        """Goes on with the lanes of the mask."""
        self._live = [environment for environment, kept in zip(self._live, mask.tolist(), strict=True) if kept]

    def close(self) -> None:
        """Closes all instances."""
        for environment in self._pool:
            environment.close()
        self._pool, self._live = [], []


def _quicken(environment: Any) -> None:
    """Gives an environment a discrete action space with a quicker `contains`.

    Gymnasium's environments ask it in every step; of CartPole-v1's step it takes 40%.
    """
    from gymnasium.spaces import Discrete

    class QuickDiscrete(Discrete):
        def contains(self, x: Any) -> bool:
            if type(x) is np.int64:
                return bool(self.start <= x < self.start + self.n)
            return super().contains(x)

    space = getattr(environment, "action_space", None)
    if type(space) is Discrete:
        # a space that is computed by a property cannot be replaced, and is as good as it was
        with suppress(AttributeError):
            environment.action_space = QuickDiscrete(int(space.n), start=int(space.start))


def _registered(spec: GymnasiumSpec) -> Any:
    import gymnasium

    if ":" in spec.id:  # Gymnasium would import the module before the colon
        raise SpecError("/id", "unknown_environment", "expected the id of a registered environment, without a colon")
    register_own_ids()
    try:
        registered = copy.deepcopy(gymnasium.spec(spec.id))
    except gymnasium.error.Error as error:
        raise SpecError("/id", "unknown_environment", f"no environment has the id {spec.id!r}: {error}") from error
    registered.order_enforce = False
    _check_arguments(registered, spec)
    return registered


def _check_arguments(registered: Any, spec: GymnasiumSpec) -> None:
    from gymnasium.envs.registration import load_env_creator

    if not spec.arguments:
        return
    creator = registered.entry_point if callable(registered.entry_point) else load_env_creator(registered.entry_point)
    parameters = inspect.signature(creator).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name in spec.arguments:
        if name not in parameters:
            known = ", ".join(sorted(parameters)) or "none"
            raise SpecError(f"/arguments/{name}", "unknown_argument", f"{spec.id} takes {known}")
