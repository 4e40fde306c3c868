"""Plays complete episodes with a policy and lays them out flat.

K episodes are fixed in advance and all of them are used. They begin together; lanes whose episode has ended are taken
out, never refilled, so no episode is favoured for being short. Acting needs numpy alone.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from pgengine.distributions import Distribution
from pgengine.environments import EpisodeEnvironment
from pgengine.errors import DivergedError
from pgengine.noise import CHUNK, Noise
from pgengine.policies import Policy

__all__ = ["Batch", "rollout"]


@dataclass(frozen=True)
class Batch:
    """K complete trajectories as flat rows in episode order.

    Attributes:
        observations: [B, …] before each action.
        samples: [B, …] raw draws of the policy.
        actions: [B, …] as the environment got them.
        log_probs: [B] of the samples under the policy that drew them.
        rewards: [B] float64, in the environment's own unit.
        offsets: [K + 1] row at which each episode begins, and B at the end.
        terminated: [K] the task ended.
        truncated: [K] the limit cut the episode.
        final_observations: [K, …] after the last action.
    """

    observations: Shaped[np.ndarray, "B ..."]
    samples: Shaped[np.ndarray, "B ..."]
    actions: Shaped[np.ndarray, "B ..."]
    log_probs: Float[np.ndarray, "B"]
    rewards: Float[np.ndarray, "B"]
    offsets: Int[np.ndarray, "K1"]
    terminated: Bool[np.ndarray, "K"]
    truncated: Bool[np.ndarray, "K"]
    final_observations: Shaped[np.ndarray, "K ..."]

    @property
    def returns(self) -> Float[np.ndarray, "K"]:
        """Undiscounted return of each episode."""
        return np.add.reduceat(self.rewards, self.offsets[:-1])

    @property
    def lengths(self) -> Int[np.ndarray, "K"]:
        """Environment steps of each episode."""
        return np.diff(self.offsets)


def rollout(
    policy: Policy,
    environment: EpisodeEnvironment,
    noise: Noise,
    episodes: int,
    *,
    first: int = 0,
    deterministic: bool = False,
) -> Batch:
    """Plays the episodes first, first + 1, …, first + episodes - 1 of an address.

    Args:
        policy: What acts.
        environment: Where.
        noise: Address of every random number; an episode depends on it and on its own number alone.
        episodes: How many.
        first: Number of the first one.
        deterministic: The mode instead of draws.

    Raises:
        EnvironmentFailure: if the environment raised in the middle.
        DivergedError: if the policy gives outputs or samples that are not finite.
    """
    d = policy.distribution
    last = first + episodes
    lanes = np.arange(first, last)  # episode of each live lane
    rows: list[tuple[np.ndarray, ...]] = []
    terminated, truncated = np.zeros((2, episodes), dtype=bool)
    observations = environment.begin(noise.words("begin", last)[first:])
    final = np.empty_like(observations)
    time = 0
    while len(lanes):
        column = time % CHUNK
        if column == 0:
            action_noise = _action_noise(noise, time // CHUNK, last, None if deterministic else d)
            step_noise = noise.uniform("transition", time // CHUNK, last) if environment.takes_noise else None
        outputs = policy.outputs(observations)
        samples = (
            d.mode(outputs)
            if action_noise is None
            else d.sample(policy.parameters, outputs, action_noise[lanes, column])
        )
        if samples.dtype.kind == "f" and not np.isfinite(samples).all():
            raise _diverged(noise)
        actions = d.action(samples)
        step = environment.step(actions, None if step_noise is None else step_noise[lanes, column])
        rows.append((lanes, observations, samples, actions, outputs, step.rewards))
        ended = step.terminated | step.truncated
        observations = step.observations
        if ended.any():
            at = lanes[ended] - first
            terminated[at], truncated[at] = step.terminated[ended], step.truncated[ended]
            final[at] = observations[ended]
            live = ~ended
            environment.keep(live)
            lanes, observations = lanes[live], observations[live]
        time += 1
    lanes, *columns = (np.concatenate(column) for column in zip(*rows, strict=True))
    order = np.argsort(lanes, kind="stable")  # from order of time to order of episode
    observations, samples, actions, outputs, rewards = (column[order] for column in columns)
    if not np.isfinite(outputs).all():
        raise _diverged(noise)
    log_probs = d.log_prob(policy.parameters, outputs, samples)
    offsets = np.zeros(episodes + 1, dtype=np.int64)
    np.cumsum(np.bincount(lanes - first, minlength=episodes), out=offsets[1:])
    return Batch(observations, samples, actions, log_probs, rewards, offsets, terminated, truncated, final)


def _diverged(noise: Noise) -> DivergedError:
    return DivergedError(noise.update + 1, noise.seed, "an output of the policy")


def _action_noise(noise: Noise, chunk: int, episodes: int, distribution: Distribution | None) -> np.ndarray | None:
    if distribution is None:
        return None
    if distribution.noise_width is None:
        return noise.uniform("action", chunk, episodes)
    return noise.normal("action", chunk, episodes, distribution.noise_width)
