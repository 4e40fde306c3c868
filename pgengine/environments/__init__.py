"""Environments: one interface of episodes, which Gymnasium's environments, finite MDPs and linear systems implement."""

from pgengine.environments.episodes import EnvironmentFacts, EpisodeEnvironment, Step
from pgengine.environments.gymnasium import register_own_ids
from pgengine.environments.lqr import Lqr
from pgengine.environments.opening import describe, open_environment
from pgengine.environments.tables import read_table
from pgengine.environments.tabular import TabularMDP

__all__ = [
    "EnvironmentFacts",
    "EpisodeEnvironment",
    "Lqr",
    "Step",
    "TabularMDP",
    "describe",
    "open_environment",
    "read_table",
    "register_own_ids",
]
