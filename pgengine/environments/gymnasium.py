"""Gymnasium's environments as episodes.

A batch is a list of single environments, each episode begun by `reset(seed=…)` with a seed of its own. Gymnasium's
vector environments reset inside `step` without a seed, step ended lanes too and share a generator, so an episode
would depend on its neighbours. The episode limit is ours: it is counted here, and the id's own wrapper for it is left
out.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped, UInt64

from pgengine.environments.arguments import constructor_arguments
from pgengine.environments.episodes import EnvironmentFacts, Step
from pgengine.environments.ranges import known_rewards, range_of_steps
from pgengine.environments.registry import making, registered
from pgengine.environments.returned import Returned, UnclearReturn
from pgengine.errors import EnvironmentFailure, SpecError
from pgengine.spaces import array_dtype, array_shape, read_space
from pgengine.spec import GymnasiumSpec

__all__ = ["GymnasiumEpisodes"]

# ids whose episodes never terminate, so that the limit fixes their length (read off their step functions)
NEVER_TERMINATES = frozenset({"Pendulum-v1", "pgengine/Particle-v0", "pgengine/ParticleContinuous-v0"})

SEED_SHIFTS = (1, 32, 33)
"""Bits of a word of noise that are left out of the seed of an episode: the seed has 63 bits, or 32 or 31 where `reset`
takes no larger one, as numpy.random.seed and integers of C do not."""


class GymnasiumEpisodes:
    """A registered environment, one instance for each live episode; instances are made once and used again."""

    def __init__(self, spec: GymnasiumSpec) -> None:
        """Makes the first instance and reads it.

        Raises:
            SpecError: if the id is unknown, an argument is refused, there is no episode limit, or a space is not
                supported.
        """
        self.spec = spec
        self._registered = registered(spec)
        self._arguments: dict[str, Any] = {}
        if spec.arguments:
            with making(spec):
                self._arguments = constructor_arguments(self._registered).converted(spec.id, spec.arguments)
        self._pool: list[Any] = [self._make()]
        try:
            self.facts = self._describe(self._pool[0])
        except SpecError:
            self.close()
            raise
        self._returned = Returned(self.facts.observation_space)
        self._seed_shift = SEED_SHIFTS[0]
        self._live: list[Any] = []
        self._steps = 0

    def _make(self) -> Any:
        import gymnasium

        with making(self.spec):
            made = gymnasium.make(self._registered, max_episode_steps=-1, disable_env_checker=True, **self._arguments)
        _quicken(made.unwrapped)
        return made

    def _describe(self, environment: Any) -> EnvironmentFacts:
        # a space that is not supported is said first: no limit would help
        observation_space = read_space(environment.observation_space, "observation")
        action_space = read_space(environment.action_space, "action")
        limit = self.spec.max_episode_steps or self._own_limit
        if limit is None:
            raise SpecError(
                "/max_episode_steps",
                "episode_limit_missing",
                f"{self.spec.id} has no episode limit of its own; give max_episode_steps, it is part of the objective",
            )
        fixed = self.spec.id in NEVER_TERMINATES
        rewards = known_rewards(environment)
        return EnvironmentFacts(
            observation_space=observation_space,
            action_space=action_space,
            max_episode_steps=limit,
            limit_from="id" if self.spec.max_episode_steps is None else "declared",
            fixed_steps=limit if fixed else None,
            reward_threshold=self._registered.reward_threshold,
            return_range=range_of_steps(rewards, limit, fixed=fixed),
            cut_return_range=range_of_steps(rewards, limit, fixed=False),
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
        words: list[int] = noise.tolist()
        try:
            return self._reset(words)
        except EnvironmentFailure:
            shift = self._shift_of_smaller_seeds(max(words))
            if shift is None:
                raise
            self._seed_shift = shift
        return self._reset(words)

    def _reset(self, words: list[int]) -> Shaped[np.ndarray, "K ..."]:
        observations = self._room()
        with self._failing("reset"):
            for lane, (environment, word) in enumerate(zip(self._live, words, strict=True)):
                observations[lane] = self._returned.reset(environment.reset(seed=word >> self._seed_shift))
        self._check("reset", observations)
        return observations

    def _shift_of_smaller_seeds(self, word: int) -> int | None:
        """How many bits of each word to leave out, if it is the size of the seed that `reset` does not take."""

        def takes(shift: int) -> bool:
            try:
                self._pool[0].reset(seed=word >> shift)
            except (Exception, SystemExit):  # noqa: BLE001  why, was kept when it was raised the first time
                return False
            return True

        for shift in SEED_SHIFTS:
            # each asked twice, so that what fails now and then is not taken for a matter of seeds
            if shift > self._seed_shift and takes(shift) and takes(shift):
                return None if takes(self._seed_shift) or takes(self._seed_shift) else shift
        return None

    def step(self, actions: Shaped[np.ndarray, "N ..."], noise: Float[np.ndarray, "N U"] | None) -> Step:
        """Steps the instances one after the other."""
        N = len(self._live)
        observations = self._room()
        rewards = np.empty(N)
        terminated = np.zeros(N, dtype=bool)
        truncated = np.zeros(N, dtype=bool)
        # numpy integers, not Python ones: Discrete.contains takes a slower path for the latter
        each = list(actions)
        read = self._returned.step
        with self._failing("step"):
            for lane, environment in enumerate(self._live):
                observations[lane], rewards[lane], terminated[lane], truncated[lane] = read(
                    environment.step(each[lane])
                )
        if not np.isfinite(rewards).all():
            wrong = rewards[~np.isfinite(rewards)][0]
            raise EnvironmentFailure(f"{self.spec.id} gave a reward that is not finite in step {self._steps}: {wrong}")
        self._check("step", observations)
        self._steps += 1
        if self._steps >= self.facts.max_episode_steps:
            truncated[:] = True
        return Step(observations, rewards, terminated, truncated & ~terminated)

    @contextmanager
    def _failing(self, verb: str) -> Iterator[None]:
        """What goes wrong inside, told with the place where it did."""
        try:
            yield
        except UnclearReturn as error:
            raise EnvironmentFailure(f"{self.spec.id}, step {self._steps}: {error}") from error
        # code of another project may raise anything, and may even try to leave
        except (Exception, SystemExit) as error:
            advice = _without_seed(self._pool[0]) if verb == "reset" and isinstance(error, TypeError) else ""
            raise EnvironmentFailure(
                f"{self.spec.id} raised {type(error).__name__} in {verb} at step {self._steps}: "
                f"{str(error)[:300]}{advice}"
            ) from error

    def _check(self, verb: str, observations: np.ndarray) -> None:
        """What numpy takes without a word and a policy could not read."""
        if wrong := self._returned.unreadable(observations):
            raise EnvironmentFailure(f"{self.spec.id} gave {wrong}, in {verb} at step {self._steps}")

    def _room(self) -> np.ndarray:
        space = self.facts.observation_space
        return np.empty((len(self._live), *array_shape(space)), dtype=array_dtype(space))

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


def _without_seed(environment: Any) -> str:
    """What to say of an environment whose `reset` takes no seed."""
    try:
        parameters = inspect.signature(environment.unwrapped.reset).parameters.values()
    except (TypeError, ValueError):
        return ""
    if any(parameter.name == "seed" or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return ""
    return "; expected reset(*, seed=None, options=None), which begins an episode that the seed decides"
