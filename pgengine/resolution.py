"""Writes every default of a training spec out and checks what depends on several fields.

What is stored is what comes out of here, so that a later change of a default changes no run that exists.
"""

from pgengine.environments.episodes import EnvironmentFacts
from pgengine.errors import SpecError
from pgengine.spaces import DiscreteSpace
from pgengine.spec import (
    AlgorithmSpec,
    GaussianSpec,
    LeaveOneOutBaselineSpec,
    LinearPolicySpec,
    MlpPolicySpec,
    SoftmaxSpec,
    StopSpec,
    TrainingSpec,
)

__all__ = ["resolve", "resolve_policy"]

DEFAULT_UPDATES = 500


def resolve(spec: TrainingSpec, facts: EnvironmentFacts) -> TrainingSpec:
    """The same spec with every default written out.

    Args:
        spec: What was asked for.
        facts: What is known of the environment.

    Raises:
        SpecError: with a pointer from the root of the spec, if fields do not fit one another.
    """
    algorithm = _algorithm(spec.algorithm)
    _check(algorithm)
    changes = {"algorithm": algorithm, "stop": _stop(spec.stop, facts), "policy": resolve_policy(spec.policy, facts)}
    return spec.model_copy(update=changes)


def resolve_policy(
    policy: LinearPolicySpec | MlpPolicySpec, facts: EnvironmentFacts
) -> LinearPolicySpec | MlpPolicySpec:
    """The same policy with its distribution written out: the one that fits the action space."""
    if policy.distribution is not None:
        return policy
    fitting = SoftmaxSpec() if isinstance(facts.action_space, DiscreteSpace) else GaussianSpec()
    return policy.model_copy(update={"distribution": fitting})


def _algorithm(algorithm: AlgorithmSpec) -> AlgorithmSpec:
    if algorithm.discount_weight is not None:
        return algorithm
    fitting = "gamma_power" if algorithm.credit == "reward_to_go" else "none"
    return algorithm.model_copy(update={"discount_weight": fitting})


def _check(algorithm: AlgorithmSpec) -> None:
    if algorithm.credit == "total_return" and algorithm.discount_weight == "gamma_power":
        raise SpecError(
            "/algorithm/discount_weight",
            "discount_counted_twice",
            "the total return is discounted already; gamma_power belongs to reward_to_go",
        )
    if isinstance(algorithm.baseline, LeaveOneOutBaselineSpec) and algorithm.trajectories < 2:
        raise SpecError(
            "/algorithm/baseline",
            "baseline_needs_trajectories",
            "leave_one_out needs at least 2 trajectories; with one, take baseline none or constant",
        )


def _stop(stop: StopSpec, facts: EnvironmentFacts) -> StopSpec:
    changes: dict[str, object] = {}
    if stop.updates is None and stop.env_steps is None and stop.seconds is None:
        changes["updates"] = DEFAULT_UPDATES
    if "target_return" not in stop.model_fields_set:
        changes["target_return"] = facts.reward_threshold
    return stop.model_copy(update=changes)
