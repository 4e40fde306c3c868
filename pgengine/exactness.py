"""For what exact answers are known, what they cost, and why one is missing. Loads no torch.

`pgengine.exact` computes the answers; what it refuses is said here, so that a server can say it without computing.
"""

from typing import Literal

from pgengine.environments.episodes import EnvironmentFacts
from pgengine.errors import SpecError
from pgengine.spaces import BoxSpace, DiscreteSpace
from pgengine.spec import (
    GaussianSpec,
    LinearPolicySpec,
    PlainFeaturesSpec,
    PolicySpec,
    Spec,
    TransformerPolicySpec,
)

__all__ = [
    "EXACT_COST",
    "LARGEST_EXACT_COST",
    "ExactAbsence",
    "check_exact_policy",
    "check_linear_gaussian",
    "exact_absence",
    "exact_budget",
    "exact_cost",
    "needs_a_model",
    "needs_no_memory",
    "unmeasured",
]

EXACT_COST = 2_000_000
"""Multiply-adds that exact figures may take in an update, on average over the updates between two measurements."""
LARGEST_EXACT_COST = 200_000_000
"""Multiply-adds that exact figures may take at once: in an update, an evaluation, or an explanation."""
FINITE_STEP = 5_000  # multiply-adds that a time step takes at least, because it begins operations anew
LINEAR_STEP = 150_000  # of a linear system, which begins some fifty of them


class ExactAbsence(Spec):
    """Why exact figures are missing."""

    code: Literal[
        "exact_needs_a_model",
        "exact_needs_no_memory",
        "exact_needs_a_table",
        "exact_needs_linear_gaussian",
        "exact_needs_no_normaliser",
        "exact_too_large",
        "exact_not_measured",
        "exact_not_finite",
    ]
    """Closed code."""
    message: str
    """The same for people."""


def exact_absence(
    facts: EnvironmentFacts, policy: PolicySpec, *, most: int = LARGEST_EXACT_COST
) -> ExactAbsence | None:
    """Why there is no exact figure of a policy in an environment, or None if there is one.

    Args:
        facts: Of the environment.
        policy: One that fits it.
        most: Multiply-adds that may be spent.
    """
    try:
        check_exact_policy(facts, policy)
    except SpecError as error:
        return ExactAbsence.model_validate({"code": error.code, "message": error.message})
    cost = exact_cost(facts)
    if cost <= most:
        return None
    message = f"exact figures take about {cost:,} multiply-adds here, and at most {most:,} are spent on them"
    return ExactAbsence(code="exact_too_large", message=message)


def unmeasured(facts: EnvironmentFacts, policy: PolicySpec, diagnostics_every: int) -> ExactAbsence | None:
    """Why the updates of a training have no exact figures, or None if those that are measured have them.

    Args:
        facts: Of the environment.
        policy: What learns.
        diagnostics_every: Updates from one measurement to the next; 0 for none.
    """
    absent = exact_absence(facts, policy, most=exact_budget(diagnostics_every))
    if absent is not None and absent.code == "exact_too_large":
        every = -(-exact_cost(facts) // EXACT_COST)
        way = (
            f"; with diagnostics_every {every} or more they are measured"
            if every * EXACT_COST <= LARGEST_EXACT_COST
            else "; take fewer states or a shorter horizon"
        )
        return absent.model_copy(update={"message": absent.message + way})
    if absent is None and diagnostics_every == 0:
        return ExactAbsence(code="exact_not_measured", message="diagnostics_every is 0, so nothing is measured")
    return absent


def exact_budget(diagnostics_every: int) -> int:
    """Multiply-adds that exact figures may take in one update, if only every so many updates measure them."""
    return min(EXACT_COST * max(1, diagnostics_every), LARGEST_EXACT_COST)


def exact_cost(facts: EnvironmentFacts) -> int:
    """About how many multiply-adds J and its gradient take, so that whoever asks at each update can decide not to.

    A core makes about 3e9 of them a second; what calling small operations costs is counted as multiply-adds, too.

    Raises:
        SpecError: if the environment has no exact values.
    """
    seen, does = facts.observation_space, facts.action_space
    if facts.exact == "finite_mdp" and facts.states is not None and isinstance(does, DiscreteSpace):
        S, A, stationary = facts.states, does.n, facts.limit_from == "none"
        over_time = S * S * S + FINITE_STEP if stationary else facts.max_episode_steps * max(3 * S * S, FINITE_STEP)
        return 2 * S * S * A + over_time
    if facts.exact == "lqr" and isinstance(seen, BoxSpace) and isinstance(does, BoxSpace):
        n, m = seen.shape[0], does.shape[0]
        return facts.max_episode_steps * max(8 * n**3 + 6 * n * n * m + 4 * n * m * m, LINEAR_STEP)
    raise needs_a_model()


def check_exact_policy(facts: EnvironmentFacts, policy: PolicySpec) -> None:
    """Refuses an environment without exact values, and a policy that has none there.

    Raises:
        SpecError: `exact_needs_…`.
    """
    if facts.exact is None:
        raise needs_a_model()
    if facts.exact == "lqr":
        check_linear_gaussian(policy)
    elif isinstance(policy, TransformerPolicySpec) and policy.window > 1:
        raise needs_no_memory(policy.window)


def check_linear_gaussian(policy: PolicySpec) -> None:
    """Refuses a policy that is not linear and Gaussian.

    Raises:
        SpecError: `exact_needs_linear_gaussian` or `exact_needs_no_normaliser`.
    """
    distribution = policy.distribution
    if not (
        isinstance(policy, LinearPolicySpec)
        and (policy.features is None or isinstance(policy.features, PlainFeaturesSpec))
        and isinstance(distribution, GaussianSpec)
        and distribution.sigma != "head"
    ):
        raise SpecError(
            "/policy",
            "exact_needs_linear_gaussian",
            "exact values of a linear system need a linear policy with plain features and a Gaussian whose sigma is "
            "fixed or learned; take such a policy, or look at the signal-to-noise ratio that training reports",
        )
    if policy.normalise_observations:
        raise SpecError(
            "/policy/normalise_observations",
            "exact_needs_no_normaliser",
            "a normaliser clips what it reads, so the policy is not linear; switch it off",
        )


def needs_no_memory(memory: int) -> SpecError:
    """What a policy that remembers is refused with."""
    return SpecError(
        "/policy",
        "exact_needs_no_memory",
        f"the policy reads the last {memory} observations, so it has no table over states and no exact values; take a "
        "policy of one observation",
    )


def needs_a_model() -> SpecError:
    """What an environment without a model is refused with."""
    return SpecError(
        "/environment",
        "exact_needs_a_model",
        "exact values are known for finite MDPs and linear systems only; take one of them",
    )
