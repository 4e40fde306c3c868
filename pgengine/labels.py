"""What an estimate is: exact, scaled, or biased, and for which objective.

A label speaks of the expected estimate at fixed parameters given the past, never of the optimizer's step (Adam hides
any constant factor). It is derived from the algorithm and from facts of the environment, and holds for every
environment of which these facts are true; the tests derive the same by enumerating all batches of small MDPs.

    algorithm, facts ─► findings (each: a factor, an unknown factor, a bias, or a note) ─► kind, factor, reasons
"""

import math
from dataclasses import dataclass
from typing import Literal

from pgengine.environments.episodes import EnvironmentFacts
from pgengine.resolution import as_played
from pgengine.spaces import MultiBinarySpace, MultiDiscreteSpace, SpaceSpec
from pgengine.spec import (
    AlgorithmSpec,
    BatchMeanBaselineSpec,
    LeaveOneOutBaselineSpec,
    LinearValueBaselineSpec,
    MixtureBehaviourSpec,
    MovingAverageBaselineSpec,
    NeuralValueBaselineSpec,
    OlderBehaviourSpec,
    Spec,
    TrainingSpec,
)

__all__ = ["Label", "LabelReason", "Objective", "ReasonCode", "label", "own_share"]

Kind = Literal["exact", "scaled", "scaled_unknown", "biased"]
ReasonCode = Literal[
    "discount_dropped",
    "mean_over_all_steps",
    "mean_over_own_steps",
    "fixed_length_factor",
    "baseline_includes_own",
    "baseline_knows_own_actions",
    "entropy_bonus",
    "entropy_not_scaled",
    "standardised_by_others",
    "standardised_by_batch",
    "ratios_clipped",
    "ratios_self_normalised",
    "batch_reused",
    "parameters_move_within_episode",
    "bootstrapped",
    "given_the_past",
    "observations_normalised",
    "time_limit_not_observed",
]


class Objective(Spec):
    """What the gradient is a gradient of."""

    gamma: float
    """Discount per environment step."""
    discount: Literal["weight", "termination"] = "weight"
    """How gamma discounts: by weights, or by ending episodes; the expected return is the same."""
    max_episode_steps: int
    """Horizon: the episode limit in environment steps. Where `limit_from` is none, only the most that is played; the
    objective has no limit, and an episode that has not ended by then fails."""
    limit_from: Literal["id", "declared", "horizon", "none"]
    """Who cuts episodes at the horizon; none: nobody does."""
    entropy: float = 0.0
    """Units of reward for each nat of entropy of a step, discounted like a reward."""
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

    kind: Kind
    """exact; scaled by a known factor; scaled by an unknown factor that is never negative, and zero only where the
    reason says so; biased."""
    factor: float | None
    """The known factor: 1 if exact, null if unknown or biased."""
    objective: Objective
    """What the gradient is a gradient of."""
    reasons: list[LabelReason]
    """Why, and what else is worth knowing."""


@dataclass(frozen=True)
class _Finding:
    """One thing that a choice does to the expected estimate."""

    code: ReasonCode
    message: str
    effect: Literal["scaled", "scaled_unknown", "biased", "note"] = "biased"
    factor: float = 1.0


def label(spec: TrainingSpec, facts: EnvironmentFacts) -> Label:
    """The label of a resolved training spec.

    Args:
        spec: As `pgengine.resolve` gives it.
        facts: What is known of the environment.
    """
    algorithm, played = spec.algorithm, as_played(facts, spec.algorithm)
    findings = [
        *_discount(algorithm, played),
        *_mean(algorithm, played),
        *_baseline(algorithm, played),
        *_entropy(algorithm, played),
        *_standardised(algorithm),
        *_ratios(algorithm, played),
        *_schedule(algorithm, played),
        *_bootstrap(algorithm, played),
        *_notes(spec, played),
    ]
    effects = {finding.effect for finding in findings}
    factor = math.prod(finding.factor for finding in findings)
    kind: Kind = "exact" if factor == 1.0 else "scaled"
    if "scaled_unknown" in effects:
        kind = "scaled_unknown"
    if "biased" in effects:
        kind = "biased"
    return Label(
        kind=kind,
        factor=factor if kind in ("exact", "scaled") else None,
        objective=_objective(algorithm, facts),
        reasons=[LabelReason(code=finding.code, message=finding.message) for finding in findings],
    )


# --- the objective ----------------------------------------------------------------------------------------------------

_WHO = {"id": "the registered limit", "declared": "the declared max_episode_steps", "horizon": "the horizon"}


def _objective(algorithm: AlgorithmSpec, facts: EnvironmentFacts) -> Objective:
    c = algorithm.entropy_coefficient
    return Objective(
        gamma=algorithm.gamma,
        discount=algorithm.discount,
        max_episode_steps=facts.max_episode_steps,
        limit_from=facts.limit_from,
        entropy=c,
        text=f"expected {_what(algorithm)}{f' plus {c:g} for each nat of entropy' if c else ''} {_how_long(facts)}",
    )


