"""Whether a policy may learn from what another one does."""

import numpy as np
from jaxtyping import Int, Shaped

from pgengine.distributions import DiagonalGaussian
from pgengine.errors import SpecError
from pgengine.policies.policy import Policy
from pgengine.resolution import check_ratio_variance
from pgengine.spec import AlgorithmSpec

__all__ = ["check_behaviour"]


def check_behaviour(
    algorithm: AlgorithmSpec,
    policy: Policy,
    behaviour: Policy,
    observations: Shaped[np.ndarray, "B ..."] | None = None,
    offsets: Int[np.ndarray, "K1"] | None = None,
) -> None:
    """Refuses Gaussian policies whose ratio against the acting one has an infinite variance.

    Args:
        algorithm: Its importance settings.
        policy: That learns.
        behaviour: That acts, in the same spaces.
        observations: Rows at which deviations that depend on the observation are compared; None: those are not.
        offsets: Row at which each episode begins.

    Raises:
        SpecError: `ratio_variance_unbounded`; `policy_does_not_fit` if the same draw is another action of theirs.
    """
    acting, learning = behaviour.distribution, policy.distribution
    if (
        isinstance(acting, DiagonalGaussian)
        and isinstance(learning, DiagonalGaussian)
        and not learning.draws_alike(acting)
    ):
        raise SpecError(
            "/algorithm/importance/behaviour",
            "policy_does_not_fit",
            "the acting policy's draws become actions in another way; take one with the same action_map and unit",
        )
    sigmas = [_sigma(each, observations, offsets) for each in (policy, behaviour)]
    if sigmas[0] is not None and sigmas[1] is not None:
        check_ratio_variance(algorithm, sigmas[0], sigmas[1])


def _sigma(policy: Policy, observations: np.ndarray | None, offsets: np.ndarray | None) -> np.ndarray | None:
    d = policy.distribution
    if not isinstance(d, DiagonalGaussian):
        return None
    if observations is not None and offsets is not None:
        outputs = policy.outputs_along(observations, offsets)
    elif d.depends_on_observation:
        return None
    else:
        outputs = np.zeros((1, d.width), dtype=np.float32)
    sigma: np.ndarray = np.exp(np.asarray(d.log_sigma(policy.parameters, outputs), dtype=np.float64))
    return sigma
