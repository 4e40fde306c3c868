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
    from pgengine.environments import EnvironmentFacts, EpisodeEnvironment, Step, TabularMDP, describe, open_environment
    from pgengine.errors import (
        CheckpointError,
        DivergedError,
        EnvironmentFailure,
        ObservationError,
        PgengineError,
        ShapeMismatch,
        SpecError,
    )
    from pgengine.evaluation import Evaluation, evaluate
    from pgengine.labels import Label, label
    from pgengine.policies import Acted, Policy, create_policy, load
    from pgengine.resolution import resolve
    from pgengine.spec import (
        AlgorithmSpec,
        EvaluationSpec,
        GymnasiumSpec,
        LinearPolicySpec,
        MlpPolicySpec,
        StopSpec,
        TabularSpec,
        TrainingSpec,
    )
    from pgengine.training import Progress, Update, runtime_fingerprint, train

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
    "GymnasiumSpec": "spec",
    "Label": "labels",
    "LinearPolicySpec": "spec",
    "MlpPolicySpec": "spec",
    "ObservationError": "errors",
    "PgengineError": "errors",
    "Policy": "policies",
    "Progress": "training",
    "ShapeMismatch": "errors",
    "SpecError": "errors",
    "Step": "environments",
    "StopSpec": "spec",
    "TabularMDP": "environments",
    "TabularSpec": "spec",
    "TrainingSpec": "spec",
    "Update": "training",
    "create_policy": "policies",
    "describe": "environments",
    "evaluate": "evaluation",
    "label": "labels",
    "load": "policies",
    "open_environment": "environments",
    "resolve": "resolution",
    "runtime_fingerprint": "training",
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
    "GymnasiumSpec",
    "Label",
    "LinearPolicySpec",
    "MlpPolicySpec",
    "ObservationError",
    "PgengineError",
    "Policy",
    "Progress",
    "ShapeMismatch",
    "SpecError",
    "Step",
    "StopSpec",
    "TabularMDP",
    "TabularSpec",
    "TrainingSpec",
    "Update",
    "create_policy",
    "describe",
    "evaluate",
    "label",
    "load",
    "open_environment",
    "resolve",
    "runtime_fingerprint",
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
