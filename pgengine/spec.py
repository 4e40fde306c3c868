"""Every setting of the engine, declared once.

These frozen models are the engine's arguments, the parts of which request bodies are composed, and the JSON that is
stored. They know shapes and bounds of single fields; what depends on several fields or on the environment is checked
by `pgengine.resolve`, which also writes every default out.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "LARGEST_INTEGER",
    "SPEC_VERSION",
    "AdaGradSpec",
    "AdamSpec",
    "AlgorithmSpec",
    "BaselineSpec",
    "ConstantBaselineSpec",
    "DistributionSpec",
    "EnvironmentSpec",
    "EvaluationSpec",
    "GaussianSpec",
    "GymnasiumSpec",
    "LeaveOneOutBaselineSpec",
    "LinearPolicySpec",
    "MlpPolicySpec",
    "NoBaselineSpec",
    "OptimizerSpec",
    "PolicySpec",
    "SgdSpec",
    "SoftmaxSpec",
    "Spec",
    "StopSpec",
    "TabularSpec",
    "TrainingSpec",
]

SPEC_VERSION = 1
LARGEST_INTEGER = 2**53 - 1  # the largest integer that every JSON reader keeps exact


class Spec(BaseModel):
    """Base of all settings: frozen, strict, finite, no unknown fields."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=False,
    )


# --- environments -----------------------------------------------------------------------------------------------------

EpisodeLimit = Annotated[int, Field(ge=1, le=1_000_000)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Seed = Annotated[int, Field(ge=0, le=LARGEST_INTEGER)]


class GymnasiumSpec(Spec):
    """An environment registered with Gymnasium, named by its id."""

    kind: Literal["gymnasium"] = "gymnasium"
    """Which kind of environment this is."""
    id: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.\-/]+$")]
    """Registered id such as `CartPole-v1`; an id with a colon would import a module and is refused."""
    arguments: Annotated[dict[str, bool | int | float | str | None], Field(max_length=64)] = Field(default_factory=dict)
    """Keyword arguments of the environment's constructor; only scalars."""
    max_episode_steps: EpisodeLimit | None = None
    """Episode limit in environment steps; null takes the id's own. It is part of the objective."""


# one fault is enough to refuse a table; listing millions of them would take minutes and gigabytes
Numbers = Annotated[list[float], Field(fail_fast=True)]
Table = Annotated[list[Numbers], Field(fail_fast=True)]
Tables = Annotated[list[Table], Field(fail_fast=True)]


class TabularSpec(Spec):
    """A finite Markov decision process given as arrays, S states and A actions.

    Source: Sun, Policy Gradient, the tuple M = {T, r, H, mu, S, A}.
    """

    kind: Literal["tabular"] = "tabular"
    """Which kind of environment this is."""
    transitions: Annotated[
        list[
            Annotated[
                list[Annotated[list[Probability], Field(min_length=1, max_length=4096, fail_fast=True)]],
                Field(min_length=1, max_length=256, fail_fast=True),
            ]
        ],
        Field(min_length=1, max_length=4096, fail_fast=True),
    ]
    """[S][A][S]: probability of the next state; each row sums to 1. Rows of terminal states are not used."""
    rewards: Table | None = None
    """[S][A]: reward of an action in a state. Give this or `transition_rewards`."""
    transition_rewards: Tables | None = None
    """[S][A][S]: reward of a transition. Give this or `rewards`."""
    initial: Annotated[list[Probability], Field(fail_fast=True)]
    """[S]: probability that an episode begins in the state; sums to 1."""
    terminal: Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)] = Field(default_factory=list)
    """Indices of the states in which an episode ends."""
    horizon: EpisodeLimit
    """Episode limit in environment steps, part of the objective."""
    features: Tables | None = None
    """[S][A][J]: features x(s, a) of a linear policy; absent means one feature for each pair."""


EnvironmentSpec = Annotated[GymnasiumSpec | TabularSpec, Field(discriminator="kind")]


# --- policies ---------------------------------------------------------------------------------------------------------


class SoftmaxSpec(Spec):
    """Softmax over a finite set of actions. Source: Bereyhi, chapter 5, softmax policy."""

    kind: Literal["softmax"] = "softmax"
    """Which family of distributions this is."""


class GaussianSpec(Spec):
    """Diagonal Gaussian over a box of actions. Source: Bereyhi, chapter 5; Sun, N(mu(s), sigma^2 I)."""

    kind: Literal["gaussian"] = "gaussian"
    """Which family of distributions this is."""
    sigma: Literal["fixed", "learned"] = "learned"
    """Whether the standard deviation stays as it is or is a parameter of its own for each dimension."""
    initial_sigma: Annotated[float, Field(ge=1e-3, le=100.0)] = 0.5
    """Standard deviation at the start: with clip in units of the action, with tanh before squashing."""
    action_map: Literal["clip", "tanh"] = "clip"
    """How a draw becomes an action inside the box; outside the density, so the score is taken at the raw draw."""


DistributionSpec = Annotated[SoftmaxSpec | GaussianSpec, Field(discriminator="kind")]

InitialParameters = Annotated[dict[str, Any], Field(max_length=64)]


class LinearPolicySpec(Spec):
    """Logits or means that are linear in features. Source: Bereyhi, chapter 5, linear policies."""

    kind: Literal["linear"] = "linear"
    """Which network this is."""
    distribution: DistributionSpec | None = None
    """Family of action distributions; null takes the one that fits the action space."""
    initial_parameters: InitialParameters | None = None
    """Values to start from by parameter name, nested lists of numbers; null starts from zero."""


