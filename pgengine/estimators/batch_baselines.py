"""Baselines that are means over the batch itself: over the other trajectories, or with the own one among them.

The mean over the others knows nothing of the own actions, so E[baseline * score] = 0 and the estimate stays exact. A
mean that has the own trajectory in it scales the estimate at best, and bends it at worst; `pgengine.label` says which.
"""

from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from pgengine.errors import ShapeMismatch
from pgengine.estimators.rows import Grid

__all__ = ["batch_mean", "leave_one_out"]

Over = Literal["time_step", "alive", "shrunk", "total", "all_steps"]


def leave_one_out(
    values: Float[np.ndarray, "*batch B"], offsets: Int[np.ndarray, "K1"], *, over: Over = "time_step"
) -> Float[np.ndarray, "*batch B"]:
    """Mean of the other trajectories' values, for each row.

        time_step:  b_t^i = 1 / (K - 1) * sum_{j != i} v_t^j, an ended trajectory counting zero
        alive:      the same sum over the number of the others that are alive at t; zero where none is
        shrunk:     the same sum over that number plus 2
        total:      1 / (K - 1) * sum_{j != i} v_0^j
        all_steps:  sum_{j != i} sum_t v_t^j over the number of the others' steps

    An ended trajectory's reward-to-go is zero, which is a value and not a gap. All of them are functions of the other
    trajectories alone.

    Args:
        values: v_t; rows in episode order.
        offsets: Row at which each of the K >= 2 episodes begins, and B at the end.
        over: Mean of what.

    Raises:
        ShapeMismatch: if the offsets do not cover the rows, or there is but one episode.

    Source: design of the labels; Sutton and Barto, Reinforcement Learning, section 13.4, for baselines that do not
    depend on the action.
    """
    grid = Grid(offsets, values.shape[-1])
    if grid.K < 2:
        raise ShapeMismatch("leave-one-out needs at least two trajectories")
    if over == "total":
        means: np.ndarray = _others(values[..., offsets[:-1]]) / (grid.K - 1)
        return means[..., grid.episode]
    if over == "all_steps":
        sums = np.add.reduceat(values, offsets[:-1], axis=-1)
        others_steps = (offsets[-1] - grid.lengths).astype(np.float64)
        means = _others(sums) / others_steps
        return means[..., grid.episode]
    others = _others(grid.spread(values))
    if over == "time_step":
        return grid.collect(others / (grid.K - 1))
    alive = _others(grid.alive)
    return grid.collect(others / (alive + 2.0 if over == "shrunk" else np.maximum(alive, 1.0)))


def batch_mean(
    values: Float[np.ndarray, "*batch B"],
    offsets: Int[np.ndarray, "K1"],
    *,
    over: Literal["time_step", "alive", "total", "all_steps"] = "total",
) -> Float[np.ndarray, "*batch B"]:
    """Mean of the values of all trajectories of the batch, the own one included, for each row.

        time_step:  1 / K * sum_j v_t^j, an ended trajectory counting zero
        alive:      the same sum over the number of trajectories that are alive at t
        total:      1 / K * sum_j v_0^j
        all_steps:  the mean over all steps of the batch

    Args:
        values: v_t; rows in episode order.
        offsets: Row at which each of the K episodes begins, and B at the end.
        over: Mean of what.

    Raises:
        ShapeMismatch: if the offsets do not cover the rows.
    """
    grid = Grid(offsets, values.shape[-1])
    if over == "total":
        return _repeated(values[..., offsets[:-1]].mean(axis=-1, keepdims=True), grid)
    if over == "all_steps":
        return _repeated(values.mean(axis=-1, keepdims=True), grid)
    sums = grid.spread(values).sum(axis=-1)
    means: np.ndarray = sums / (grid.K if over == "time_step" else grid.alive.sum(axis=-1))
    return means[..., grid.time]


def _others(values: np.ndarray) -> np.ndarray:
    others: np.ndarray = values.sum(axis=-1, keepdims=True) - values
    return others


def _repeated(value: np.ndarray, grid: Grid) -> np.ndarray:
    return np.repeat(value, len(grid.time), axis=-1)
