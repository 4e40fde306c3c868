"""Environments: one interface of episodes, which Gymnasium's environments and finite MDPs implement."""

from pgengine.environments.episodes import EnvironmentFacts, EpisodeEnvironment, Step
from pgengine.environments.opening import describe, open_environment
from pgengine.environments.tabular import TabularMDP

__all__ = ["EnvironmentFacts", "EpisodeEnvironment", "Step", "TabularMDP", "describe", "open_environment"]
