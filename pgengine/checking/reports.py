"""What a gradient check says, as data.

Norms are Euclidean over all parameters, in units of return per unit of parameter.
"""

from dataclasses import dataclass
from typing import Any, Literal

from pgengine.labels import Label, Objective
from pgengine.spec import AlgorithmSpec, Spec

__all__ = ["LISTED", "CheckProgress", "EstimatorReport", "GradientCheck", "ValueReport"]

LISTED = 1000
"""Parameters up to which whole vectors are part of a report."""


class EstimatorReport(Spec):
    """How one estimator compares with the exact gradient of its own objective."""

    algorithm: AlgorithmSpec
    """The estimator, all defaults written out."""
    label: Label
    """What the engine says it is."""
    trajectories: int
    """K, trajectories in a batch."""
    batches: int | None
    """Batches played; null where all were enumerated."""
    expected_return: float
    """Exact value of the estimator's own objective, at the policy's parameters."""
    gradient_norm: float
    """Norm of the exact gradient of that objective."""
    mean_norm: float
    """Norm of the mean estimate."""
    bias_norm: float
    """Norm of the mean estimate minus its target: the gradient, times the label's factor where it has one; for an
    unknown factor the best positive one."""
    relative_bias: float | None
    """That, over the norm of the target; null if the target is zero."""
    scale: float | None
    """The multiple of the gradient that comes nearest to the mean estimate; null if the gradient is zero."""
    angle_degrees: float | None
    """Angle between the mean estimate and the gradient; null if one of them is zero."""
    variance_trace: float
    """Trace of the covariance of the estimate of one batch."""
    signal_to_noise: float | None
    """Squared length of the mean estimate along the gradient over the trace of the variance, for one batch; null if
    there is no variance."""
    trajectories_for_unit_signal_to_noise: float | None
    """Trajectories in a batch whose signal-to-noise ratio would be 1, as K times trace over squared signal; null
    without a signal."""
    standard_error: float | None
    """Root of the expected squared error of the mean estimate; null where all batches were enumerated."""
    statistic: float | None
    """Largest departure over all parameters, in standard errors, corrected for skewness; null if enumerated."""
    threshold: float | None
    """What an unbiased estimator exceeds with about the stated probability, over all parameters; null if enumerated."""
    worst_parameter: str | None
    """The parameter of that departure; null if enumerated or none could be told."""
    smallest_detectable_bias: float | None
    """A bias of this size in any single parameter would have been seen with 95% power; null if enumerated, or if
    nothing can be told of some parameter."""
    verdict: Literal["agrees", "differs", "bias_seen", "no_bias_seen"]
    """agrees, differs: enumerated, to 1e-9. bias_seen, no_bias_seen: tested, at the stated probability of a false
    alarm."""
    as_labelled: bool
    """Whether nothing contradicts the label. A label `biased` denies nothing and is never contradicted."""
    mean: list[float] | None
    """The mean estimate, flat; null for more than 1000 parameters."""


class ValueReport(Spec):
    """What a policy is worth exactly, and what could be had, for the objective of the first estimator."""

    v: list[Any] | None
    """[H][S], or [S] without a horizon: expected return from a state (at a time) on, discounted from there. null for
    an LQR, and for tables of more than 100,000 numbers."""
    q: list[Any] | None
    """[H][S][A] or [S][A]: the same if the given action is taken first; null as `v`."""
    d: list[Any] | None
    """[H][S] or [S]: discounted probability of acting in the state (at a time), not normalised; null as `v`."""
    mass: float | None
    """Sum of d: the expected discounted number of steps, which the printed policy gradient theorem leaves out."""
    optimum_without_limit: float | None
    """The best return where the horizon is left out; null for an LQR and where it is not finite."""
    optimum_with_clock: float | None
    """The best return of policies that see the time, up to the horizon; null without a horizon."""
    best_stationary: float | None
    """The best return found of policies of one distribution for each observation; of an LQR, of linear policies with
    the deviation that this one has."""


class GradientCheck(Spec):
    """Estimators compared with the exact gradient, side by side."""

    mode: Literal["enumerate", "sample"]
    """Over all batches, or over batches that were played."""
    objective: Objective
    """What the exact gradient below is a gradient of: the objective of the first estimator. Each estimator is compared
    with its own."""
    parameters: int
    """Numbers in the policy's parameters."""
    expected_return: float
    """Exact value of the objective."""
    gradient_norm: float
    """Norm of its exact gradient."""
    gradient: list[float] | None
    """The exact gradient, flat in the order of sorted parameter names; null for more than 1000 parameters."""
    parameter_names: list[str] | None
    """A name such as `theta[0,1]` for each of its numbers; null for more than 1000."""
    estimators: list[EstimatorReport]
    """In the order of the request."""
    values: ValueReport | None = None
    """Exact values and optima, if they were asked for."""
    seconds: float
    """Time it took."""


@dataclass(frozen=True)
class CheckProgress:
    """How far a check has come.

    Attributes:
        fraction: Share of the work done, from 0 to 1.
        result: The whole report, on the last one.
    """

    fraction: float
    result: GradientCheck | None
