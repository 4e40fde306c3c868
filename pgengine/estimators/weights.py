"""The weight of every step, from all settings of an estimator."""

import numpy as np

from pgengine.errors import ShapeMismatch
from pgengine.estimators.batch_baselines import batch_mean, leave_one_out
from pgengine.estimators.ratios import Ratios, importance_ratios
from pgengine.estimators.returns import reward_to_go, total_return
from pgengine.estimators.rows import BatchRows, Grid, StepWeights
from pgengine.estimators.scales import deviation_of_others, significant, whitened
from pgengine.spec import (
    AlgorithmSpec,
    BatchMeanBaselineSpec,
    ConstantBaselineSpec,
    LeaveOneOutBaselineSpec,
    NoBaselineSpec,
)

__all__ = ["step_weights"]

SINGLE = 1e6  # how much more 32 bits round than 64, and than the share that counts as zero allows for


def step_weights(rows: BatchRows, algorithm: AlgorithmSpec) -> StepWeights:
    """The weight of every step's score, and of its entropy's gradient, in the estimate of the gradient.

        credit_t   = sum over k >= t of gamma^(k-t) * w_k * (r_k + gamma * c * H_{k+1})
        score_t    = gamma^t * (credit_t - w_t * b_t) / (count * deviation)
        entropy_t  = gamma^t * c * w_{t-1} / (count * deviation)

    with w the importance ratio up to a step (or that of the whole trajectory, or 1), c the coefficient of an entropy
    that is part of the objective, and H_{k+1} the entropy of the next step, which the action at k has a part in. Total
    return credits every step with credit_0.

    Args:
        rows: Rewards and, where the algorithm needs them, predictions, entropies and ratios.
        algorithm: Resolved. gamma of the credit is `algorithm.credit_gamma`.

    Returns:
        Everything in float64, data without gradient.

    Raises:
        ShapeMismatch: if the offsets do not cover the rows, something that the algorithm needs is missing, or its
            baseline needs more trajectories.

    Source: Lin, update after N trajectories; Sun, policy gradient algorithm, importance weighting; Bereyhi, PG_v1 and
    REINFORCE, which are printed for K = 1.
    """
    grid = Grid(rows.offsets, rows.rewards.shape[-1])
    ratios = _ratios(rows, grid, algorithm)
    # a ratio beyond every float times a reward of zero is not a number, and whoever makes the step sees it
    with np.errstate(invalid="ignore", over="ignore"):
        rewards, later = np.asarray(rows.rewards, dtype=np.float64), _later_entropy(rows, algorithm)
        if later is not None:
            rewards = rewards + later
        if ratios is not None:
            rewards = ratios.reward * rewards
        total = algorithm.credit == "total_return"
        returns = total_return if total else reward_to_go
        credit = returns(rewards, rows.offsets, gamma=algorithm.credit_gamma)
        baseline = _baseline(credit, rows, grid, algorithm)
        if ratios is not None:
            baseline = ratios.reward * baseline
        sizes = np.abs(credit)
        if algorithm.standardise != "none":  # a division by the deviation would blow rounding up
            sizes = returns(_sizes(rewards, later, ratios), rows.offsets, gamma=algorithm.credit_gamma)
        divisor, powers = _divisor(credit, sizes, rows.offsets, grid, algorithm), algorithm.credit_gamma**grid.time
        sizes = np.maximum(sizes, np.abs(baseline))
        score = significant(credit - baseline, sizes)
        if algorithm.standardise == "batch":
            score = whitened(score, sizes)
        if algorithm.discount_weight == "gamma_power":
            score = score * powers
        score = score / divisor
        entropy = _entropy(ratios, divisor, powers, rows, algorithm)
    effective = np.full(rows.rewards.shape[:-1], float(grid.K)) if ratios is None else ratios.effective_sample_size
    return StepWeights(credit, baseline, score, entropy, None if ratios is None else ratios.reward, effective)


def _ratios(rows: BatchRows, grid: Grid, algorithm: AlgorithmSpec) -> Ratios | None:
    if algorithm.importance.kind == "none":
        return None
    if rows.log_ratios is None:
        raise ShapeMismatch("importance weighting needs the log-probabilities under the policy that acted")
    return importance_ratios(np.asarray(rows.log_ratios, dtype=np.float64), grid, algorithm.importance)


