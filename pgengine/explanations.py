"""What there is to say about one update of a training, as data: it loads no torch, so a server can describe it."""

from typing import Any, Literal

from pydantic import Field

from pgengine.exactness import ExactAbsence
from pgengine.labels import Label
from pgengine.spec import AlgorithmSpec, Spec

__all__ = ["ExplainedEpisode", "ExplainedStep", "Explanation", "MadeStep"]


class ExplainedStep(Spec):
    """One time step of an episode."""

    time: int
    """t, from 0."""
    observation: Any
    """What the policy saw, before any normaliser."""
    action: Any
    """What the environment got."""
    sample: Any
    """What the policy drew: the index of an action, or a point that is then clipped or squashed."""
    log_prob: float
    """Logarithm of its probability or density under the policy that acted."""
    reward: float
    """r_t, in the environment's own unit."""
    return_to_go: float
    """G_t: the rewards from here on, discounted as the algorithm says."""
    credit: float
    """What the action is credited with: the return or the return to go, with what the algorithm adds to it (entropy,
    importance ratios, a bootstrap)."""
    baseline: float
    """What is subtracted from it, the ratio included."""
    ratio: float | None
    """Importance ratio that is in credit and baseline; null without importance weighting."""
    weight: float
    """What the score is multiplied by: credit minus baseline, discounted, standardised and averaged."""
    score_norm: float
    """Norm of grad log pi of the sample at the observation."""
    entropy_weight: float | None
    """What the gradient of the entropy is multiplied by; null if the algorithm gives nothing for entropy."""
    entropy_contribution_norm: float | None
    """Norm of that part of the contribution."""
    contribution_norm: float
    """Norm of what the step adds to the estimate."""
    contribution: list[float] | None
    """The same as a vector, flat in the order of the parameters' names; null for more than 64 parameters."""


class ExplainedEpisode(Spec):
    """One trajectory of the batch."""

    number: int
    """Its place in the batch, from 0."""
    total_return: float
    """Sum of its rewards, undiscounted."""
    length: int
    """Its number of steps, whether they are all shown or not."""
    terminated: bool
    """Whether the task ended."""
    truncated: bool
    """Whether the limit cut it."""
    contribution_norm: float
    """Norm of the sum of its steps' contributions."""
    steps: list[ExplainedStep]
    """Its steps, from the first on."""


class MadeStep(Spec):
    """The step that the optimizer made."""

    learning_rate: float
    """Step size at this update."""
    norm: float
    """Norm of parameters after minus parameters before."""
    parameters: dict[str, Any] | None
    """That difference by parameter name, nested lists; null for more than 1000 parameters."""


class Explanation(Spec):
    """An update and all that it was made from."""

    update: int
    """Number of the policy's update; 1 is the first that it ever had."""
    policy_updates: int = Field(ge=0)
    """Updates that the policy had had before this one."""
    label: Label
    """What the estimate is."""
    algorithm: AlgorithmSpec
    """How it was made, all defaults written out."""
    episodes_total: int
    """K, trajectories in the batch."""
    steps_total: int
    """Time steps in the batch."""
    episodes: list[ExplainedEpisode]
    """Those that were asked for."""
    estimate_norm: float
    """Norm of the estimate of the gradient, made in one piece."""
    estimate: dict[str, Any] | None
    """The estimate by parameter name, nested lists; null for more than 1000 parameters."""
    sum_of_contributions_norm: float
    """Norm of the sum of the contributions of all steps of the batch: the estimate again, made step by step."""
    step: MadeStep
    """What the optimizer made of it."""
    unusable: Literal["effective_sample_size", "ratio_variance"] | None = None
    """Why the batch was not learned from, so that the step is zero; null if it was."""
    expected_return: float | None
    """Exact value of the objective before the step, where it is known and fits in a float: finite MDPs and LQR."""
    exact_gradient_norm: float | None
    """Norm of its exact gradient there."""
    exact_absent: ExactAbsence | None = None
    """Why both are missing; null if they are not."""
