"""Sums of rewards: from a step on, and of the whole episode."""

import numpy as np
from jaxtyping import Float, Int

from pgengine.estimators.rows import Grid

__all__ = ["reward_to_go", "total_return"]


def reward_to_go(
    rewards: Float[np.ndarray, "*batch B"], offsets: Int[np.ndarray, "K1"], *, gamma: float
) -> Float[np.ndarray, "*batch B"]:
    """Discounted sum of the rewards from each step to the end of its episode.

        G_t = r_t + gamma * G_{t+1}, and zero after the last step of an episode

    Actions cannot change rewards already received, so dropping them leaves the gradient unbiased and lowers its
    variance.

    Args:
        rewards: r_t in the environment's own unit, not normalised; rows in episode order.
        offsets: Row at which each of the K episodes begins, and B at the end.
        gamma: Discount per environment step, in [0, 1].

    Returns:
        G_t in units of reward.

    Raises:
        ShapeMismatch: if the offsets do not cover the rows.

    Source: Sun, Policy Gradient, "Further simplification on PG"; Lin, "Credit only future rewards".
    """
    grid = Grid(offsets, rewards.shape[-1])
    return grid.collect(_accumulate(grid.spread(rewards), gamma))


def total_return(
    rewards: Float[np.ndarray, "*batch B"], offsets: Int[np.ndarray, "K1"], *, gamma: float
) -> Float[np.ndarray, "*batch B"]:
    """Discounted return of the whole episode, at each of its steps.

        R = sum_t gamma^t r_t

    Args:
        rewards: r_t; rows in episode order.
        offsets: Row at which each of the K episodes begins, and B at the end.
        gamma: Discount per environment step, in [0, 1].

    Raises:
        ShapeMismatch: if the offsets do not cover the rows.

    Source: Lin, r(tau); Log-derivative page, R(tau) = sum_t gamma^t r_t; Bereyhi, PG_v1.
    """
    grid = Grid(offsets, rewards.shape[-1])
    return _accumulate(grid.spread(rewards), gamma)[..., 0, :][..., grid.episode]


def _accumulate(grid: np.ndarray, gamma: float) -> np.ndarray:
    for t in range(grid.shape[-2] - 2, -1, -1):
        grid[..., t, :] += gamma * grid[..., t + 1, :]
    return grid
