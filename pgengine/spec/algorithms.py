"""How the gradient is estimated and followed; `pgengine.label` says what an estimate is."""

from typing import Annotated, Literal

from pydantic import Field

from pgengine.spec.base import Spec

__all__ = [
    "AdaGradSpec",
    "AdamSpec",
    "AlgorithmSpec",
    "BaselineSpec",
    "BatchMeanBaselineSpec",
    "BehaviourSpec",
    "ConstantBaselineSpec",
    "CurrentBehaviourSpec",
    "EntropySpec",
    "ImportanceSpec",
    "LeaveOneOutBaselineSpec",
    "LinearValueBaselineSpec",
    "MixtureBehaviourSpec",
    "MovingAverageBaselineSpec",
    "NeuralValueBaselineSpec",
    "NoBaselineSpec",
    "OlderBehaviourSpec",
    "OptimizerSpec",
    "PolicyBehaviourSpec",
    "ScheduleSpec",
    "SgdSpec",
]


# --- baselines --------------------------------------------------------------------------------------------------------


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


class MovingAverageBaselineSpec(Spec):
    """Exponential average of the mean credit of earlier batches, one number for each time step.

    Under total return one number for all of them. It begins at 0.
    """

    kind: Literal["moving_average"] = "moving_average"
    """Which baseline this is."""
    decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Share of the old average that each batch leaves."""
    includes_batch: bool = False
    """Whether the average that is subtracted has the present batch in it already."""


class LeaveOneOutBaselineSpec(Spec):
    """Mean over the other trajectories of the batch, of which the own actions know nothing. Needs at least two."""

    kind: Literal["leave_one_out"] = "leave_one_out"
    """Which baseline this is."""
    over: Literal["time_step", "alive", "shrunk", "total", "all_steps"] = "time_step"
    """Mean of what: the credits at the same time step, an ended trajectory counting zero; of those still alive alone;
    their sum over (alive + 2); the total returns; the credits of all their steps. Under total return there is one
    credit for each trajectory, and `time_step`, `alive` and `total` are the same."""


class BatchMeanBaselineSpec(Spec):
    """Mean over the batch with the own trajectory in it, as many libraries do; the label says what that costs."""

    kind: Literal["batch_mean"] = "batch_mean"
    """Which baseline this is."""
    over: Literal["time_step", "alive", "total", "all_steps"] = "total"
    """Mean of what: the credits at the same time step, an ended trajectory counting zero; of those still alive alone;
    the total returns; the credits of all steps."""


class LinearValueBaselineSpec(Spec):
    """A value that is linear in the observation, its squares and the time, fitted to the credits by least squares."""

    kind: Literal["linear_value"] = "linear_value"
    """Which baseline this is."""
    fit: Literal["after", "before"] = "after"
    """Whether it is fitted to a batch after the gradient was taken, or before, when it knows the own actions."""
    ridge: Annotated[float, Field(ge=1e-9, le=1e6)] = 1e-3
    """Weight of the squared coefficients against the mean squared error."""


class NeuralValueBaselineSpec(Spec):
    """A value network of its own, fitted to the credits by Adam."""

    kind: Literal["neural_value"] = "neural_value"
    """Which baseline this is."""
    hidden: Annotated[list[Annotated[int, Field(ge=1, le=1024)]], Field(min_length=1, max_length=8)] = Field(
        default_factory=lambda: [64, 64]
    )
    """Widths of its hidden layers, with tanh."""
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-2
    """Step size of its own optimizer."""
    steps: Annotated[int, Field(ge=1, le=1000)] = 10
    """Steps on each batch."""
    fit: Literal["after", "before"] = "after"
    """Whether it is fitted to a batch after the gradient was taken, or before, when it knows the own actions."""


BaselineSpec = Annotated[
    NoBaselineSpec
    | ConstantBaselineSpec
    | MovingAverageBaselineSpec
    | LeaveOneOutBaselineSpec
    | BatchMeanBaselineSpec
    | LinearValueBaselineSpec
    | NeuralValueBaselineSpec,
    Field(discriminator="kind"),
]


# --- importance -------------------------------------------------------------------------------------------------------


class CurrentBehaviourSpec(Spec):
    """The policy that learns acts itself."""

    kind: Literal["current"] = "current"
    """The policy that learns acts itself."""


class OlderBehaviourSpec(Spec):
    """The policy as it was some updates ago acts; it is brought up to date every so many updates."""

    kind: Literal["older"] = "older"
    """An older copy of the policy that learns acts."""
    refresh_every: Annotated[int, Field(ge=1, le=10_000)] = 4
    """Updates after which the acting policy is the learning one again."""


class MixtureBehaviourSpec(Spec):
    """The policy acts, mixed with the uniform distribution over a finite set of actions: the ratio is bounded."""

    kind: Literal["mixture"] = "mixture"
    """The policy that learns acts, mixed with uniformly random actions."""
    epsilon: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the uniform distribution; the ratio of one step is at most 1 / (1 - epsilon)."""


