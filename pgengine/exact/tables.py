"""A policy on a finite set of observations as one table of log-probabilities, in float64 and differentiable.

Everything exact about finite MDPs starts from this table. A policy that remembers has none: what it does depends on
more than the present observation.
"""

import numpy as np
import torch
from jaxtyping import Float64

from pgengine.distributions import Softmax
from pgengine.errors import ShapeMismatch, SpecError
from pgengine.exactness import needs_no_memory
from pgengine.policies import Policy
from pgengine.spaces import DiscreteSpace

__all__ = ["entropies_of", "entropy_of_rows", "flat_gradient", "log_policy", "parameters_in_double", "policy_table"]


def parameters_in_double(policy: Policy) -> dict[str, torch.Tensor]:
    """The policy's parameters as float64 leaves that take gradients, in the order of their names."""
    return {
        name: torch.tensor(policy.parameters[name], dtype=torch.float64, requires_grad=True)
        for name in sorted(policy.parameters)
    }


def log_policy(policy: Policy, parameters: dict[str, torch.Tensor]) -> Float64[torch.Tensor, "O A"]:
    """Log pi(a|o) of all observations and actions, differentiable in the parameters.

    Args:
        policy: A policy without memory over discrete observations and discrete actions.
        parameters: Its parameters or others of the same shapes, float64.

    Raises:
        SpecError: if the policy has no such table.
    """
    if policy.memory > 1:
        raise needs_no_memory(policy.memory)
    observations, distribution = policy.observation_space, policy.distribution
    if not isinstance(observations, DiscreteSpace) or not isinstance(distribution, Softmax):
        raise SpecError(
            "/policy",
            "exact_needs_a_table",
            "exact values of a finite MDP need discrete observations and one discrete action",
        )
    encoded = torch.as_tensor(policy.encode(observations.start + np.arange(observations.n)))
    if encoded.is_floating_point():
        encoded = encoded.double()
    table: torch.Tensor = distribution.log_probabilities(policy.network.outputs(parameters, encoded))
    return table


def policy_table(policy: Policy | np.ndarray | torch.Tensor) -> Float64[np.ndarray, "O A"]:
    """Log pi(a|o) as numbers, from a policy or from a table of log-probabilities [O, A].

    Raises:
        SpecError: if the policy has no such table.
        ShapeMismatch: if the rows of a table are not log-probabilities.
    """
    if isinstance(policy, Policy):
        return log_policy(policy, parameters_in_double(policy)).detach().numpy()
    table = policy.detach().numpy() if isinstance(policy, torch.Tensor) else policy
    table = np.asarray(table, dtype=np.float64)
    if table.ndim != 2 or not np.allclose(np.exp(table).sum(axis=1), 1.0, rtol=0.0, atol=1e-9):
        raise ShapeMismatch("expected a table [O, A] of log-probabilities, each row of probabilities with sum 1")
    return table


def entropy_of_rows(log_pi: Float64[np.ndarray, "O A"]) -> Float64[np.ndarray, "O"]:
    """Entropy of each row of a table of log-probabilities, in nats; probability zero adds nothing."""
    pi = np.exp(log_pi)
    entropies: np.ndarray = -(pi * np.where(pi > 0.0, log_pi, 0.0)).sum(axis=1)
    return entropies


def entropies_of(log_pi: Float64[torch.Tensor, "O A"]) -> Float64[torch.Tensor, "O"]:
    """Entropy of each row of a table of log-probabilities, in nats, differentiable."""
    pi = log_pi.exp()
    return -(pi * torch.where(pi > 0.0, log_pi, 0.0)).sum(dim=1)


def flat_gradient(value: Float64[torch.Tensor, ""], parameters: dict[str, torch.Tensor]) -> Float64[torch.Tensor, "P"]:
    """Gradient of a number, flat in the order of the parameters' names; zero where it does not depend on one."""
    names = sorted(parameters)
    gradients = torch.autograd.grad(value, [parameters[name] for name in names], materialize_grads=True)
    return torch.cat([gradient.reshape(-1) for gradient in gradients])
