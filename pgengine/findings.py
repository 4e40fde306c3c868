"""What a run that has ended should be told of: it learned nothing, or less than it seems, and what to try.

A `Watch` takes the metrics of each update in and keeps a few sums, which belong to the state of a run: a run that was
stopped anywhere and resumed finds the same. Nothing here changes a bit of the training.

    metrics of each update ─► Watch ─► findings, at the end, with the final evaluation if there is one

A finding says what was seen in figures, and what it may mean; whether a policy is good is for its return to say. Where
the target was proven, or the threshold of the registered id is passed, there is nothing to find.
"""

import math
from typing import Annotated, Literal

from pydantic import Field

from pgengine.environments import EnvironmentFacts
from pgengine.evaluation import Evaluation
from pgengine.spaces import DiscreteSpace, MultiBinarySpace, MultiDiscreteSpace, SpaceSpec
from pgengine.spec import AlgorithmSpec, Spec, StoppedBy, TrainingSpec

__all__ = ["Finding", "FindingCode", "Watch"]

FindingCode = Literal[
    "target_missed",
    "returns_alike",
    "estimates_zero",
    "episodes_cut",
    "entropy_vanished",
    "gradient_drowned",
    "best_was_earlier",
    "actions_saturated",
    "ratios_unusable",
]

ALIKE = 1e-12  # deviation of returns, as a share of their size, that is rounding
ENOUGH = 5  # updates from which on a share of them says anything
ZEROS = 0.1  # share of updates without an estimate that is worth a word
STRETCH = 0.2  # share of all updates, at the end, in which all returns were alike
VANISHED = 0.02  # share of the largest entropy that a policy may have
SHRUNK = math.log(50.0)  # nats for each number of an action: its deviation has become a fiftieth
DROWNED = 0.05  # signal over noise
SURELY = 0.5  # what it lies below even three standard errors above what was measured
DECAY = 0.9  # of the running mean of returns, which is over about ten updates
FALLEN = 5.0  # standard errors by which the end lies below the best
SATURATED = 0.95  # share of the numbers of actions at a bound


class Finding(Spec):
    """Something that a run should be told of."""

    code: FindingCode
    """Closed code."""
    message: str
    """What was seen."""
    suggestion: str
    """What to try."""


