"""Importance ratios: what a trajectory of rho counts for the policy pi.

    w_{0:t} = product over k <= t of pi(a_k|s_k) / rho(a_k|s_k)

The dynamics are the same for both and cancel. Products are sums of logarithms in float64. E_rho[w_{0:t}] = 1, for every
t and for whole trajectories.

Source: Sun, Policy Gradient, computing the gradient using importance weighting.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from pgengine.estimators.rows import Grid
from pgengine.spec import ImportanceSpec

__all__ = ["Ratios", "importance_ratios"]


@dataclass(frozen=True)
class Ratios:
    """Importance ratios of every row.

    Attributes:
        reward: [*batch, B] of the reward and of the baseline at step t: the whole trajectory's, or w_{0:t}.
        state: [*batch, B] of what depends on the state s_t alone: the whole trajectory's, or w_{0:t-1}.
        effective_sample_size: [*batch] (sum w)^2 / sum w^2 over whole trajectories, before cut or normalised.
    """

    reward: Float[np.ndarray, "*batch B"]
    state: Float[np.ndarray, "*batch B"]
    effective_sample_size: Float[np.ndarray, "*batch"]


def importance_ratios(log_ratios: Float[np.ndarray, "*batch B"], grid: Grid, importance: ImportanceSpec) -> Ratios:
    """The ratios of every row, cut and normalised as the settings say.

    Ratios are cut first, then divided by their mean over the batch; with one ratio for each time step, an ended
    trajectory stays in that mean with its last one. A ratio beyond every float is infinite, and the caller finds an
    estimate that is not finite.

    Args:
        log_ratios: log pi(a_t|s_t) - log rho(a_t|s_t); rows in episode order.
        grid: Where the rows lie.
        importance: kind (not none), clip and self_normalise.
    """
    sums = np.cumsum(grid.spread(log_ratios), axis=-2)  # [*batch, T, K], constant after the end of an episode
    whole = sums[..., -1, :]
    sample_size = _effective_sample_size(whole)
    if importance.kind == "trajectory":
        of_trajectory = _exponential(whole, importance)[..., grid.episode]
        return Ratios(of_trajectory, of_trajectory, sample_size)
    prefix = _exponential(sums, importance)
    before = np.concatenate([np.ones_like(prefix[..., :1, :]), prefix[..., :-1, :]], axis=-2)
    return Ratios(grid.collect(prefix), grid.collect(before), sample_size)


def _exponential(logarithms: np.ndarray, importance: ImportanceSpec) -> np.ndarray:
    """Ratios from their logarithms [..., K], cut and normalised over the last axis."""
    if importance.clip is not None:
        logarithms = np.minimum(logarithms, np.log(importance.clip))
    if importance.self_normalise:
        shifted = np.exp(logarithms - _largest(logarithms))
        mean = shifted.mean(axis=-1, keepdims=True)
        normalised: np.ndarray = shifted / np.where(mean > 0.0, mean, 1.0)
        return normalised
    with np.errstate(over="ignore"):
        ratios: np.ndarray = np.exp(logarithms)
    return ratios


def _effective_sample_size(logarithms: np.ndarray) -> np.ndarray:
    shifted = np.exp(logarithms - _largest(logarithms))
    squares = np.square(shifted).sum(axis=-1)
    return np.asarray(np.square(shifted.sum(axis=-1)) / np.where(squares > 0.0, squares, 1.0))


def _largest(logarithms: np.ndarray) -> np.ndarray:
    """The largest logarithm, or 0 where all ratios are zero."""
    largest = logarithms.max(axis=-1, keepdims=True)
    return np.where(np.isneginf(largest), 0.0, largest)