class PolicyBehaviourSpec(Spec):
    """Another policy acts, the same one all the time."""

    kind: Literal["policy"] = "policy"
    """Another policy acts, which does not learn."""
    id: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """On a server the id of a policy, whose latest checkpoint acts, or of a checkpoint. In the engine it is given to
    `train(behaviour=…)`."""


BehaviourSpec = Annotated[
    CurrentBehaviourSpec | OlderBehaviourSpec | MixtureBehaviourSpec | PolicyBehaviourSpec,
    Field(discriminator="kind"),
]


class ImportanceSpec(Spec):
    """How trajectories of another policy are weighted.

    Source: Sun, Policy Gradient, computing the gradient using importance weighting.
    """

    kind: Literal["none", "trajectory", "per_decision"] = "none"
    """none; one ratio for a trajectory; or the ratio up to a reward's own step, which is exact too and varies less."""
    behaviour: BehaviourSpec = Field(default_factory=CurrentBehaviourSpec)
    """The behaviour policy: the one that acts in training."""
    clip: Annotated[float, Field(ge=1.0, le=1e12)] | None = None
    """Largest ratio; larger ones are cut to it. Biased."""
    self_normalise: bool = False
    """Whether ratios are divided by their mean over the batch. Biased, less with more trajectories."""
    minimum_effective_sample_size: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Share of the trajectories; a batch below it is not learned from, and the run stops. It is never drawn again."""


# --- entropy ----------------------------------------------------------------------------------------------------------


class EntropySpec(Spec):
    """Reward for the entropy of the action distribution."""

    coefficient: Annotated[float, Field(gt=0.0, le=1e6)]
    """Units of reward for each nat and step."""
    as_: Annotated[Literal["objective", "bonus"], Field(alias="as")] = "objective"
    """objective: the entropy of all steps, discounted, is part of what is maximised. bonus: only the gradient of each
    step's own entropy is added."""


# --- optimizers -------------------------------------------------------------------------------------------------------


class ScheduleSpec(Spec):
    """How the step size falls from update to update, counted from the beginning of the run."""

    kind: Literal["constant", "inverse_time", "inverse_root"] = "constant"
    """The learning rate is multiplied by 1, by 1 / (1 + u / scale), or by 1 / sqrt(1 + u / scale) before update u + 1.
    With inverse_time the steps sum to infinity and their squares do not."""
    scale: Annotated[float, Field(gt=0.0, le=1e9)] = 100.0
    """Updates after which 1 + u / scale is 2."""


LearningRate = Annotated[float, Field(gt=0.0, le=1e6)]


class SgdSpec(Spec):
    """theta + learning_rate * gradient. Source: Lin, update rule; Sun, SG ascent."""

    kind: Literal["sgd"] = "sgd"
    """Which optimizer this is."""
    learning_rate: LearningRate = 0.01
    """Step size."""
    schedule: ScheduleSpec = Field(default_factory=ScheduleSpec)
    """How it falls."""


