"""pgengine: policy gradients that are what they say they are.

    import pgengine

    spec = pgengine.TrainingSpec(environment=pgengine.GymnasiumSpec(id="CartPole-v1"))
    for update in pgengine.train(spec):
        print(update.updates, update.metrics["mean_return"])

Names are loaded when they are first used, so that reading specs and acting need no torch.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pgengine.checking import GradientCheck, check_gradient
    from pgengine.environments import (
        EnvironmentFacts,
        EpisodeEnvironment,
        Lqr,
        Step,
        TabularMDP,
        describe,
        open_environment,
        read_table,
    )
    from pgengine.errors import (
        CheckpointError,
        DivergedError,
        EnvironmentFailure,
        ObservationError,
        PgengineError,
        ReplayDiffers,
        ShapeMismatch,
        SpecError,
    )
    from pgengine.evaluation import Evaluation, evaluate
    from pgengine.exact import (
        best_stationary,
        exact_gradient,
        exact_return,
        exact_values,
        optimal_plan,
        optimal_values,
    )
    from pgengine.explaining import Explanation, Recorded, explain
    from pgengine.findings import Finding
    from pgengine.labels import Label, label
    from pgengine.notices import Notice, notices_of
    from pgengine.policies import Acted, Policy, create_policy, load
    from pgengine.resolution import resolve
    from pgengine.score_function import (
        GradientEstimate,
        pathwise_gradient,
        score_function_gradient,
        score_function_surrogate,
    )
    from pgengine.spec import (
        AlgorithmSpec,
        EvaluationSpec,
        GradientCheckSpec,
        GymnasiumSpec,
        LinearPolicySpec,
        LqrSpec,
        MlpPolicySpec,
        ScorePolicySpec,
        StopSpec,
        TabularSpec,
        TrainingSpec,
        TransformerPolicySpec,
    )
    from pgengine.states import Progress
    from pgengine.training import Update, runtime_fingerprint, train

_HOME = {
    "Acted": "policies",
    "AlgorithmSpec": "spec",
    "CheckpointError": "errors",
    "DivergedError": "errors",
    "EnvironmentFacts": "environments",
    "EnvironmentFailure": "errors",
    "EpisodeEnvironment": "environments",
    "Evaluation": "evaluation",
    "EvaluationSpec": "spec",
    "Explanation": "explaining",
    "Finding": "findings",
    "GradientCheck": "checking",
    "GradientCheckSpec": "spec",
    "GradientEstimate": "score_function",
    "GymnasiumSpec": "spec",
    "Label": "labels",
    "LinearPolicySpec": "spec",
    "Lqr": "environments",
    "LqrSpec": "spec",
    "MlpPolicySpec": "spec",
    "Notice": "notices",
    "ObservationError": "errors",
    "PgengineError": "errors",
    "Policy": "policies",
    "Progress": "states",
    "Recorded": "explaining",
    "ReplayDiffers": "errors",
    "ScorePolicySpec": "spec",
    "ShapeMismatch": "errors",
    "SpecError": "errors",
    "Step": "environments",
    "StopSpec": "spec",
    "TabularMDP": "environments",
    "TabularSpec": "spec",
    "TrainingSpec": "spec",
    "TransformerPolicySpec": "spec",
    "Update": "training",
    "best_stationary": "exact",
    "check_gradient": "checking",
    "create_policy": "policies",
    "describe": "environments",
    "evaluate": "evaluation",
    "exact_gradient": "exact",
    "exact_return": "exact",
    "exact_values": "exact",
    "explain": "explaining",
    "label": "labels",
    "load": "policies",
    "notices_of": "notices",
    "open_environment": "environments",
    "optimal_plan": "exact",
    "optimal_values": "exact",
    "pathwise_gradient": "score_function",
    "read_table": "environments",
    "resolve": "resolution",
    "runtime_fingerprint": "training",
    "score_function_gradient": "score_function",
    "score_function_surrogate": "score_function",
    "train": "training",
}

__all__ = [
    "Acted",
    "AlgorithmSpec",
    "CheckpointError",
    "DivergedError",
    "EnvironmentFacts",
    "EnvironmentFailure",
    "EpisodeEnvironment",
    "Evaluation",
    "EvaluationSpec",
    "Explanation",
    "Finding",
    "GradientCheck",
    "GradientCheckSpec",
    "GradientEstimate",
    "GymnasiumSpec",
    "Label",
    "LinearPolicySpec",
    "Lqr",
    "LqrSpec",
    "MlpPolicySpec",
    "Notice",
    "ObservationError",
    "PgengineError",
    "Policy",
    "Progress",
    "Recorded",
    "ReplayDiffers",
    "ScorePolicySpec",
    "ShapeMismatch",
    "SpecError",
    "Step",
    "StopSpec",
    "TabularMDP",
    "TabularSpec",
    "TrainingSpec",
    "TransformerPolicySpec",
    "Update",
    "best_stationary",
    "check_gradient",
    "create_policy",
    "describe",
    "evaluate",
    "exact_gradient",
    "exact_return",
    "exact_values",
    "explain",
    "label",
    "load",
    "notices_of",
    "open_environment",
    "optimal_plan",
    "optimal_values",
    "pathwise_gradient",
    "read_table",
    "resolve",
    "runtime_fingerprint",
    "score_function_gradient",
    "score_function_surrogate",
    "train",
]

try:
    __version__ = version("pgengine")
except PackageNotFoundError:  # run from a checkout that was not installed
    __version__ = "0.0.0"


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'pgengine' has no attribute {name!r}")
    return getattr(import_module(f"pgengine.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
