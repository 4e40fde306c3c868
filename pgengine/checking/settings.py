"""Whether the settings of a gradient check fit each other and the environment, as far as facts tell; loads no torch."""

from pgengine.environments import EnvironmentFacts
from pgengine.errors import SpecError
from pgengine.resolution import resolve
from pgengine.spec import (
    AlgorithmSpec,
    GradientCheckSpec,
    LinearValueBaselineSpec,
    MovingAverageBaselineSpec,
    NeuralValueBaselineSpec,
    PolicyBehaviourSpec,
    TrainingSpec,
    TransformerPolicySpec,
)

__all__ = ["check_settings", "resolve_estimators"]


def resolve_estimators(spec: GradientCheckSpec, facts: EnvironmentFacts) -> list[TrainingSpec]:
    """Each estimator with its defaults written out, inside a training spec.

    Raises:
        SpecError: with a pointer from the root of the check's spec, such as `/estimators/2/baseline`.
    """
    resolved = []
    for index, algorithm in enumerate(spec.estimators):
        training = TrainingSpec(environment=spec.environment, policy=spec.policy, algorithm=algorithm, seed=spec.seed)
        try:
            resolved.append(resolve(training, facts))
        except SpecError as error:
            if error.pointer.startswith("/algorithm"):
                pointer = f"/estimators/{index}" + error.pointer.removeprefix("/algorithm")
                raise SpecError(pointer, error.code, error.message) from None
            raise
    return resolved


def check_settings(
    spec: GradientCheckSpec, facts: EnvironmentFacts, *, has_behaviour: bool = False
) -> list[TrainingSpec]:
    """Refuses what facts and settings alone tell to have no exact gradient, or not to be enumerable.

    Args:
        spec: The check.
        facts: Of its environment.
        has_behaviour: Whether there is a policy that acts for estimators whose behaviour is of kind `policy`.

    Returns:
        Each estimator with its defaults written out, inside a training spec.

    Raises:
        SpecError: with a pointer from the root of the check's spec, a code, and the way out.
    """
    if facts.exact is None:
        raise SpecError(
            "/environment",
            "exact_needs_a_model",
            "an exact gradient is known for finite MDPs, for ids with a transition table of their own, and for linear "
            "systems; take one of them, or look at the signal-to-noise ratio that training reports",
        )
    if isinstance(spec.policy, TransformerPolicySpec) and spec.policy.window > 1:
        raise SpecError(
            "/policy",
            "exact_needs_no_memory",
            f"the policy reads the last {spec.policy.window} observations, so no exact gradient is known; take a "
            "policy of one observation",
        )
    if spec.mode == "enumerate" and facts.exact != "finite_mdp":
        raise SpecError(
            "/mode", "enumerate_needs_a_finite_mdp", "there are infinitely many trajectories; take mode sample"
        )
    trainings = resolve_estimators(spec, facts)
    for index, training in enumerate(trainings):
        pointer = f"/estimators/{index}"
        if isinstance(training.algorithm.importance.behaviour, PolicyBehaviourSpec) and not has_behaviour:
            raise SpecError(
                f"{pointer}/importance/behaviour",
                "behaviour_missing",
                "give the policy that acts beside the one that is checked",
            )
        if spec.mode == "enumerate":
            _check_enumerable(pointer, training.algorithm)
    return trainings


def _check_enumerable(pointer: str, algorithm: AlgorithmSpec) -> None:
    baseline = algorithm.baseline
    looks = (isinstance(baseline, MovingAverageBaselineSpec) and baseline.includes_batch) or (
        isinstance(baseline, LinearValueBaselineSpec | NeuralValueBaselineSpec) and baseline.fit == "before"
    )
    if looks:
        raise SpecError(
            f"{pointer}/baseline",
            "baseline_not_enumerable",
            "this baseline is fitted to each batch anew before it is used; take mode sample",
        )
    if algorithm.horizon == "bootstrap":
        raise SpecError(
            f"{pointer}/horizon", "bootstrap_not_enumerable", "a bootstrap is checked in mode sample; take that"
        )
