"""The weight of every step in the estimate of the policy gradient.

    estimate = sum over rows of weight_row * grad log pi(a_row | s_row)

The weight collects credit, baseline, discount and mean in one pure function of (rewards, offsets, algorithm). It
accepts leading batch dimensions, so that enumeration needs no second version. Everything is float64 numpy: weights
are data, no gradient flows through them.

    rewards [*batch, B] ─► credit ─► minus baseline ─► times gamma^t ─► over the mean's count ─► weights [*batch, B]
"""

import numpy as np
from jaxtyping import Float, Int

from pgengine.errors import ShapeMismatch
from pgengine.spec import AlgorithmSpec, ConstantBaselineSpec, LeaveOneOutBaselineSpec

__all__ = ["leave_one_out", "reward_to_go", "step_weights", "total_return"]


class _Grid:
    """Where flat rows lie in a grid [T, K] of time steps and trajectories."""

    def __init__(self, offsets: np.ndarray, rows: int) -> None:
        if offsets[-1] != rows:
            raise ShapeMismatch(f"the last offset is {offsets[-1]}, there are {rows} rows")
        self.lengths = np.diff(offsets)
        self.K = len(self.lengths)
        self.episode = np.repeat(np.arange(self.K), self.lengths)
        self.time = np.arange(rows) - offsets[:-1][self.episode]
        self.T = int(self.lengths.max())

    def spread(self, values: np.ndarray) -> np.ndarray:
        """[*batch, B] to [*batch, T, K], zero after the end of an episode."""
        grid = np.zeros((*values.shape[:-1], self.T, self.K))
        grid[..., self.time, self.episode] = values
        return grid

    def collect(self, grid: np.ndarray) -> np.ndarray:
        """[*batch, T, K] to [*batch, B]."""
        rows: np.ndarray = grid[..., self.time, self.episode]
        return rows


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
        ShapeMismatch: if the last offset is not B.

    Source: Sun, Policy Gradient, "Further simplification on PG"; Lin, "Credit only future rewards".
    """
    grid = _Grid(offsets, rewards.shape[-1])
    return grid.collect(_accumulate(grid.spread(rewards), gamma))


def _accumulate(grid: np.ndarray, gamma: float) -> np.ndarray:
    for t in range(grid.shape[-2] - 2, -1, -1):
        grid[..., t, :] += gamma * grid[..., t + 1, :]
    return grid


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
        ShapeMismatch: if the last offset is not B.

    Source: Lin, r(tau); Log-derivative page, R(tau) = sum_t gamma^t r_t; Bereyhi, PG_v1.
    """
    grid = _Grid(offsets, rewards.shape[-1])
    return _accumulate(grid.spread(rewards), gamma)[..., 0, :][..., grid.episode]


def leave_one_out(
    values: Float[np.ndarray, "*batch B"], offsets: Int[np.ndarray, "K1"]
) -> Float[np.ndarray, "*batch B"]:
    """Mean of the other trajectories' values at the same time step, an ended one counting zero.

        b_t^i = 1 / (K - 1) * sum_{j != i} v_t^j

    It is independent of the own trajectory, so E[b * score] = 0 and the estimate stays exact. An ended trajectory's
    reward-to-go is zero, which is a value and not a gap: a mean over those alive alone would be exact, too, but
    noisier.

    Args:
        values: v_t; rows in episode order.
        offsets: Row at which each of the K >= 2 episodes begins, and B at the end.

    Raises:
        ShapeMismatch: if the last offset is not B, or there is but one episode.
    """
    grid = _Grid(offsets, values.shape[-1])
    if grid.K < 2:
        raise ShapeMismatch("leave-one-out needs at least two trajectories")
    spread = grid.spread(values)
    return grid.collect((spread.sum(axis=-1, keepdims=True) - spread) / (grid.K - 1))


def step_weights(
    rewards: Float[np.ndarray, "*batch B"], offsets: Int[np.ndarray, "K1"], algorithm: AlgorithmSpec
) -> Float[np.ndarray, "*batch B"]:
    """The weight of every step's score in the estimate of the gradient.

    Args:
        rewards: r_t; rows in episode order.
        offsets: Row at which each of the K episodes begins, and B at the end.
        algorithm: Resolved: credit, gamma, discount weight, mean and baseline.

    Raises:
        ShapeMismatch: if the last offset is not B, or the baseline needs more trajectories.

    Source: Lin, update after N trajectories; Sun, policy gradient algorithm; design of the labels in `pgengine.labels`.
    """
    grid = _Grid(offsets, rewards.shape[-1])
    if algorithm.credit == "total_return":
        weights = _total_return_weights(rewards, offsets, grid, algorithm)
    else:
        credit = reward_to_go(rewards, offsets, gamma=algorithm.gamma)
        weights = credit - _baseline(credit, offsets, algorithm)
    if algorithm.discount_weight == "gamma_power":
        weights = weights * algorithm.gamma**grid.time
    return weights / _count(grid, algorithm)


def _total_return_weights(
    rewards: np.ndarray, offsets: np.ndarray, grid: _Grid, algorithm: AlgorithmSpec
) -> np.ndarray:
    """Under total return a trajectory has one credit and one baseline, whatever its length."""
    returns = total_return(rewards, offsets, gamma=algorithm.gamma)[..., offsets[:-1]]
    one_step_each = np.arange(grid.K + 1)
    return (returns - _baseline(returns, one_step_each, algorithm))[..., grid.episode]


def _baseline(credit: np.ndarray, offsets: np.ndarray, algorithm: AlgorithmSpec) -> np.ndarray | float:
    if isinstance(algorithm.baseline, LeaveOneOutBaselineSpec):
        return leave_one_out(credit, offsets)
    if isinstance(algorithm.baseline, ConstantBaselineSpec):
        return algorithm.baseline.value
    return 0.0


def _count(grid: _Grid, algorithm: AlgorithmSpec) -> np.ndarray | float:
    if algorithm.mean_over == "trajectories":
        return float(grid.K)
    if algorithm.mean_over == "all_steps":
        return float(len(grid.time))
    return grid.K * grid.lengths[grid.episode].astype(np.float64)
