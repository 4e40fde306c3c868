"""What an update tells of its gradient: signal, noise, saturation, and the exact figures where they are known.

The squared norm of an estimate is too large by the trace of its variance, so it is no estimate of the squared norm of
the gradient. The product of two independent estimates is: the trajectories are parted into groups, each group gives an
estimate of its own, and the products of all pairs are averaged.

    |grad J|^2  ~  mean over a != b of g_a . g_b            unbiased wherever each g_a is
    noise       ~  sum_a |g_a - mean g|^2 / (M (M - 1))     trace of the variance of the mean of the groups

Nothing here changes a bit of the training.

Source: Sun, Policy Gradient, SGD reaches stationary points (what can be seen of it by sampling); Log-derivative page,
high variance in the gradient estimate.
"""

import math

import numpy as np
import torch

from pgengine.distributions import DiagonalGaussian
from pgengine.environments import EpisodeEnvironment
from pgengine.errors import SpecError
from pgengine.estimation import Estimator, gradients
from pgengine.exact import exact_gradient, exact_return
from pgengine.exactness import LARGEST_EXACT_COST, exact_absence
from pgengine.intervals import CONFIDENCE, student_quantile
from pgengine.labels import own_share
from pgengine.policies import Policy
from pgengine.rollout import Batch
from pgengine.spec import AlgorithmSpec

__all__ = ["exact_figures", "gradient_figures", "return_figures", "saturated_fraction"]

GROUPS = 4  # more groups tell more and cost more passes
RELATIVE_ZERO = 1e-12  # share of the groups' squared norms below which their spread is rounding of 32 bits


def gradient_figures(
    estimator: Estimator, policy: Policy, tensors: dict[str, torch.Tensor], batch: Batch
) -> dict[str, float]:
    """Squared norm of the gradient, noise of the estimate, and their ratio; nothing from too few trajectories.

    Args:
        estimator: Weighs each group as if it were a batch of its own.
        policy: At whose parameters.
        tensors: Its parameters, as leaves.
        batch: Independent trajectories.
    """
    K = len(batch.lengths)
    M = min(GROUPS, K // _smallest_group(estimator.algorithm))
    if M < 2:
        return {}
    bounds = np.linspace(0, K, M + 1).round().astype(int)
    flat = []
    for first, last in zip(bounds[:-1], bounds[1:], strict=True):
        group = batch.episodes(int(first), int(last))
        sums, _ = gradients(policy, tensors, group, estimator.weigh(policy, group).weights)
        flat.append(_left(estimator.algorithm, int(last - first)) * torch.cat([p.reshape(-1) for p in sums]).double())
    each = torch.stack(flat)
    total = each.sum(dim=0)
    squares, square = float((each * each).sum()), float(total @ total)
    signal = (square - squares) / (M * (M - 1))
    spread = squares - square / M
    # groups that are equal but for rounding have no noise that a signal could be compared with
    noise = spread / (M * (M - 1)) if spread > RELATIVE_ZERO * squares else 0.0
    figures = {"gradient_squared_norm": signal, "gradient_noise": noise}
    if noise > 0:
        figures["signal_to_noise"] = signal / noise
    return figures


def _smallest_group(algorithm: AlgorithmSpec) -> int:
    """Trajectories without which an estimate would be nothing, or another one."""
    if algorithm.standardise == "leave_one_out":
        return 3
    compares = own_share(algorithm) > 0.0 or algorithm.baseline.kind == "leave_one_out"
    return 2 if compares or algorithm.standardise == "batch" or algorithm.importance.self_normalise else 1


def _left(algorithm: AlgorithmSpec, k: int) -> float:
    """What a baseline with the own trajectory in it leaves of the gradient in the batch, over what in k of them."""
    smaller = algorithm.model_copy(update={"trajectories": k})
    return (1.0 - own_share(algorithm)) / (1.0 - own_share(smaller))


def exact_figures(
    environment: EpisodeEnvironment, policy: Policy, algorithm: AlgorithmSpec, *, most: int = LARGEST_EXACT_COST
) -> dict[str, float]:
    """Exact J and norm of its gradient, on finite MDPs and LQR; nothing where `exact_absence` says why.

    Args:
        environment: Where.
        policy: At whose parameters.
        algorithm: Whose objective.
        most: Multiply-adds that may be spent.
    """
    if exact_absence(environment.facts, policy.spec, most=most) is not None:
        return {}
    coefficient = algorithm.entropy_coefficient
    try:
        gradient = exact_gradient(policy, environment, gamma=algorithm.gamma, entropy=coefficient)
        J = exact_return(policy, environment, gamma=algorithm.gamma, entropy=coefficient)
    except SpecError:  # a policy for which no exact answer is known
        return {}
    return {"exact_return": float(J), "exact_gradient_norm": float(torch.linalg.vector_norm(torch.as_tensor(gradient)))}


def saturated_fraction(policy: Policy, batch: Batch) -> float | None:
    """Share of the numbers of the actions that lie at a bound of their box; None without bounds."""
    d = policy.distribution
    saturated = d.saturated(batch.samples) if isinstance(d, DiagonalGaussian) else None
    return None if saturated is None else float(saturated.mean())


def return_figures(returns: np.ndarray) -> dict[str, float]:
    """Mean and deviation of undiscounted returns [K]; from two on the 95% interval (Student's t) of their mean."""
    n = len(returns)
    with np.errstate(over="ignore", invalid="ignore"):  # whoever makes the step finds what is not finite
        mean, deviation = float(returns.mean()), float(returns.std())
        figures = {"mean_return": mean, "return_deviation": deviation}
        if n > 1:
            half = student_quantile(0.5 + CONFIDENCE / 2, n - 1) * deviation / math.sqrt(n - 1)
            figures |= {"return_low": mean - half, "return_high": mean + half}
    return figures
