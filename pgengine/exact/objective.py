"""J and its gradient wherever the model is known: one door to the finite MDPs and to the linear system.

Environments come opened, as `pgengine.open_environment` gives them: an id that publishes its table is a finite MDP.
Errors point from the root of a training spec.
"""

from typing import Literal

import torch
from jaxtyping import Float64

from pgengine.environments import EpisodeEnvironment, Lqr, TabularMDP
from pgengine.exact.finite import finite_gradient, table_return
from pgengine.exact.linear_quadratic import linear_gaussian, linear_gradient, linear_return
from pgengine.exact.tables import log_policy, parameters_in_double
from pgengine.exactness import needs_a_model
from pgengine.policies import Policy

__all__ = ["check_exact", "exact_gradient", "exact_return"]


def check_exact(policy: Policy, environment: EpisodeEnvironment) -> None:
    """Refuses what has no exact values, without computing any.

    Raises:
        SpecError: as `exact_return` does of policy and environment.
    """
    if isinstance(environment, TabularMDP):
        log_policy(policy, parameters_in_double(policy))
    elif isinstance(environment, Lqr):
        linear_gaussian(policy, parameters_in_double(policy))
    else:
        raise needs_a_model()


def exact_return(policy: Policy, environment: EpisodeEnvironment, *, gamma: float, entropy: float = 0.0) -> float:
    """J = E[sum_t gamma^t (r_t + entropy * H(pi(.|s_t)))] of a policy, without sampling.

    Args:
        policy: At its present parameters, taken to float64.
        environment: A finite MDP or a linear system.
        gamma: Discount per environment step, in [0, 1]; by weights or by termination, J is the same.
        entropy: Units of reward for each nat of the policy's entropy; 0 is the plain return.

    Raises:
        SpecError: if the environment or the policy has no exact values (codes `exact_needs_…`), or nothing is
            discounted and the episode may never end (`no_certain_end`).

    Source: Sun, J = E sum_{h<H} r; Log-derivative page, J = E R(tau); Bereyhi, chapter 5, J = E_{S~p} v(S).
    """
    if isinstance(environment, TabularMDP):
        log_pi = log_policy(policy, parameters_in_double(policy)).detach()
        return float(table_return(environment, log_pi, gamma=gamma, entropy=entropy))
    if isinstance(environment, Lqr):
        return linear_return(policy, environment, gamma=gamma, entropy=entropy)
    raise needs_a_model()


def exact_gradient(
    policy: Policy,
    environment: EpisodeEnvironment,
    *,
    gamma: float,
    entropy: float = 0.0,
    method: Literal["theorem", "differentiate"] = "theorem",
) -> Float64[torch.Tensor, "P"]:
    """Gradient of J, flat in the order of the parameters' names; points uphill.

    Args:
        policy: At its present parameters, taken to float64.
        environment: A finite MDP or a linear system.
        gamma: Discount per environment step, in [0, 1].
        entropy: Units of reward for each nat of the policy's entropy.
        method: By the policy gradient theorem, which is faster, or by differentiating J; the two share no formula.

    Raises:
        SpecError: as `exact_return`.

    Source: Bereyhi, chapter 5, policy gradient theorem, with the mass of d that its printed form leaves out.
    """
    theorem = method == "theorem"
    if isinstance(environment, TabularMDP):
        return finite_gradient(policy, environment, gamma=gamma, entropy=entropy, theorem=theorem)
    if isinstance(environment, Lqr):
        return linear_gradient(policy, environment, gamma=gamma, entropy=entropy, theorem=theorem)
    raise needs_a_model()
