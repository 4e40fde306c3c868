"""The interface of all environments: episodes, not steps.

K episodes begin together, live lanes are stepped, ended lanes are taken out by `keep`. Nothing is reset inside a step,
no lane is stepped after its end, and no environment draws a random number of its own: noise comes in.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Shaped, UInt64

from pgengine.intervals import ReturnRange
from pgengine.spaces import SpaceSpec
from pgengine.spec import Spec

__all__ = ["EnvironmentFacts", "EpisodeEnvironment", "Step"]


class EnvironmentFacts(Spec):
    """What is known of an environment before an episode is played; kept with it."""

    observation_space: SpaceSpec
    """What an observation looks like."""
    action_space: SpaceSpec
    """What an action looks like."""
    max_episode_steps: int
    """Episode limit in environment steps, part of the objective. Where `limit_from` is none it is no part of it: only
    the most that is played, and an episode that has not ended by then fails."""
    limit_from: Literal["id", "declared", "horizon", "none"]
    """Who set the limit: the registered id, the request, the horizon of a finite MDP, or nobody: episodes then end
    by themselves and are never cut."""
    fixed_steps: int | None = None
    """Steps that every episode takes, whoever acts, if they are all equally long; null if they vary or may vary."""
    limit_cuts: bool = True
    """Whether the limit may cut an episode whose task would have gone on."""
    ends_for_certain: bool = True
    """Whether every episode ends with probability 1 without a limit, whoever acts, or has one."""
    reward_threshold: float | None = None
    """Mean return at which the registered id counts as solved."""
    return_range: ReturnRange | None = None
    """Between which numbers every return lies, whoever acts; null where they are not known, or there are none."""
    cut_return_range: ReturnRange | None = None
    """The same of episodes that may also end after any step, as they do where the discount is a termination."""
    exact: Literal["finite_mdp", "lqr"] | None = None
    """What exact answers are known by, if they are."""
    repeatable: bool = True
    """False if the same episodes, begun with the same seeds and played with the same actions, were seen to differ:
    such an environment draws from a generator that its seed does not set, or keeps something from earlier episodes."""
    states: int | None = None
    """States of a finite MDP, seen or not; null for others."""
    state_names: list[str] | None = None
    """What people call the observations of a finite MDP."""
    action_names: list[str] | None = None
    """What people call the actions."""

    @property
    def episode_length(self) -> Literal["fixed", "varying"]:
        """Whether all episodes are known to take the same number of steps."""
        return "varying" if self.fixed_steps is None else "fixed"


@dataclass(frozen=True)
class Step:
    """What a step of N live lanes gives.

    Attributes:
        observations: [N, …] after the step, the final ones of lanes that ended included.
        rewards: [N], in the environment's own unit.
        terminated: [N], the task ended: nothing would follow.
        truncated: [N], the limit cut the episode where the task would have gone on; never together with `terminated`.
    """

    observations: Shaped[np.ndarray, "N ..."]
    rewards: Float[np.ndarray, "N"]
    terminated: Bool[np.ndarray, "N"]
    truncated: Bool[np.ndarray, "N"]


@runtime_checkable
class EpisodeEnvironment(Protocol):
    """Plays K independent episodes side by side."""

    @property
    def facts(self) -> EnvironmentFacts:
        """What is known before an episode is played."""
        ...

    @property
    def uniforms(self) -> int:
        """How many uniform numbers each step of a lane uses; 0: none are made."""
        ...

    def begin(self, noise: UInt64[np.ndarray, "K"]) -> Shaped[np.ndarray, "K ..."]:
        """Begins one episode for each word of noise, forgetting the earlier ones; returns the first observations."""
        ...

    def step(self, actions: Shaped[np.ndarray, "N ..."], noise: Float[np.ndarray, "N U"] | None) -> Step:
        """Steps every live lane once, at `uniforms` numbers in [0, 1) for each.

        Raises:
            EnvironmentFailure: if the environment raised or broke its contract.
        """
        ...

    def keep(self, mask: Bool[np.ndarray, "N"]) -> None:
        """Goes on with the lanes of the mask alone, in their order."""
        ...

    def close(self) -> None:
        """Gives back what the environment holds."""
        ...