def _what(algorithm: AlgorithmSpec) -> str:
    if algorithm.discount == "termination":
        return f"return of episodes that end with probability {1.0 - algorithm.gamma:g} after each step, undiscounted,"
    return "undiscounted return" if algorithm.gamma == 1.0 else f"return discounted by {algorithm.gamma:g} a step"


def _how_long(facts: EnvironmentFacts) -> str:
    if facts.limit_from == "none":
        return "until the episode ends by itself"
    return f"over at most {facts.max_episode_steps} steps ({_WHO[facts.limit_from]} is part of the task)"


# --- findings ---------------------------------------------------------------------------------------------------------


def _one_step(played: EnvironmentFacts) -> bool:
    return played.fixed_steps == 1 or played.max_episode_steps == 1


def _first_step_alone(algorithm: AlgorithmSpec, played: EnvironmentFacts) -> bool:
    """Whether every score but that of the first step has weight zero, or there is no other."""
    return _one_step(played) or (algorithm.credit_gamma == 0.0 and algorithm.discount_weight == "gamma_power")


def _discount(algorithm: AlgorithmSpec, played: EnvironmentFacts) -> list[_Finding]:
    dropped = algorithm.credit == "reward_to_go" and algorithm.discount_weight != "gamma_power"
    if not dropped or algorithm.credit_gamma == 1.0 or _one_step(played):
        return []
    message = (
        "reward-to-go with gamma < 1 but without gamma^t is the gradient of no objective; "
        "discount_weight gamma_power makes it exact"
    )
    return [_Finding("discount_dropped", message)]


def _mean(algorithm: AlgorithmSpec, played: EnvironmentFacts) -> list[_Finding]:
    if algorithm.mean_over == "trajectories" or _one_step(played):
        return []
    if played.fixed_steps is not None:
        T = played.fixed_steps
        message = f"all episodes take {T} steps: a mean over steps divides the gradient by {T}"
        return [_Finding("fixed_length_factor", message, "scaled", 1.0 / T)]
    if algorithm.mean_over == "all_steps" and algorithm.trajectories > 1:
        message = (
            "the number of steps of the batch varies with what happened in it; "
            "the bias vanishes with the number of trajectories, up to a constant factor"
        )
        return [_Finding("mean_over_all_steps", message)]
    message = (
        "each trajectory is divided by its own length, which depends on what happened in it, however many there are"
    )
    return [_Finding("mean_over_own_steps", message)]


def _baseline(algorithm: AlgorithmSpec, played: EnvironmentFacts) -> list[_Finding]:
    baseline, K = algorithm.baseline, algorithm.trajectories
    if isinstance(baseline, LinearValueBaselineSpec | NeuralValueBaselineSpec) and baseline.fit == "before":
        message = "the value was fitted to this batch before it is subtracted, so it knows the own actions"
        return [_Finding("baseline_knows_own_actions", message)]
    share = own_share(algorithm)
    if share == 0.0:
        return []
    if _off_policy(algorithm):
        message = "the baseline has the own trajectory in it, ratio and all, and is multiplied by that ratio again"
        return [_Finding("baseline_knows_own_actions", message)]
    if isinstance(baseline, BatchMeanBaselineSpec) and not _own_part_is_credit(baseline.over, algorithm, played):
        message = (
            f"the mean of the batch over {baseline.over} has the own trajectory in it in a way that is no multiple of "
            "its credit; leave_one_out is exact"
        )
        return [_Finding("baseline_knows_own_actions", message)]
    message = (
        f"{share:.6g} of the baseline is the own credit, so what is left of the gradient is {1.0 - share:.6g}; "
        f"with more trajectories than {K} it is more"
    )
    found = [_Finding("baseline_includes_own", message, "scaled", 1.0 - share)]
    if algorithm.entropy is not None:
        message = f"the baseline scales the credit by {1.0 - share:.6g}, but not the gradient of each step's entropy"
        found.append(_Finding("entropy_not_scaled", message))
    return found


def own_share(algorithm: AlgorithmSpec) -> float:
    """How much of a baseline within the batch is the own trajectory's value; depends on how many there are."""
    if isinstance(algorithm.baseline, BatchMeanBaselineSpec):
        return 1.0 / algorithm.trajectories
    if isinstance(algorithm.baseline, MovingAverageBaselineSpec) and algorithm.baseline.includes_batch:
        return (1.0 - algorithm.baseline.decay) / algorithm.trajectories
    return 0.0


def _own_part_is_credit(over: str, algorithm: AlgorithmSpec, played: EnvironmentFacts) -> bool:
    """Whether the own trajectory's part in the batch mean acts, on average, as 1 / K of the own credit."""
    if over == "all_steps":
        return _one_step(played) or (algorithm.credit == "total_return" and played.fixed_steps is not None)
    if algorithm.credit == "total_return" or over == "time_step" or _first_step_alone(algorithm, played):
        return True
    if over == "alive":  # divided by how many are alive, which is always K
        return played.fixed_steps is not None
    return algorithm.credit_gamma == 1.0  # total: what was paid before the step has no part, but is discounted less


