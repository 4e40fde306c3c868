"""From the description of an environment to the environment."""

from pgengine.environments.episodes import EnvironmentFacts, EpisodeEnvironment
from pgengine.environments.gymnasium import GymnasiumEpisodes
from pgengine.environments.tabular import TabularMDP
from pgengine.spec import GymnasiumSpec, TabularSpec

__all__ = ["describe", "open_environment"]


def open_environment(spec: GymnasiumSpec | TabularSpec) -> EpisodeEnvironment:
    """The environment that a spec describes, ready to begin episodes.

    Raises:
        SpecError: with a pointer from the root of the spec.
    """
    return TabularMDP(spec) if isinstance(spec, TabularSpec) else GymnasiumEpisodes(spec)


def describe(environment: GymnasiumSpec | TabularSpec) -> EnvironmentFacts:
    """What is known of an environment before an episode is played: spaces, episode limit, reward threshold.

    Raises:
        SpecError: with a pointer from the root of the spec, if there is no such environment, an argument is
            refused, it has no episode limit, or a space is not supported.
    """
    opened = open_environment(environment)
    try:
        return opened.facts
    finally:
        opened.close()
