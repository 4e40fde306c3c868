"""What an estimate is: exact, scaled, or biased, and for which objective.

A label speaks of the expected estimate at fixed parameters given the past, never of the optimizer's step (Adam hides
any constant factor). It is derived from the algorithm and from facts of the environment; the tests derive the same by
enumerating all batches of small MDPs.
"""

from dataclasses import dataclass
from typing import Literal

from pgengine.environments.episodes import EnvironmentFacts
from pgengine.spec import AlgorithmSpec, Spec, TrainingSpec

__all__ = ["Label", "LabelReason", "Objective", "label"]

ReasonCode = Literal[
    "discount_dropped",
    "mean_over_all_steps",
    "mean_over_own_steps",
    "fixed_length_factor",
    "time_limit_not_observed",
]


class Objective(Spec):
    """What the gradient is a gradient of."""

    gamma: float
    """Discount per environment step."""
    max_episode_steps: int
    """Horizon: the episode limit in environment steps."""
    limit_from: Literal["id", "declared", "horizon"]
    """Who cuts episodes at the horizon."""
    text: str
    """The same for people."""


class LabelReason(Spec):
    """Why a label is what it is."""

    code: ReasonCode
    """Closed code."""
    message: str
    """The same for people."""


class Label(Spec):
    """What the expected estimate is, compared with the gradient of the objective."""

    kind: Literal["exact", "scaled", "scaled_unknown", "biased"]
    """exact; scaled by a known factor; scaled by an unknown positive factor; biased."""
    factor: float | None
    """The known factor: 1 if exact, null if unknown or biased."""
    objective: Objective
    """What the gradient is a gradient of."""
    reasons: list[LabelReason]
    """Why, and what else is worth knowing."""


@dataclass(frozen=True)
class _Finding:
    factor: float | None  # None: biased
    reason: LabelReason


def label(spec: TrainingSpec, facts: EnvironmentFacts) -> Label:
    """The label of a resolved training spec.

    Args:
        spec: As `pgengine.resolve` gives it.
        facts: What is known of the environment.
    """
    findings = [finding for finding in (_discount(spec.algorithm, facts), _mean(spec.algorithm, facts)) if finding]
    reasons = [finding.reason for finding in findings] + ([_time_limit(facts)] if facts.limit_cuts else [])
    biased = any(finding.factor is None for finding in findings)
    factor = 1.0
    for finding in findings:
        factor *= finding.factor or 1.0
    kind: Literal["exact", "scaled", "biased"] = "biased" if biased else "exact" if factor == 1.0 else "scaled"
    return Label(
        kind=kind, factor=None if biased else factor, objective=_objective(spec.algorithm, facts), reasons=reasons
    )


def _objective(algorithm: AlgorithmSpec, facts: EnvironmentFacts) -> Objective:
    T = facts.max_episode_steps
    who = {"id": "the registered limit", "declared": "the declared max_episode_steps", "horizon": "the horizon"}
    discounted = "undiscounted return" if algorithm.gamma == 1.0 else f"return discounted by {algorithm.gamma:g} a step"
    return Objective(
        gamma=algorithm.gamma,
        max_episode_steps=T,
        limit_from=facts.limit_from,
        text=f"expected {discounted} over at most {T} steps ({who[facts.limit_from]} is part of the task)",
    )


def _discount(algorithm: AlgorithmSpec, facts: EnvironmentFacts) -> _Finding | None:
    dropped = algorithm.credit == "reward_to_go" and algorithm.discount_weight == "none" and algorithm.gamma < 1.0
    if not dropped or _one_step(facts):
        return None
    return _Finding(
        None,
        LabelReason(
            code="discount_dropped",
            message="reward-to-go with gamma < 1 but without gamma^t is the gradient of no objective; "
            "discount_weight gamma_power makes it exact",
        ),
    )


def _mean(algorithm: AlgorithmSpec, facts: EnvironmentFacts) -> _Finding | None:
    if algorithm.mean_over == "trajectories" or _one_step(facts):
        return None
    if facts.fixed_steps is not None:
        T = facts.fixed_steps
        message = f"all episodes take {T} steps: a mean over steps divides the gradient by {T}"
        return _Finding(1.0 / T, LabelReason(code="fixed_length_factor", message=message))
    if algorithm.mean_over == "all_steps" and algorithm.trajectories > 1:
        message = (
            "the number of steps of the batch varies with what happened in it; "
            "the bias vanishes with the number of trajectories, up to a constant factor"
        )
        return _Finding(None, LabelReason(code="mean_over_all_steps", message=message))
    message = (
        "each trajectory is divided by its own length, which depends on what happened in it, however many there are"
    )
    return _Finding(None, LabelReason(code="mean_over_own_steps", message=message))


def _one_step(facts: EnvironmentFacts) -> bool:
    return facts.fixed_steps == 1 or facts.max_episode_steps == 1


def _time_limit(facts: EnvironmentFacts) -> LabelReason:
    return LabelReason(
        code="time_limit_not_observed",
        message=f"episodes are cut after {facts.max_episode_steps} steps and the policy does not see the time: "
        "exact for this class of policies and this horizon",
    )
