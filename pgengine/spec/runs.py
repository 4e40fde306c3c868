"""Whole runs: training, and checks of estimators."""

from typing import Annotated, Literal

from pydantic import Field

from pgengine.spec.algorithms import AlgorithmSpec
from pgengine.spec.base import LARGEST_INTEGER, Seed, Spec
from pgengine.spec.environments import EnvironmentSpec
from pgengine.spec.policies import LinearPolicySpec, MlpPolicySpec, PolicySpec

__all__ = [
    "SPEC_VERSION",
    "EvaluationSpec",
    "GradientCheckSpec",
    "StopSpec",
    "StoppedBy",
    "TrainingSpec",
]

SPEC_VERSION = 1

StoppedBy = Literal["target_return", "updates", "env_steps", "seconds", "effective_sample_size", "ratio_variance"]
"""Why a run has ended: a limit of `StopSpec`, or ratios that could not be learned from."""


class StopSpec(Spec):
    """When training ends: as soon as one of these is reached."""

    updates: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Updates of this run. null: 500 if no other limit is given, otherwise none."""
    env_steps: Annotated[int, Field(ge=1, le=LARGEST_INTEGER)] | None = None
    """Environment steps of training."""
    seconds: Annotated[float, Field(gt=0.0, le=31_536_000.0)] | None = None
    """Seconds of training; such a run cannot be repeated bit for bit."""
    target_return: float | None = None
    """Mean return at which the run stops. Where the exact mean return is known, it is compared with the target; where
    the range of returns is known, the run stops below the target with probability at most 5%, over all looks at fresh
    episodes. Where nothing is known this is only approximate: bad returns that are rare may be missed.

    Left out: the reward threshold with which the environment is registered, if it has one; none if another limit is
    given, or if the run goes on with a policy that exists already. null: none.
    """


class EvaluationSpec(Spec):
    """How a policy is evaluated."""

    episodes: Annotated[int, Field(ge=2, le=10_000)] = 100
    """Fresh episodes for each evaluation."""
    deterministic_episodes: Annotated[int, Field(ge=0, le=10_000)] = 20
    """Other fresh episodes on which the final evaluation plays the mode, a second number; 0 for none."""


class TrainingSpec(Spec):
    """A whole training run. Everything but the environment has a default.

    The defaults learn CartPole-v1, Acrobot-v1 and FrozenLake-v1; docs/engine/environments.md has settings for others.
    """

    version: Literal[1] = 1
    """Version of this shape, kept with what is stored."""
    environment: EnvironmentSpec
    """What to learn."""
    policy: PolicySpec = Field(default_factory=MlpPolicySpec)
    """What learns. Left out, with a registered id that publishes its transition table: a linear softmax, and in
    `algorithm` 128 trajectories and Adam 0.05 where those are left out, too."""
    algorithm: AlgorithmSpec = Field(default_factory=AlgorithmSpec)
    """How it learns."""
    stop: StopSpec = Field(default_factory=StopSpec)
    """When it ends."""
    evaluation: EvaluationSpec = Field(default_factory=EvaluationSpec)
    """How the result is measured."""
    diagnostics_every: Annotated[int, Field(ge=0, le=1_000_000)] = 1
    """Updates from one measurement of the gradient's noise and the exact figures to the next; 0 for none. They cost
    time and change no bit of the training."""
    seed: Seed = 0
    """Every random number that the engine draws is derived from it, and the seed of each episode, too; an environment
    that draws from elsewhere has `repeatable: false`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where updates are computed; auto takes a GPU if there is one."""


class GradientCheckSpec(Spec):
    """A comparison of estimators with the exact gradient, on a finite MDP or an LQR."""

    version: Literal[1] = 1
    """Version of this shape, kept with what is stored."""
    environment: EnvironmentSpec
    """A finite MDP, an environment with a transition table of its own, or an LQR."""
    policy: PolicySpec = Field(default_factory=LinearPolicySpec)
    """The policy at whose parameters the gradient is taken."""
    estimators: Annotated[list[AlgorithmSpec], Field(min_length=1, max_length=32)] = Field(
        default_factory=lambda: [AlgorithmSpec()]
    )
    """Which estimators to compare, each with its own number of trajectories."""
    mode: Literal["enumerate", "sample"] = "sample"
    """All batches of a small MDP, or batches that are played by the same code as in training."""
    batches: Annotated[int, Field(ge=8, le=10_000_000)] = 2000
    """Batches to play for each estimator in mode `sample`."""
    false_alarm: Annotated[float, Field(gt=0.0, le=0.1)] = 1e-6
    """Odds that an unbiased estimator is called biased in mode `sample`, over all of its parameters; approximately, and
    on finite MDPs rare events of the model are allowed for, rare importance ratios are not."""
    values: bool = False
    """Whether the report also has the exact values of states and actions, the visits, and the optima."""
    seed: Seed = 0
    """Every random number of the check is derived from it."""
