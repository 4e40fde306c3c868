"""Exact answers on small finite MDPs: all trajectories, the exact gradient, and what an estimator expects.

Nothing here samples. The gradient is found in two independent ways that must agree: by differentiating J, computed by
propagating state distributions, and as the sum over all trajectories of p(tau) R(tau) times the score. An estimator's
expectation is the sum over all batches of K trajectories of their probability times the estimate.

Source: Lin, p(tau) and r(tau); Log-derivative page, J = sum over tau of P(tau) R(tau); Sun, expectation over
trajectories.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int

from pgengine.distributions import Softmax
from pgengine.environments.tabular import TabularMDP
from pgengine.errors import ShapeMismatch
from pgengine.policies import Policy

__all__ = [
    "Trajectories",
    "enumerate_trajectories",
    "exact_gradient",
    "exact_return",
    "expected_estimate",
    "log_policy",
    "parameters_in_double",
    "trajectory_probabilities",
]

Weights = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(rewards [*batch, B], offsets [K + 1]) to the weight of each step's score [*batch, B]."""


@dataclass(frozen=True)
class Trajectories:
    """All trajectories that a finite MDP can produce.

    Attributes:
        states: [n, H] state before each action; zero after the end.
        actions: [n, H]; zero after the end.
        rewards: [n, H]; zero after the end.
        lengths: [n] number of actions.
        dynamics: [n] probability of everything but the actions: mu(s_0) * product of P(s'|s, a).
        truncated: [n] whether the horizon cut it.
    """

    states: Int[np.ndarray, "n H"]
    actions: Int[np.ndarray, "n H"]
    rewards: Float[np.ndarray, "n H"]
    lengths: Int[np.ndarray, "n"]
    dynamics: Float[np.ndarray, "n"]
    truncated: Bool[np.ndarray, "n"]

    @property
    def taken(self) -> Bool[np.ndarray, "n H"]:
        """Where an action was taken."""
        mask: np.ndarray = np.arange(self.states.shape[1]) < self.lengths[:, None]
        return mask


def enumerate_trajectories(mdp: TabularMDP) -> Trajectories:
    """Every trajectory of positive probability under some policy."""
    rows = list(_walk(mdp))
    n, H = len(rows), mdp.horizon
    states, actions = np.zeros((2, n, H), dtype=np.int64)
    rewards, dynamics = np.zeros((n, H)), np.zeros(n)
    lengths, truncated = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=bool)
    for i, (steps, probability, cut) in enumerate(rows):
        lengths[i], dynamics[i], truncated[i] = len(steps), probability, cut
        for t, (s, a, r) in enumerate(steps):
            states[i, t], actions[i, t], rewards[i, t] = s, a, r
    return Trajectories(states, actions, rewards, lengths, dynamics, truncated)


_Steps = tuple[tuple[int, int, float], ...]


def _walk(mdp: TabularMDP) -> Iterator[tuple[_Steps, float, bool]]:
    stack: list[tuple[_Steps, int, float]] = [((), int(s), float(mdp.initial[s])) for s in np.flatnonzero(mdp.initial)]
    while stack:
        steps, s, probability = stack.pop()
        for a in range(mdp.transitions.shape[1]):
            for after in np.flatnonzero(mdp.transitions[s, a]):
                longer = (*steps, (s, a, float(mdp.rewards[s, a, after])))
                p = probability * float(mdp.transitions[s, a, after])
                if mdp.terminal[after] or len(longer) == mdp.horizon:
                    yield longer, p, not mdp.terminal[after]
                else:
                    stack.append((longer, int(after), p))


def parameters_in_double(policy: Policy) -> dict[str, torch.Tensor]:
    """The policy's parameters as float64 leaves that take gradients, in the order of their names."""
    return {
        name: torch.tensor(policy.parameters[name], dtype=torch.float64, requires_grad=True)
        for name in sorted(policy.parameters)
    }


