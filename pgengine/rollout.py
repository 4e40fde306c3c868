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
        observations: [B, …] before each action; a policy with memory sees windows of them.
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

    def episodes(self, first: int, last: int) -> "Batch":
        """The trajectories first, …, last - 1 as a batch of their own; views, not copies."""
        rows, whole = slice(self.offsets[first], self.offsets[last]), slice(first, last)
        return Batch(
            self.observations[rows],
            self.samples[rows],
            self.actions[rows],
            self.log_probs[rows],
            self.rewards[rows],
            self.offsets[first : last + 1] - self.offsets[first],
            self.terminated[whole],
            self.truncated[whole],
            self.final_observations[whole],
        )


def rollout(
    policy: Policy,
    environment: EpisodeEnvironment,
    noise: Noise,
    episodes: int,
    *,
    first: int = 0,
    survival: float = 1.0,
    deterministic: bool = False,
) -> Batch:
    """Plays the episodes first, first + 1, …, first + episodes - 1 of an address.

    Args:
        policy: What acts.
        environment: Where.
        noise: Address of every random number; an episode depends on it and on its own number alone.
        episodes: How many.
        first: Number of the first one.
        survival: Probability that an episode goes on after a step, beside what the environment says; gamma where the
            discount is a termination.
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
    seen = policy.begin_windows(observations)
    time = 0
    while len(lanes):
        column = time % CHUNK
        if column == 0:
            action_noise = _action_noise(noise, time // CHUNK, last, None if deterministic else d)
            width = environment.uniforms
            step_noise = noise.uniforms("transition", time // CHUNK, last, width) if width else None
            end_noise = noise.uniform("survival", time // CHUNK, last) if survival < 1.0 else None
        outputs = policy.outputs(seen)
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
        died = step.terminated
        if end_noise is not None:
            died = died | (end_noise[lanes, column] >= survival)
        ended = died | step.truncated
        observations = step.observations
        if ended.any():
            at = lanes[ended] - first
            terminated[at], truncated[at] = died[ended], (step.truncated & ~died)[ended]
            final[at] = observations[ended]
            live = ~ended
            environment.keep(live)
            lanes, observations, seen = lanes[live], observations[live], seen[live]
        seen = policy.next_windows(seen, observations)
        time += 1
    lanes, *columns = (np.concatenate(column) for column in zip(*rows, strict=True))
    order = np.argsort(lanes, kind="stable")  # from order of time to order of episode
    observations, samples, actions, outputs, rewards = (column[order] for column in columns)
    if not np.isfinite(outputs).all():
        raise _diverged(noise)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        log_probs = d.log_prob(policy.parameters, outputs, samples)
    if not np.isfinite(log_probs).all():
        raise _diverged(noise)
    offsets = np.zeros(episodes + 1, dtype=np.int64)
    np.cumsum(np.bincount(lanes - first, minlength=episodes), out=offsets[1:])
    return Batch(observations, samples, actions, log_probs, rewards, offsets, terminated, truncated, final)


def _diverged(noise: Noise) -> DivergedError:
    return DivergedError(noise.update + 1, noise.seed, "an output of the policy")


def _action_noise(noise: Noise, chunk: int, episodes: int, distribution: Distribution | None) -> np.ndarray | None:
    if distribution is None:
        return None
    width = distribution.noise_width
    if distribution.noise_kind == "normal":
        return noise.normal("action", chunk, episodes, width or 1)
    if width is None:
        return noise.uniform("action", chunk, episodes)
    return noise.uniforms("action", chunk, episodes, width)
