"""From the description of an environment to the environment."""

from pgengine.environments.episodes import EnvironmentFacts, EpisodeEnvironment
from pgengine.environments.gymnasium import GymnasiumEpisodes
from pgengine.environments.lqr import Lqr
from pgengine.environments.repeating import is_repeatable
from pgengine.environments.tables import published_table
from pgengine.environments.tabular import TabularMDP
from pgengine.spec import EnvironmentSpec, GymnasiumSpec, LqrSpec, TabularSpec

__all__ = ["describe", "open_environment"]


def open_environment(spec: EnvironmentSpec) -> EpisodeEnvironment:
    """The environment that a spec describes, ready to begin episodes.

    A registered environment that publishes its own transition table is opened as the finite MDP that it is.

    Raises:
        SpecError: with a pointer from the root of the spec.
    """
    if isinstance(spec, TabularSpec):
        return TabularMDP(spec)
    if isinstance(spec, LqrSpec):
        return Lqr(spec)
    return _open_registered(spec)


def _open_registered(spec: GymnasiumSpec) -> EpisodeEnvironment:
    episodes = GymnasiumEpisodes(spec)
    table = published_table(episodes)
    if table is None:
        return episodes
    episodes.close()
    return TabularMDP(
        table,
        limit_from="id" if spec.max_episode_steps is None else "declared",
        reward_threshold=episodes.facts.reward_threshold,
    )


def describe(environment: EnvironmentSpec) -> EnvironmentFacts:
    """What is known of an environment before it is learned in: spaces, episode limit, reward threshold.

    A registered environment that is no table is played for a few steps, to see whether the same environment and
    another one that is made from the same spec give the same a second time.

    Raises:
        SpecError: with a pointer from the root of the spec, if there is no such environment, an argument is
            refused, it has no episode limit, or a space is not supported.
    """
    opened = open_environment(environment)
    try:
        if not isinstance(opened, GymnasiumEpisodes) or is_repeatable(opened, lambda: GymnasiumEpisodes(opened.spec)):
            return opened.facts
        return opened.facts.model_copy(update={"repeatable": False})
    finally:
        opened.close()