def log_policy(policy: Policy, parameters: dict[str, torch.Tensor]) -> Float64[torch.Tensor, "S A"]:
    """Log pi(a|s) of all states and actions, differentiable in the parameters."""
    if not isinstance(policy.distribution, Softmax):
        raise ShapeMismatch("an exact policy table needs a softmax over discrete actions")
    S = getattr(policy.observation_space, "n", None)
    if S is None:
        raise ShapeMismatch("an exact policy table needs discrete observations")
    encoded = torch.as_tensor(policy.network.encode(np.arange(S)))
    if encoded.is_floating_point():
        encoded = encoded.double()
    table: torch.Tensor = policy.distribution.log_probabilities(policy.network.outputs(parameters, encoded))
    return table


def exact_return(mdp: TabularMDP, log_pi: Float64[torch.Tensor, "S A"], *, gamma: float) -> Float64[torch.Tensor, ""]:
    """J = E[sum_t gamma^t r_t] up to the horizon, by propagating the distribution of the state.

    Source: Sun, J = E sum_{h<H} r; Bereyhi, J = E_{S~p} v(S).
    """
    pi = log_pi.exp()
    transitions = torch.as_tensor(mdp.transitions)
    expected = torch.as_tensor((mdp.transitions * mdp.rewards).sum(axis=2))
    live = torch.as_tensor(~mdp.terminal).double()
    d = torch.as_tensor(mdp.initial) * live
    J = torch.zeros((), dtype=torch.float64)
    for t in range(mdp.horizon):
        pairs = d[:, None] * pi
        J = J + gamma**t * (pairs * expected).sum()
        d = torch.einsum("sa,sap->p", pairs, transitions) * live
    return J


def exact_gradient(policy: Policy, mdp: TabularMDP, *, gamma: float) -> Float64[torch.Tensor, "P"]:
    """Gradient of J by differentiating it, flat in the order of the parameters' names."""
    parameters = parameters_in_double(policy)
    return _flat_gradient(exact_return(mdp, log_policy(policy, parameters), gamma=gamma), parameters)


def trajectory_probabilities(
    trajectories: Trajectories, log_pi: Float64[torch.Tensor, "S A"]
) -> Float64[torch.Tensor, "n"]:
    """p(tau) = dynamics * product of pi(a_t|s_t), differentiable. Source: Lin, p(tau); Bereyhi, p_pi(tau)."""
    scores = log_pi[trajectories.states, trajectories.actions] * torch.as_tensor(trajectories.taken)
    return torch.as_tensor(trajectories.dynamics) * scores.sum(dim=1).exp()


def expected_estimate(
    policy: Policy, trajectories: Trajectories, weights: Weights, *, K: int
) -> Float64[torch.Tensor, "P"]:
    """What an estimator of the gradient gives on average over all batches of K independent trajectories.

    Args:
        policy: At which parameters.
        trajectories: All of them.
        weights: The estimator: the weight of each step's score.
        K: Trajectories in a batch; the work grows as the number of trajectories to this power.
    """
    parameters = parameters_in_double(policy)
    log_pi = log_policy(policy, parameters)
    p = trajectory_probabilities(trajectories, log_pi).detach().numpy()
    expected = np.zeros(trajectories.states.shape)
    groups = {int(length): np.flatnonzero(trajectories.lengths == length) for length in set(trajectories.lengths)}
    for lengths in product(groups, repeat=K):
        members = np.stack(
            [axis.ravel() for axis in np.meshgrid(*(groups[length] for length in lengths), indexing="ij")]
        )
        rewards = np.concatenate(
            [trajectories.rewards[who, :length] for who, length in zip(members, lengths, strict=True)], axis=1
        )
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        weighted = p[members].prod(axis=0)[:, None] * weights(rewards, offsets)
        for who, start, length in zip(members, offsets, lengths, strict=False):
            np.add.at(expected[:, :length], who, weighted[:, start : start + length])
    scores = log_pi[trajectories.states, trajectories.actions]
    return _flat_gradient((torch.as_tensor(expected) * scores).sum(), parameters)


def _flat_gradient(value: torch.Tensor, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
    gradients = torch.autograd.grad(value, list(parameters.values()))
    return torch.cat([gradient.reshape(-1) for gradient in gradients])
