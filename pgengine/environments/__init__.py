"""Environments: one interface of episodes, which Gymnasium's environments, finite MDPs and linear systems implement."""

from pgengine.environments.episodes import EnvironmentFacts, EpisodeEnvironment, Step
from pgengine.environments.lqr import Lqr
from pgengine.environments.opening import describe, open_environment
from pgengine.environments.registry import near_ids, register_own_ids
from pgengine.environments.tables import read_table
from pgengine.environments.tabular import TabularMDP

__all__ = [
    "EnvironmentFacts",
    "EpisodeEnvironment",
    "Lqr",
    "Step",
    "TabularMDP",
    "describe",
    "near_ids",
    "open_environment",
    "read_table",
    "register_own_ids",
]
