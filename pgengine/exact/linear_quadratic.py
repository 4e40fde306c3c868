"""J, gradients and optima for the linear system with quadratic costs: the exact reference of Gaussian policies.

A policy u ~ N(theta' [x, 1], diag(sigma^2)) keeps the state's first two moments in closed form, so J is a finite sum:

    F = theta[:n]', f = theta[n]            u = F x + f + sigma * noise
    M = A + B F                             m' = M m + B f,   S' = M S M' + B diag(sigma^2) B' + diag(noise^2)
    J = -sum over t of gamma^t E[x' Q x + u' R u],   E[x x'] = S + m m'

The theorem's analogue takes the other direction, from values that are quadratic in the state:

    v_t(x) = -(x' P_t x + 2 p_t' x + c_t)
    grad over the mean   = sum over t of gamma^t E[grad over u of q_t(x, u) at the mean, times [x, 1]]
    grad over log sigma  = sum over t of gamma^t sigma^2 times the second derivative of q_t in u

because a Gaussian integral of grad pi times a quadratic q is the derivative of q at the mean. The policy sees the
state rounded to 32 bits; that moves the answers by about 1e-7 of their size.

Source: Sun, Policy Gradient, LQR as the case in which the optimum is known; Bereyhi, chapter 5, Gaussian policy,
sigma fixed or learned.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64

from pgengine.environments.lqr import Lqr
from pgengine.errors import SpecError
from pgengine.exact.ascent import climb
from pgengine.exact.tables import flat_gradient, parameters_in_double
from pgengine.exactness import check_linear_gaussian
from pgengine.policies import Policy
from pgengine.spec import GaussianSpec

__all__ = [
    "BestLinear",
    "LinearQuadraticValues",
    "OptimalControl",
    "StationaryControl",
    "best_linear",
    "linear_gaussian",
    "linear_gradient",
    "linear_return",
    "linear_values",
    "lqr_return",
    "optimal_control",
    "stationary_control",
]

DOUBLINGS = 60  # of the steps of the Riccati recursion: 2^60 of them are for ever
HALF_LOG_2_PI_E = 0.5 * math.log(2.0 * math.pi * math.e)


def linear_gaussian(
    policy: Policy, parameters: dict[str, torch.Tensor]
) -> tuple[Float64[torch.Tensor, "n1 m"], Float64[torch.Tensor, "m"]]:
    """Theta [n + 1, m], the constant last, and log sigma [m] of a policy that is linear and Gaussian.

    Args:
        policy: Which functions.
        parameters: Its parameters, float64.

    Raises:
        SpecError: if it is another policy.
    """
    check_linear_gaussian(policy.spec)
    distribution = policy.spec.distribution
    assert isinstance(distribution, GaussianSpec), "it was checked"
    theta = parameters["theta"]
    if distribution.sigma == "learned":
        return theta, parameters["log_sigma"]
    fixed = float(np.float32(math.log(distribution.initial_sigma)))
    return theta, torch.full((theta.shape[1],), fixed, dtype=torch.float64)


# --- J by moments -----------------------------------------------------------------------------------------------------


def lqr_return(
    lqr: Lqr,
    theta: Float64[torch.Tensor, "n1 m"],
    log_sigma: Float64[torch.Tensor, "m"],
    *,
    gamma: float,
    entropy: float = 0.0,
) -> Float64[torch.Tensor, ""]:
    """J as a differentiable function of a linear Gaussian policy, by propagating the moments of the state.

    Args:
        lqr: Where.
        theta: [n + 1, m], the constant last.
        log_sigma: [m] logarithm of the standard deviations; minus infinity for a policy without noise.
        gamma: Discount per environment step, in [0, 1].
        entropy: Units of reward for each nat of the Gaussian's entropy.

    Returns:
        J; minus infinity or NaN where a system that is not held has grown beyond 64 bits.

    Source: Sun, J = E sum_{h<H} r.
    """
    A, B, Q, R = (torch.as_tensor(matrix) for matrix in (lqr.A, lqr.B, lqr.Q, lqr.R))
    n = len(A)
    F, f = theta[:n].T, theta[n]
    actions = torch.diag(torch.exp(2.0 * log_sigma))
    M, drift = A + B @ F, B @ f
    noise = B @ actions @ B.T + torch.as_tensor(np.diag(lqr.noise_deviation**2))
    mean = torch.as_tensor(lqr.initial_mean)
    covariance = torch.as_tensor(np.diag(lqr.initial_deviation**2))
    J = torch.zeros((), dtype=torch.float64)
    per_step = -(R * actions).sum()
    if entropy:
        per_step = per_step + entropy * (log_sigma + HALF_LOG_2_PI_E).sum()
    for t in range(lqr.horizon):
        u = F @ mean + f
        state_cost = mean @ Q @ mean + (Q * covariance).sum()
        action_cost = u @ R @ u + (R * (F @ covariance @ F.T)).sum()
        J = J + gamma**t * (per_step - state_cost - action_cost)
        mean, covariance = M @ mean + drift, M @ covariance @ M.T + noise
    return J


# --- values and the theorem -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearQuadraticValues:
    """Values of a linear Gaussian policy: v_t(x) = -(x' P_t x + 2 p_t' x + c_t), zero at t = H.

    Attributes:
        J: Expected return.
        P: [H + 1, n, n] quadratic part.
        p: [H + 1, n] linear part.
        c: [H + 1] constant part.
        mean: [H, n] mean of the state at each time.
        covariance: [H, n, n] its covariance.
        theta_gradient: [n + 1, m] gradient of J.
        log_sigma_gradient: [m] gradient of J.
    """

    J: float
    P: Float64[np.ndarray, "H1 n n"]
    p: Float64[np.ndarray, "H1 n"]
    c: Float64[np.ndarray, "H1"]
    mean: Float64[np.ndarray, "H n"]
    covariance: Float64[np.ndarray, "H n n"]
    theta_gradient: Float64[np.ndarray, "n1 m"]
    log_sigma_gradient: Float64[np.ndarray, "m"]


def linear_values(
    lqr: Lqr,
    theta: Float64[np.ndarray, "n1 m"],
    log_sigma: Float64[np.ndarray, "m"],
    *,
    gamma: float,
    entropy: float = 0.0,
) -> LinearQuadraticValues:
    """Values, moments and the gradient of J by the theorem's analogue, all in closed form.

    Args:
        lqr: Where.
        theta: [n + 1, m], the constant last.
        log_sigma: [m] logarithm of the standard deviations; minus infinity for a policy without noise.
        gamma: Discount per environment step, in [0, 1].
        entropy: Units of reward for each nat of the Gaussian's entropy; it is in J and its gradient, and in c.

    Source: Bereyhi, chapter 5, policy gradient theorem, for a Gaussian policy; Sun, LQR.
    """
    A, B, Q, R, H = lqr.A, lqr.B, lqr.Q, lqr.R, lqr.horizon
    n, m = B.shape
    F, f, variance = theta[:n].T, theta[n], np.exp(2.0 * log_sigma)
    M, drift = A + B @ F, B @ f
    state_noise = np.diag(lqr.noise_deviation**2)
    noise = (B * variance) @ B.T + state_noise
    bonus = entropy * float((log_sigma + HALF_LOG_2_PI_E).sum()) if entropy else 0.0
    P, p, c = np.zeros((H + 1, n, n)), np.zeros((H + 1, n)), np.zeros(H + 1)
    mean, covariance = np.zeros((H, n)), np.zeros((H, n, n))
    theta_gradient, log_sigma_gradient = np.zeros((n + 1, m)), np.zeros(m)
    with np.errstate(over="ignore", invalid="ignore"):  # a system that is not held grows without bound
        for t in range(H - 1, -1, -1):
            after = P[t + 1]
            P[t] = Q + F.T @ R @ F + gamma * M.T @ after @ M
            p[t] = F.T @ R @ f + gamma * M.T @ (after @ drift + p[t + 1])
            c[t] = f @ R @ f + (np.diag(R) * variance).sum() - bonus
            c[t] += gamma * (c[t + 1] + drift @ after @ drift + 2.0 * p[t + 1] @ drift + (after * noise).sum())
        mean[0], covariance[0] = lqr.initial_mean, np.diag(lqr.initial_deviation**2)
        for t in range(1, H):
            mean[t], covariance[t] = M @ mean[t - 1] + drift, M @ covariance[t - 1] @ M.T + noise
        for t in range(H):
            after = P[t + 1]
            # grad over u of q_t at the mean action is -2 (along' x + across)
            curvature = R + gamma * B.T @ after @ B
            along = (curvature @ F + gamma * B.T @ after @ A).T
            across = curvature @ f + gamma * B.T @ p[t + 1]
            second = covariance[t] + np.outer(mean[t], mean[t])
            weight = gamma**t
            theta_gradient[:n] -= 2.0 * weight * (second @ along + np.outer(mean[t], across))
            theta_gradient[n] -= 2.0 * weight * (mean[t] @ along + across)
            log_sigma_gradient += weight * (entropy - 2.0 * variance * np.diag(curvature))
        first = covariance[0] + np.outer(mean[0], mean[0])
        J = -float((P[0] * first).sum() + 2.0 * p[0] @ mean[0] + c[0])
    return LinearQuadraticValues(J, P, p, c, mean, covariance, theta_gradient, log_sigma_gradient)


def linear_return(policy: Policy, lqr: Lqr, *, gamma: float, entropy: float = 0.0) -> float:
    """J of a linear Gaussian policy; minus infinity where the system has grown beyond 64 bits.

    Raises:
        SpecError: if the policy is another one.
    """
    theta, log_sigma = linear_gaussian(policy, parameters_in_double(policy))
    J = float(lqr_return(lqr, theta.detach(), log_sigma.detach(), gamma=gamma, entropy=entropy))
    return -math.inf if math.isnan(J) else J


def linear_gradient(
    policy: Policy, lqr: Lqr, *, gamma: float, entropy: float = 0.0, theorem: bool = True
) -> Float64[torch.Tensor, "P"]:
    """Gradient of J by the theorem's analogue or by differentiation, flat in the order of the parameters' names.

    Raises:
        SpecError: if the policy is not linear and Gaussian.
    """
    parameters = parameters_in_double(policy)
    theta, log_sigma = linear_gaussian(policy, parameters)
    if not theorem:
        return flat_gradient(lqr_return(lqr, theta, log_sigma, gamma=gamma, entropy=entropy), parameters)
    values = linear_values(lqr, theta.detach().numpy(), log_sigma.detach().numpy(), gamma=gamma, entropy=entropy)
    gradients = {"theta": values.theta_gradient, "log_sigma": values.log_sigma_gradient}
    return torch.cat([torch.as_tensor(gradients[name]).reshape(-1) for name in sorted(parameters)])


# --- optima -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OptimalControl:
    """The optimum up to the horizon: u = gains[t] x.

    Attributes:
        J: Best expected return, with the given noise of the actions.
        gains: [H, m, n].
        costs: [H + 1, n, n] cost x' costs[t] x of going on from a state without noise.
    """

    J: float
    gains: Float64[np.ndarray, "H m n"]
    costs: Float64[np.ndarray, "H1 n n"]


@dataclass(frozen=True)
class StationaryControl:
    """The optimum without a horizon: u = gain x.

    Attributes:
        gain: [m, n].
        costs: [n, n] cost x' costs x of going on from a state without noise.
        cost_per_step: What the noise of the system costs each step in the long run, in units of reward.
    """

    gain: Float64[np.ndarray, "m n"]
    costs: Float64[np.ndarray, "n n"]
    cost_per_step: float


@dataclass(frozen=True)
class BestLinear:
    """The best linear policy without a clock up to the horizon: u = theta' [x, 1].

    Attributes:
        J: Its expected return, with the given noise of the actions.
        theta: [n + 1, m], the constant last.
        slope: Largest entry of the gradient of J there.
    """

    J: float
    theta: Float64[np.ndarray, "n1 m"]
    slope: float


def _variances(lqr: Lqr, deviation: float | np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.asarray(deviation, dtype=np.float64) ** 2, (lqr.B.shape[1],))


def _gain(lqr: Lqr, after: np.ndarray, gamma: float) -> np.ndarray:
    curvature = lqr.R + gamma * lqr.B.T @ after @ lqr.B
    gain: np.ndarray = -np.linalg.solve(curvature, gamma * lqr.B.T @ after @ lqr.A)
    return gain


def optimal_control(lqr: Lqr, *, gamma: float, deviation: float | Float64[np.ndarray, "m"] = 0.0) -> OptimalControl:
    """The Riccati recursion: the best policy of the state and the time.

    Args:
        lqr: Where.
        gamma: Discount per environment step, in [0, 1].
        deviation: Standard deviation of noise that is added to the actions; it costs, but moves no gain.

    Source: Sun, Policy Gradient, LQR; Bertsekas, Dynamic Programming and Optimal Control, volume I, section 3.1.
    """
    H, (n, m) = lqr.horizon, lqr.B.shape
    costs, gains = np.zeros((H + 1, n, n)), np.zeros((H, m, n))
    variances, state_noise = _variances(lqr, deviation), lqr.noise_deviation**2
    constant = 0.0
    for t in range(H - 1, -1, -1):
        after = costs[t + 1]
        gains[t] = _gain(lqr, after, gamma)
        M = lqr.A + lqr.B @ gains[t]
        cost = lqr.Q + gains[t].T @ lqr.R @ gains[t] + gamma * M.T @ after @ M
        costs[t] = (cost + cost.T) / 2.0
        exploring = np.diag(lqr.R + gamma * lqr.B.T @ after @ lqr.B) @ variances
        constant = gamma * constant + exploring + gamma * (np.diag(after) @ state_noise)
    first = np.diag(lqr.initial_deviation**2) + np.outer(lqr.initial_mean, lqr.initial_mean)
    return OptimalControl(-float((costs[0] * first).sum() + constant), gains, costs)


def stationary_control(lqr: Lqr, *, gamma: float) -> StationaryControl:
    """The gain that is best without a horizon, by doubling the number of steps of the Riccati recursion.

    Args:
        lqr: Where; its horizon is left out.
        gamma: Discount per environment step, in (0, 1].

    Raises:
        SpecError: if no control keeps the cost bounded.

    Source: Sun, Policy Gradient, LQR; Anderson (1978), Second-order convergent algorithms for the steady-state Riccati
    equation.
    """
    n = len(lqr.A)
    onward = math.sqrt(gamma) * lqr.A
    reach = gamma * lqr.B @ np.linalg.solve(lqr.R, lqr.B.T)
    costs = lqr.Q.copy()
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(DOUBLINGS):
            through = np.linalg.solve(np.eye(n) + reach @ costs, np.hstack([onward, reach]))
            more = onward.T @ costs @ through[:, :n]
            reach, onward = reach + onward @ through[:, n:] @ onward.T, onward @ through[:, :n]
            costs = costs + (more + more.T) / 2.0
            if not np.isfinite(costs).all() or np.abs(more).max() <= 1e-15 * np.abs(costs).max():
                break
        gain = _gain(lqr, costs, gamma) if np.isfinite(costs).all() else np.full(lqr.B.T.shape, np.nan)
        M = lqr.A + lqr.B @ gain
        residual = np.abs(lqr.Q + gain.T @ lqr.R @ gain + gamma * M.T @ costs @ M - costs).max()
    if not residual <= 1e-8 * max(1.0, np.abs(costs).max()):
        raise SpecError(
            "/environment",
            "no_stationary_control",
            "no control keeps the cost of this system bounded without a horizon; take gamma smaller, or a horizon",
        )
    return StationaryControl(gain, costs, gamma * float(np.diag(costs) @ lqr.noise_deviation**2))


def best_linear(lqr: Lqr, *, gamma: float, deviation: float | Float64[np.ndarray, "m"] = 0.0) -> BestLinear:
    """The best linear policy without a clock up to the horizon, by climbing its exact J from several gains.

    It lies below `optimal_control`, whose gains change as the end comes near, and is what training can reach.

    Args:
        lqr: Where.
        gamma: Discount per environment step, in [0, 1].
        deviation: Standard deviation of noise that is added to the actions.
    """
    n, m = lqr.B.shape
    with np.errstate(divide="ignore"):
        log_sigma = 0.5 * np.log(_variances(lqr, deviation))

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        values = linear_values(lqr, flat.reshape(n + 1, m), log_sigma, gamma=gamma)
        slope = values.theta_gradient.ravel()
        if not (math.isfinite(values.J) and np.isfinite(slope).all()):
            return -math.inf, np.zeros_like(flat)
        return values.J, slope

    gains = optimal_control(lqr, gamma=gamma).gains
    best, where = -math.inf, np.zeros((n + 1) * m)
    for gain in (gains[0], gains.mean(axis=0), gains[len(gains) // 2]):
        start = np.concatenate([gain.T, np.zeros((1, m))]).ravel()
        if objective(start)[0] > -math.inf:
            value, point = climb(objective, start)
            if value > best:
                best, where = value, point
    return BestLinear(best, where.reshape(n + 1, m), float(np.abs(objective(where)[1]).max()))