class Watch(Spec):
    """Sums over the updates of a run so far."""

    updates: Annotated[int, Field(ge=0)] = 0
    """Updates seen."""
    alike: Annotated[int, Field(ge=0)] = 0
    """Updates whose returns were all alike."""
    alike_at_the_end: Annotated[int, Field(ge=0)] = 0
    """How many of them the last ones were, without another in between."""
    zeros: Annotated[int, Field(ge=0)] = 0
    """Updates whose estimate of the gradient was zero."""
    cut: Annotated[int, Field(ge=0)] = 0
    """Updates in which every episode was cut."""
    signal: float = 0.0
    """Sum of the estimates of the gradient's squared norm."""
    signal_squares: float = 0.0
    """Sum of their squares."""
    noise: float = 0.0
    """Sum of the noise of the estimates, where it was measured."""
    measured: Annotated[int, Field(ge=0)] = 0
    """Updates in which both were measured."""
    entropy: float | None = None
    """Mean entropy of the last update, in nats."""
    first_entropy: float | None = None
    """The same of the first one."""
    saturated: float | None = None
    """Share of the numbers of the last actions that lay at a bound."""
    last_mean: float | None = None
    """Mean return of the last update."""
    mean: float | None = None
    """Running mean of the returns."""
    variance: float = 0.0
    """Variance of that mean."""
    best_mean: float | None = None
    """The largest that it was."""
    best_variance: float = 0.0
    """Variance of that one."""
    best_at: int = 0
    """Updates of the policy when it was."""

    def after(self, metrics: dict[str, float], algorithm: AlgorithmSpec, updates: int) -> "Watch":
        """The sums with one more update in them.

        Args:
            metrics: Of the update.
            algorithm: That made it.
            updates: Updates that the policy has had.
        """
        mean, deviation = metrics["mean_return"], metrics["return_deviation"]
        is_alike = self._is_alike(metrics, algorithm)
        changes: dict[str, object] = {
            "updates": self.updates + 1,
            "alike": self.alike + is_alike,
            "alike_at_the_end": self.alike_at_the_end + 1 if is_alike else 0,
            "zeros": self.zeros + (metrics.get("gradient_norm") == 0.0),
            "cut": self.cut + (metrics["truncated_fraction"] == 1.0),
            "saturated": _finite(metrics.get("saturated_fraction")),
            "last_mean": _finite(mean),
        }
        entropy = _finite(metrics.get("entropy"))
        if entropy is not None:
            changes["entropy"] = entropy
            if self.first_entropy is None:
                changes["first_entropy"] = entropy
        signal, noise = (_finite(metrics.get(name)) for name in ("gradient_squared_norm", "gradient_noise"))
        if signal is not None and noise is not None:
            changes |= {"signal": self.signal + signal, "signal_squares": self.signal_squares + signal**2}
            changes |= {"noise": self.noise + noise, "measured": self.measured + 1}
        if math.isfinite(mean) and math.isfinite(deviation):
            changes |= self._running(mean, deviation**2 / algorithm.trajectories, updates)
        return self.model_copy(update=changes)

    def _is_alike(self, metrics: dict[str, float], algorithm: AlgorithmSpec) -> bool:
        """Whether no trajectory was better than another, or than the one before where each batch has but one."""
        mean = metrics["mean_return"]
        if metrics["return_deviation"] > ALIKE * abs(mean):
            return False
        if algorithm.trajectories == 1 and mean != self.last_mean:
            return False
        # returns are undiscounted: those that are alike may differ in when they were paid
        return algorithm.credit_gamma == 1.0 or metrics.get("gradient_norm") == 0.0

    def _running(self, mean: float, variance: float, updates: int) -> dict[str, object]:
        if self.mean is not None:
            mean = DECAY * self.mean + (1.0 - DECAY) * mean
            variance = DECAY**2 * self.variance + (1.0 - DECAY) ** 2 * variance
        changes: dict[str, object] = {"mean": mean, "variance": variance}
        # the first ones are means of few batches
        if self.updates + 1 >= ENOUGH and (self.best_mean is None or mean > self.best_mean):
            changes |= {"best_mean": mean, "best_variance": variance, "best_at": updates}
        return changes

    def findings(
        self, spec: TrainingSpec, facts: EnvironmentFacts, stopped_by: StoppedBy | None, evaluation: Evaluation | None
    ) -> list[Finding]:
        """What there is to say, the weightiest first.

        Args:
            spec: Resolved.
            facts: Of the environment.
            stopped_by: Why the run has ended, or None if it goes on.
            evaluation: Of the final policy on fresh episodes, if there is one.
        """
        target = spec.stop.target_return
        final, variance = self._end(evaluation)
        threshold = facts.reward_threshold if target is None else target
        reached = stopped_by == "target_return" or (
            final is not None and threshold is not None and final >= threshold and stopped_by is not None
        )
        found = _unusable(stopped_by)
        if target is not None and stopped_by not in ("target_return", None):
            found.append(self._target_missed(target, final, reached))
        if reached:
            return found
        alike = self._returns_alike(facts)
        found += alike or self._estimates_zero()
        found += [*self._episodes_cut(facts), *self._entropy_vanished(facts), *self._gradient_drowned(spec)]
        return [*found, *self._best_was_earlier(final, variance), *self._actions_saturated()]

    def _end(self, evaluation: Evaluation | None) -> tuple[float | None, float]:
        """The mean return at the end, as well as it is known, and the variance of what is said of it."""
        if evaluation is None:
            return self.mean, self.variance
        if evaluation.exact_mean_return is not None:
            return evaluation.exact_mean_return, 0.0
        low, high = evaluation.confidence_interval
        # an interval is about four standard errors wide; there is none where all returns were alike
        return evaluation.mean_return, 0.0 if low is None or high is None else ((high - low) / 4.0) ** 2

    def _target_missed(self, target: float, final: float | None, near: bool) -> Finding:
        seen = "" if final is None else f"; the mean return at the end was {final:.6g}"
        message = f"the target return of {target:g} was not proven within {self.updates} updates{seen}"
        if near:
            suggestion = (
                "the mean lies above the target, but too few episodes were played to be sure: raise "
                "evaluation.episodes, or go on with the policy for longer"
            )
        else:
            suggestion = (
                "look at the other findings first; then go on with the policy (policy: its id) for more updates, or "
                "take more trajectories for each update"
            )
        return Finding(code="target_missed", message=message, suggestion=suggestion)

    def _returns_alike(self, facts: EnvironmentFacts) -> list[Finding]:
        n, last = self.updates, self.alike_at_the_end
        if last < max(ENOUGH, STRETCH * n) and not (0 < last == n):
            return []
        when = f"in each of the {n} updates" if last == n else f"in each of the last {last} of {n} updates"
        value = "" if self.mean is None else f" (mean return {self.mean:.6g})"
        return [
            Finding(
                code="returns_alike",
                message=f"all returns of a batch were alike {when}{value}, so that nothing was better than anything "
                "else and nothing was learned there",
                suggestion="if this is the best return, stop earlier. If not, rewards must be found before they can be "
                "learned from: let episodes be longer (environment.max_episode_steps), begin with a more random "
                "policy or keep it so (algorithm.entropy as objective, a larger initial_sigma), take more "
                "trajectories, or reward steps on the way",
            )
        ]

    def _estimates_zero(self) -> list[Finding]:
        if self.zeros < max(ENOUGH, ZEROS * self.updates):
            return []
        return [
            Finding(
                code="estimates_zero",
                message=f"the estimate of the gradient was exactly zero in {self.zeros} of {self.updates} updates "
                f"({100 * self.zeros / self.updates:.0f}%), in {self.alike} of them since all returns were alike",
                suggestion="take more trajectories, so that a batch holds better and worse episodes, or a smaller "
                "learning rate, so that the policy stays random for longer",
            )
        ]

    def _episodes_cut(self, facts: EnvironmentFacts) -> list[Finding]:
        if self.cut < self.updates or self.updates < ENOUGH or not facts.limit_cuts or facts.fixed_steps is not None:
            return []
        return [
            Finding(
                code="episodes_cut",
                message=f"no episode of the {self.updates} updates ended by itself: each was cut after "
                f"{facts.max_episode_steps} steps",
                suggestion="if an episode should come to an end, such as a goal, let it be longer "
                "(environment.max_episode_steps); if it never ends by itself, this is as it should be",
            )
        ]

    def _entropy_vanished(self, facts: EnvironmentFacts) -> list[Finding]:
        if self.entropy is None or self.first_entropy is None or self.updates < ENOUGH:
            return []
        largest = _largest_entropy(facts.action_space)
        if largest is None:
            numbers = getattr(facts.action_space, "size", 1)
            if self.first_entropy - self.entropy < SHRUNK * numbers:
                return []
            seen = f"the entropy of the policy fell from {self.first_entropy:.3g} to {self.entropy:.3g} nats"
        else:
            if largest == 0.0 or self.entropy > VANISHED * largest:
                return []
            seen = f"the entropy of the policy is {self.entropy:.2g} nats, of {largest:.3g} when it acts at random"
        return [
            Finding(
                code="entropy_vanished",
                message=f"{seen}: it takes almost always the same actions, and finds no better ones any more",
                suggestion="if its return is not good enough, begin anew with a smaller learning rate, more "
                "trajectories, or algorithm.entropy as objective",
            )
        ]

    def _gradient_drowned(self, spec: TrainingSpec) -> list[Finding]:
        most = self.signal + 3.0 * math.sqrt(self.signal_squares)
        if self.noise <= 0.0 or self.signal >= DROWNED * self.noise or most >= SURELY * self.noise:
            return []
        share = max(0.0, self.signal / self.noise)
        K = spec.algorithm.trajectories
        return [
            Finding(
                code="gradient_drowned",
                message=f"the signal of the gradient was {share:.2g} of its noise, over {self.measured} updates of "
                f"{K} trajectories: steps went almost anywhere",
                suggestion="take more trajectories and a smaller learning rate, a baseline that says more "
                "(leave_one_out, neural_value), or credit reward_to_go",
            )
        ]

    def _best_was_earlier(self, final: float | None, variance: float) -> list[Finding]:
        if self.best_mean is None or final is None:
            return []
        gap, error = self.best_mean - final, math.sqrt(self.best_variance + variance)
        if not gap > max(FALLEN * error, 0.05 * abs(self.best_mean)):
            return []
        return [
            Finding(
                code="best_was_earlier",
                message=f"the mean return of training was {self.best_mean:.6g} around update {self.best_at} of the "
                f"policy, and is {final:.6g} at the end",
                suggestion="take a checkpoint from about then, or train anew with a smaller learning rate, one that "
                "falls (optimizer.schedule), or more trajectories",
            )
        ]

    def _actions_saturated(self) -> list[Finding]:
        if self.saturated is None or self.saturated < SATURATED:
            return []
        return [
            Finding(
                code="actions_saturated",
                message=f"{100 * self.saturated:.0f}% of the numbers of the last actions lay at a bound of their box",
                suggestion="if it should act more finely, take a smaller learning rate or a smaller initial_sigma, or "
                "action_map tanh",
            )
        ]


def _unusable(stopped_by: StoppedBy | None) -> list[Finding]:
    if stopped_by not in ("effective_sample_size", "ratio_variance"):
        return []
    what = "too few trajectories carried the weight of a batch"
    if stopped_by == "ratio_variance":
        what = "the variance of the importance ratios was infinite"
    return [
        Finding(
            code="ratios_unusable",
            message=f"{what}, so the run ended before its limits",
            suggestion="let a policy act that is nearer to the one that learns (a smaller refresh_every, another "
            "policy), take kind per_decision, more trajectories or a smaller learning rate",
        )
    ]


def _largest_entropy(space: SpaceSpec) -> float | None:
    """Of any policy, in nats; None where there is no largest one."""
    if isinstance(space, DiscreteSpace):
        return math.log(space.n)
    if isinstance(space, MultiDiscreteSpace):
        return sum(math.log(n) for n in space.nvec)
    return space.n * math.log(2.0) if isinstance(space, MultiBinarySpace) else None


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None