def _later_entropy(rows: BatchRows, algorithm: AlgorithmSpec) -> np.ndarray | None:
    """Discounted entropy of the next step, where the objective pays for it."""
    if algorithm.entropy is None:
        return None
    if rows.entropies is None:
        raise ShapeMismatch("this algorithm pays for entropy and needs that of every step")
    if algorithm.entropy.as_ == "bonus":
        return None
    following = np.zeros(rows.rewards.shape)
    following[..., :-1] = rows.entropies[..., 1:]
    following[..., rows.offsets[1:] - 1] = 0.0  # nothing follows the last step of an episode
    later: np.ndarray = algorithm.credit_gamma * algorithm.entropy.coefficient * following
    return later


def _sizes(rewards: np.ndarray, later: np.ndarray | None, ratios: Ratios | None) -> np.ndarray:
    """What the rounding of each reward is in proportion to: its size, which counts more where 32 bits are behind it.

    Rewards that cancel leave rounding of their own size, and not of the size of their sum.
    """
    sizes = np.abs(rewards)
    rounded: np.ndarray = sizes if later is None else sizes + SINGLE * np.abs(later)
    return rounded if ratios is None else np.where(ratios.reward == 1.0, rounded, SINGLE * sizes)


def _baseline(credit: np.ndarray, rows: BatchRows, grid: Grid, algorithm: AlgorithmSpec) -> np.ndarray:
    """What is subtracted from the credit of each row, without the row's own ratio."""
    baseline = algorithm.baseline
    if isinstance(baseline, NoBaselineSpec):
        return np.zeros_like(credit)
    if isinstance(baseline, ConstantBaselineSpec):
        return np.full_like(credit, baseline.value)
    if not isinstance(baseline, LeaveOneOutBaselineSpec | BatchMeanBaselineSpec):
        if rows.predicted is None:
            raise ShapeMismatch(f"the baseline {baseline.kind} predicts something for every step")
        return np.asarray(rows.predicted, dtype=np.float64)
    # under total return a trajectory has one credit, which is compared with the others' whatever its length
    if algorithm.credit == "total_return" and baseline.over != "all_steps":
        one_step_each = np.arange(grid.K + 1)
        credit = credit[..., rows.offsets[:-1]]
        return _over_batch(credit, one_step_each, baseline)[..., grid.episode]
    return _over_batch(credit, rows.offsets, baseline)


def _over_batch(
    credit: np.ndarray, offsets: np.ndarray, baseline: LeaveOneOutBaselineSpec | BatchMeanBaselineSpec
) -> np.ndarray:
    if isinstance(baseline, LeaveOneOutBaselineSpec):
        return leave_one_out(credit, offsets, over=baseline.over)
    return batch_mean(credit, offsets, over=baseline.over)


def _divisor(
    credit: np.ndarray, sizes: np.ndarray, offsets: np.ndarray, grid: Grid, algorithm: AlgorithmSpec
) -> np.ndarray:
    """What the weight of each row is divided by, count * deviation: [*batch, B] or [B]."""
    count = _count(grid, algorithm)
    if algorithm.standardise != "leave_one_out":
        return count
    if grid.K < 3:
        raise ShapeMismatch("the deviation of the other trajectories needs at least three trajectories")
    begins = offsets[:-1]
    divisor: np.ndarray = count * deviation_of_others(credit[..., begins], sizes[..., begins])[..., grid.episode]
    return divisor


def _count(grid: Grid, algorithm: AlgorithmSpec) -> np.ndarray:
    if algorithm.mean_over == "trajectories":
        return np.full(len(grid.time), float(grid.K))
    if algorithm.mean_over == "all_steps":
        return np.full(len(grid.time), float(len(grid.time)))
    count: np.ndarray = grid.K * grid.lengths[grid.episode].astype(np.float64)
    return count


def _entropy(
    ratios: Ratios | None, divisor: np.ndarray, powers: np.ndarray, rows: BatchRows, algorithm: AlgorithmSpec
) -> np.ndarray | None:
    """Weight of grad H(pi(.|s_t)), which depends on the actions before t alone."""
    if algorithm.entropy is None:
        return None
    weights = algorithm.entropy.coefficient / divisor
    # the total return has its discount inside, the entropy's own gradient has not
    if algorithm.credit == "total_return" or algorithm.discount_weight == "gamma_power":
        weights = weights * powers
    if ratios is not None:
        weights = weights * ratios.state
    return np.broadcast_to(weights, rows.rewards.shape).copy()