class MlpPolicySpec(Spec):
    """A fully connected network. Source: Bereyhi, chapter 5, deep policy network; Sun, f_theta as an MLP."""

    kind: Literal["mlp"] = "mlp"
    """Which network this is."""
    hidden: Annotated[list[Annotated[int, Field(ge=1, le=1024)]], Field(min_length=1, max_length=8)] = Field(
        default_factory=lambda: [64, 64]
    )
    """Widths of the hidden layers."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Function after each hidden layer."""
    distribution: DistributionSpec | None = None
    """Family of action distributions; null takes the one that fits the action space."""
    initial_parameters: InitialParameters | None = None
    """Values to start from by parameter name, nested lists of numbers; null draws them from the seed."""


PolicySpec = Annotated[LinearPolicySpec | MlpPolicySpec, Field(discriminator="kind")]


# --- algorithm --------------------------------------------------------------------------------------------------------


class NoBaselineSpec(Spec):
    """Nothing is subtracted from the credit."""

    kind: Literal["none"] = "none"
    """Which baseline this is."""


class ConstantBaselineSpec(Spec):
    """One number, fixed in advance, is subtracted from the credit."""

    kind: Literal["constant"] = "constant"
    """Which baseline this is."""
    value: float
    """The number, in units of return."""


class LeaveOneOutBaselineSpec(Spec):
    """Mean credit of the other trajectories at the same time step, an ended one counting zero.

    Under total return the mean of the other trajectories' returns. Needs at least two trajectories.
    """

    kind: Literal["leave_one_out"] = "leave_one_out"
    """Which baseline this is."""


BaselineSpec = Annotated[NoBaselineSpec | ConstantBaselineSpec | LeaveOneOutBaselineSpec, Field(discriminator="kind")]

LearningRate = Annotated[float, Field(gt=0.0, le=1e6)]


class SgdSpec(Spec):
    """theta + learning_rate * gradient. Source: Lin, update rule; Sun, SG ascent."""

    kind: Literal["sgd"] = "sgd"
    """Which optimizer this is."""
    learning_rate: LearningRate = 0.01
    """Step size."""


class AdaGradSpec(Spec):
    """AdaGrad as in torch.optim.Adagrad. Source: Sun, off-the-shelf optimizers."""

    kind: Literal["adagrad"] = "adagrad"
    """Which optimizer this is."""
    learning_rate: LearningRate = 0.01
    """Step size."""


class AdamSpec(Spec):
    """Adam as in torch.optim.Adam. Source: Sun, off-the-shelf optimizers."""

    kind: Literal["adam"] = "adam"
    """Which optimizer this is."""
    learning_rate: LearningRate = 0.01
    """Step size."""
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    """Decay of the second moment."""
    epsilon: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-8
    """Added to the root of the second moment."""


OptimizerSpec = Annotated[SgdSpec | AdaGradSpec | AdamSpec, Field(discriminator="kind")]


class AlgorithmSpec(Spec):
    """How the gradient is estimated and followed; `pgengine.label` says what the estimate is."""

    credit: Literal["total_return", "reward_to_go"] = "reward_to_go"
    """What an action is credited with: the whole return, or the rewards from its step on."""
    gamma: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    """Discount per environment step."""
    discount_weight: Literal["none", "gamma_power"] | None = None
    """Whether the reward-to-go of step t is weighted by gamma^t, as the gradient of the discounted return wants.

    null: gamma_power with reward_to_go, none with total_return (which has the discount inside already).
    """
    mean_over: Literal["trajectories", "all_steps", "own_steps"] = "trajectories"
    """What the sum over steps is divided by: K, the steps of the batch, or K times the steps of the own trajectory."""
    baseline: BaselineSpec = Field(default_factory=LeaveOneOutBaselineSpec)
    """What is subtracted from the credit against variance."""
    trajectories: Annotated[int, Field(ge=1, le=10_000)] = 16
    """K, the number of complete, independent trajectories in each update."""
    optimizer: OptimizerSpec = Field(default_factory=AdamSpec)
    """What makes a step of the gradient."""


class StopSpec(Spec):
    """When training ends: as soon as one of these is reached."""

    updates: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Updates of this run. null: 500 if no other limit is given, otherwise none."""
    env_steps: Annotated[int, Field(ge=1, le=LARGEST_INTEGER)] | None = None
    """Environment steps of training."""
    seconds: Annotated[float, Field(gt=0.0, le=31_536_000.0)] | None = None
    """Seconds of training; such a run cannot be repeated bit for bit."""
    target_return: float | None = None
    """Mean return, proven on fresh episodes: the odds that a run stops below it are at most 5%, over all its attempts.

    Left out: the reward threshold with which the environment is registered, if it has one. null: none.
    """


class EvaluationSpec(Spec):
    """How a policy is evaluated."""

    episodes: Annotated[int, Field(ge=2, le=10_000)] = 100
    """Fresh episodes for each evaluation."""
    deterministic_episodes: Annotated[int, Field(ge=0, le=10_000)] = 20
    """Other fresh episodes on which the final evaluation plays the mode, a second number; 0 for none."""


class TrainingSpec(Spec):
    """A whole training run. Everything but the environment has a default that works well."""

    version: Literal[1] = 1
    """Version of this shape, kept with what is stored."""
    environment: EnvironmentSpec
    """What to learn."""
    policy: PolicySpec = Field(default_factory=MlpPolicySpec)
    """What learns."""
    algorithm: AlgorithmSpec = Field(default_factory=AlgorithmSpec)
    """How it learns."""
    stop: StopSpec = Field(default_factory=StopSpec)
    """When it ends."""
    evaluation: EvaluationSpec = Field(default_factory=EvaluationSpec)
    """How the result is measured."""
    seed: Seed = 0
    """Every random number of the run is derived from it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where updates are computed; auto takes a GPU if there is one."""