def _entropy(algorithm: AlgorithmSpec, played: EnvironmentFacts) -> list[_Finding]:
    if algorithm.entropy is None or algorithm.entropy.as_ == "objective":
        return []
    # where the first step alone counts, no later entropy is there to be left out
    if _one_step(played) or algorithm.credit_gamma == 0.0:
        return []
    message = (
        "a bonus moves each step's own entropy, but not what an action does to the entropies after it; "
        "as an objective it is exact"
    )
    return [_Finding("entropy_bonus", message)]


def _standardised(algorithm: AlgorithmSpec) -> list[_Finding]:
    if algorithm.standardise == "leave_one_out":
        message = (
            "weights are divided by the deviation of the other trajectories' returns, and are zero where those are "
            "all alike: a factor that is not negative, and zero where the others' returns never differ"
        )
        return [_Finding("standardised_by_others", message, "scaled_unknown")]
    if algorithm.standardise == "batch":
        message = "weights are shifted and divided by mean and deviation of a batch that has the own actions in it"
        return [_Finding("standardised_by_batch", message)]
    return []


def _off_policy(algorithm: AlgorithmSpec) -> bool:
    """Whether ratios may differ from 1."""
    behaviour = algorithm.importance.behaviour
    refreshed_each_time = isinstance(behaviour, OlderBehaviourSpec) and behaviour.refresh_every == 1
    return algorithm.importance.kind != "none" and behaviour.kind != "current" and not refreshed_each_time


def _ratios(algorithm: AlgorithmSpec, played: EnvironmentFacts) -> list[_Finding]:
    if not _off_policy(algorithm):
        return []
    found = []
    if _clip_binds(algorithm, played):
        found.append(_Finding("ratios_clipped", "large ratios are cut: what the acting policy rarely does is lost"))
    if algorithm.importance.self_normalise and not _normalising_cancels(algorithm):
        message = "ratios are divided by their mean, which has the own ratio in it; less biased with more trajectories"
        found.append(_Finding("ratios_self_normalised", message))
    return found


def _normalising_cancels(algorithm: AlgorithmSpec) -> bool:
    """Whether weights are divided by something that has the mean of the ratios as a factor, too.

    The deviation of the others' returns has it, since they are multiplied by normalised ratios. A leave-one-out
    baseline has it once more.
    """
    return algorithm.standardise == "leave_one_out" and not isinstance(algorithm.baseline, LeaveOneOutBaselineSpec)


def _clip_binds(algorithm: AlgorithmSpec, played: EnvironmentFacts) -> bool:
    importance = algorithm.importance
    if importance.clip is None:
        return False
    if not isinstance(importance.behaviour, MixtureBehaviourSpec):
        return True
    steps = played.fixed_steps or played.max_episode_steps
    largest = -math.log1p(-importance.behaviour.epsilon) * steps * _components(played.action_space)
    return math.log(importance.clip) < largest


def _components(space: SpaceSpec) -> int:
    """How many actions are drawn in each step."""
    if isinstance(space, MultiDiscreteSpace):
        return len(space.nvec)
    return space.n if isinstance(space, MultiBinarySpace) else 1


def _schedule(algorithm: AlgorithmSpec, played: EnvironmentFacts) -> list[_Finding]:
    found = []
    if algorithm.steps_per_batch > 1:
        message = (
            f"{algorithm.steps_per_batch} updates with each batch: from the second on the parameters depend on it, "
            "and no ratio makes up for that; the first one is not touched by this"
        )
        found.append(_Finding("batch_reused", message))
    if algorithm.within_episode == "moving" and not _first_step_alone(algorithm, played):
        message = (
            "the parameters move after each step of an episode that was played at those before; "
            "the bias is of the order of the learning rate"
        )
        found.append(_Finding("parameters_move_within_episode", message))
    return found


def _bootstrap(algorithm: AlgorithmSpec, played: EnvironmentFacts) -> list[_Finding]:
    if algorithm.horizon == "episode" or not played.limit_cuts or algorithm.gamma == 0.0:
        return []
    message = "what a cut episode is worth beyond the cut is guessed by the value baseline, as right or wrong as it is"
    return [_Finding("bootstrapped", message)]


def _notes(spec: TrainingSpec, played: EnvironmentFacts) -> list[_Finding]:
    algorithm, found = spec.algorithm, []
    baseline = algorithm.baseline
    learned = isinstance(baseline, MovingAverageBaselineSpec) or (
        isinstance(baseline, LinearValueBaselineSpec | NeuralValueBaselineSpec) and baseline.fit == "after"
    )
    if learned or (_off_policy(algorithm) and isinstance(algorithm.importance.behaviour, OlderBehaviourSpec)):
        who = "the baseline" if learned else "the acting policy"
        found.append(_Finding("given_the_past", f"{who} comes from earlier batches, which are held fixed", "note"))
    if spec.policy.normalise_observations:
        message = "observations are normalised by figures that are part of the policy and move between updates alone"
        found.append(_Finding("observations_normalised", message, "note"))
    if played.limit_cuts:
        message = (
            f"episodes are cut after {played.max_episode_steps} steps and the policy does not see the time: "
            "exact for this class of policies and this horizon"
        )
        found.append(_Finding("time_limit_not_observed", message, "note"))
    return found
