"""The rows from which weights are computed, the weights, and where rows lie in time."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from pgengine.errors import ShapeMismatch

__all__ = ["BatchRows", "Grid", "StepWeights"]


@dataclass(frozen=True)
class BatchRows:
    """What the weights of a batch are computed from: flat rows in episode order, with any leading dimensions.

    Attributes:
        rewards: [*batch, B] r_t in the environment's own unit.
        offsets: [K + 1] row at which each of the K episodes begins, and B at the end.
        predicted: [*batch, B] the baseline of each row in units of credit, where the baseline has a memory
            (moving average, values); None for the others.
        entropies: [*batch, B] entropy of pi(.|s_t) in nats, where entropy is paid for.
        log_ratios: [*batch, B] log pi(a_t|s_t) - log rho(a_t|s_t), where trajectories of rho are weighted.
    """

    rewards: Float[np.ndarray, "*batch B"]
    offsets: Int[np.ndarray, "K1"]
    predicted: Float[np.ndarray, "*batch B"] | None = None
    entropies: Float[np.ndarray, "*batch B"] | None = None
    log_ratios: Float[np.ndarray, "*batch B"] | None = None


@dataclass(frozen=True)
class StepWeights:
    """The weight of every step in the estimate of the gradient.

        estimate = sum over rows of score * grad log pi(a_t|s_t) + entropy * grad H(pi(.|s_t))

    Attributes:
        credit: [*batch, B] what the action is credited with, its ratio included, in units of return.
        baseline: [*batch, B] what is subtracted from it, its ratio included.
        score: [*batch, B] weight of the score: (credit - baseline), standardised, discounted and averaged.
        entropy: [*batch, B] weight of the entropy's gradient, everything included; None without entropy.
        ratio: [*batch, B] importance ratio that is in credit and baseline of the row; None without importance.
        effective_sample_size: [*batch] (sum w)^2 / sum w^2 over the trajectories' whole ratios w, before they are cut
            or normalised, in trajectories; K without importance.
    """

    credit: Float[np.ndarray, "*batch B"]
    baseline: Float[np.ndarray, "*batch B"]
    score: Float[np.ndarray, "*batch B"]
    entropy: Float[np.ndarray, "*batch B"] | None
    ratio: Float[np.ndarray, "*batch B"] | None
    effective_sample_size: Float[np.ndarray, "*batch"]


class Grid:
    """Where flat rows lie in a grid [T, K] of time steps and trajectories.

    Attributes:
        lengths: [K] steps of each trajectory.
        K: Trajectories.
        T: Steps of the longest one.
        episode: [B] trajectory of each row.
        time: [B] step of each row.
    """

    def __init__(self, offsets: Int[np.ndarray, "K1"], rows: int) -> None:
        """Reads the offsets.

        Raises:
            ShapeMismatch: if they do not cover the rows with episodes of at least one step.
        """
        if offsets[-1] != rows:
            raise ShapeMismatch(f"the last offset is {offsets[-1]}, there are {rows} rows")
        self.lengths = np.diff(offsets)
        self.K = len(self.lengths)
        if offsets[0] != 0 or self.K == 0 or self.lengths.min() < 1:
            raise ShapeMismatch("offsets begin at 0, and every episode has a step")
        self.episode = np.repeat(np.arange(self.K), self.lengths)
        self.time = np.arange(rows) - offsets[:-1][self.episode]
        self.T = int(self.lengths.max())

    @property
    def alive(self) -> Float[np.ndarray, "T K"]:
        """1 where a trajectory takes a step, 0 after its end."""
        alive: np.ndarray = (np.arange(self.T)[:, None] < self.lengths).astype(np.float64)
        return alive

    def spread(self, values: Float[np.ndarray, "*batch B"]) -> Float[np.ndarray, "*batch T K"]:
        """Rows to the grid, zero after the end of an episode."""
        grid = np.zeros((*values.shape[:-1], self.T, self.K))
        grid[..., self.time, self.episode] = values
        return grid

    def collect(self, grid: Float[np.ndarray, "*batch T K"]) -> Float[np.ndarray, "*batch B"]:
        """The grid to rows."""
        rows: np.ndarray = grid[..., self.time, self.episode]
        return rows