class AdaGradSpec(Spec):
    """AdaGrad as in torch.optim.Adagrad. Source: Sun, off-the-shelf optimizers."""

    kind: Literal["adagrad"] = "adagrad"
    """Which optimizer this is."""
    learning_rate: LearningRate = 0.01
    """Step size."""
    schedule: ScheduleSpec = Field(default_factory=ScheduleSpec)
    """How it falls."""


class AdamSpec(Spec):
    """Adam as in torch.optim.Adam. Source: Sun, off-the-shelf optimizers."""

    kind: Literal["adam"] = "adam"
    """Which optimizer this is."""
    learning_rate: LearningRate = 0.01
    """Step size."""
    schedule: ScheduleSpec = Field(default_factory=ScheduleSpec)
    """How it falls."""
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    """Decay of the second moment."""
    epsilon: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-8
    """Added to the root of the second moment."""


OptimizerSpec = Annotated[SgdSpec | AdaGradSpec | AdamSpec, Field(discriminator="kind")]


# --- the whole --------------------------------------------------------------------------------------------------------


class AlgorithmSpec(Spec):
    """How the gradient is estimated and followed; `pgengine.label` says what the estimate is."""

    credit: Literal["total_return", "reward_to_go"] = "reward_to_go"
    """Credit of an action: the return of the whole episode, or the rewards from its step on (reward-to-go)."""
    gamma: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    """Discount per environment step."""
    discount: Literal["weight", "termination"] = "weight"
    """How gamma discounts: rewards are weighted by its powers, or every step ends the episode with probability
    1 - gamma and rewards count in full, which has the same expected return and needs no horizon."""
    discount_weight: Literal["none", "gamma_power"] | None = None
    """Whether the reward-to-go of step t is weighted by gamma^t, as the gradient of the discounted return wants.

    null: gamma_power with reward_to_go, none with total_return (which has the discount inside already).
    """
    mean_over: Literal["trajectories", "all_steps", "own_steps"] = "trajectories"
    """Divisor of the sum over steps: K, the steps of the batch, or K times the steps of the own trajectory."""
    baseline: BaselineSpec = Field(default_factory=LeaveOneOutBaselineSpec)
    """Baseline: subtracted from the credit to lower the variance of the estimate."""
    horizon: Literal["episode", "bootstrap"] = "episode"
    """Value of a cut episode beyond the cut: nothing, since the limit is part of the task, or what the value
    baseline says of its last observation."""
    entropy: EntropySpec | None = None
    """Reward for the entropy of the policy; null for none."""
    standardise: Literal["none", "leave_one_out", "batch"] = "none"
    """Whether weights are divided by the deviation of the other trajectories' returns, or brought to mean 0 and
    deviation 1 over all steps of the batch."""
    importance: ImportanceSpec = Field(default_factory=ImportanceSpec)
    """The behaviour policy, and how its trajectories are weighted if it is not the policy that learns."""
    within_episode: Literal["frozen", "moving"] = "frozen"
    """Whether all steps of a batch are taken at the same parameters, or the parameters move after each step of a single
    episode, as PG_v1 and REINFORCE are printed."""
    steps_per_batch: Annotated[int, Field(ge=1, le=1000)] = 1
    """Updates that are made with each batch."""
    trajectories: Annotated[int, Field(ge=1, le=10_000)] = 16
    """K, the number of complete, independent trajectories in each batch."""
    optimizer: OptimizerSpec = Field(default_factory=AdamSpec)
    """Optimizer: makes a step of the estimated gradient."""

    @property
    def survival(self) -> float:
        """Probability that an episode goes on after a step, beside what the environment says."""
        return self.gamma if self.discount == "termination" else 1.0

    @property
    def entropy_coefficient(self) -> float:
        """Units of reward for each nat of entropy in the objective; a bonus is held against the same objective."""
        return 0.0 if self.entropy is None else self.entropy.coefficient

    @property
    def credit_gamma(self) -> float:
        """Discount of the rewards in the credit: 1 if episodes are discounted by ending."""
        return 1.0 if self.discount == "termination" else self.gamma
