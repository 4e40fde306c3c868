"""Runs a gradient check from its spec to its report."""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from pgengine.checking.enumerating import TOLERANCE, enumerated
from pgengine.checking.moments import BiasTest, Moments, bias_test
from pgengine.checking.reports import LISTED, CheckProgress, EstimatorReport, GradientCheck
from pgengine.checking.sampling import Sampled, sample
from pgengine.checking.subject import Candidate, Subject, open_subject, opened_environment
from pgengine.checking.values import value_report
from pgengine.environments import EpisodeEnvironment
from pgengine.errors import DivergedError
from pgengine.exact import Moments as ExactMoments
from pgengine.policies import Policy
from pgengine.spec import AlgorithmSpec, EnvironmentSpec, GradientCheckSpec, PolicySpec

__all__ = ["check_gradient", "check_steps"]

ROUNDING = 1e-12  # share of a mean's norm below which a deviation is no noise


def check_gradient(
    environment: EnvironmentSpec | dict[str, Any],
    policy: Policy | PolicySpec | dict[str, Any] | None = None,
    estimators: AlgorithmSpec | Sequence[AlgorithmSpec | dict[str, Any]] = (AlgorithmSpec(),),
    *,
    mode: Literal["enumerate", "sample"] = "sample",
    batches: int = 2000,
    false_alarm: float = 1e-6,
    seed: int = 0,
    values: bool = False,
    behaviour: Policy | None = None,
) -> GradientCheck:
    """Compares estimators of the gradient with the exact one.

        report = pgengine.check_gradient(mdp, policy, [AlgorithmSpec(gamma=0.9), AlgorithmSpec(mean_over="own_steps")])
        [(e.label.kind, e.verdict) for e in report.estimators]

    Args:
        environment: A finite MDP, an id with a transition table of its own, or an LQR.
        policy: At whose parameters: a policy, or the spec of a new one. Default: linear.
        estimators: What to compare.
        mode: All batches of a small MDP, or batches that the real rollout plays.
        batches: How many to play for each estimator in mode `sample`.
        false_alarm: Odds that an unbiased estimator is called biased, over all of its parameters.
        seed: Every random number is derived from it.
        values: Whether exact v, q, d and optima are told, too.
        behaviour: Who acts for estimators whose behaviour is of kind `policy`.

    Raises:
        SpecError: with a pointer from the root of a `GradientCheckSpec`, for what has no exact gradient, cannot be
            enumerated, or does not fit together.
        DivergedError: if a figure is too large for a float.
        pydantic.ValidationError: if a number is out of its bounds.
    """
    fields: dict[str, Any] = {
        "environment": environment,
        "estimators": [estimators] if isinstance(estimators, AlgorithmSpec) else list(estimators),
        "mode": mode,
        "batches": batches,
        "false_alarm": false_alarm,
        "seed": seed,
        "values": values,
    }
    if policy is not None:
        fields["policy"] = policy.spec if isinstance(policy, Policy) else policy
    spec = GradientCheckSpec(**fields)
    result = None
    for progress in check_steps(spec, policy if isinstance(policy, Policy) else None, behaviour=behaviour):
        result = progress.result
    assert result is not None, "the last step has the result"
    return result


def check_steps(
    spec: GradientCheckSpec,
    policy: Policy | None = None,
    *,
    behaviour: Policy | None = None,
    environment: EpisodeEnvironment | None = None,
) -> Iterator[CheckProgress]:
    """The same as a generator: whoever iterates decides what to show and when to stop.

    Args:
        spec: What to compare, how, and at which probability of a false alarm.
        policy: At whose parameters, in the place of a new one made from the spec.
        behaviour: Who acts for estimators whose behaviour is of kind `policy`.
        environment: The spec's environment, if it is open already; it is left open.

    Yields:
        How far the check has come; the last one has the result.

    Raises:
        SpecError: as `refuse` does, before anything is played.
        EnvironmentFailure: if the environment failed in the middle.
        DivergedError: if a figure is too large for a float.
    """
    began = time.perf_counter()
    opened = environment or opened_environment(spec)
    try:
        subject = open_subject(spec, opened, policy, behaviour)
        for candidate in subject.candidates:
            with np.errstate(over="ignore"):
                norm = float(np.linalg.norm(candidate.gradient))
            _check_finite(subject.policy, spec.seed, "the exact gradient", candidate.J, norm)
        reports: list[EstimatorReport] = []
        if spec.mode == "enumerate":
            for index, candidate in enumerate(subject.candidates):
                yield CheckProgress(index / len(subject.candidates), None)
                reports.append(
                    _of_enumerated(candidate, enumerated(subject, candidate, spec.seed), subject.policy, spec.seed)
                )
        else:
            gathered: list[Sampled] = []
            for fraction, so_far in sample(subject, spec):
                gathered = so_far
                yield CheckProgress(min(fraction, 1.0), None)
            reports = [
                _of_sampled(candidate, sampled, subject.policy, spec.false_alarm, spec.seed)
                for candidate, sampled in zip(subject.candidates, gathered, strict=True)
            ]
        yield CheckProgress(1.0, _report(spec, subject, reports, time.perf_counter() - began))
    finally:
        if environment is None:
            opened.close()


def _report(spec: GradientCheckSpec, subject: Subject, reports: list[EstimatorReport], seconds: float) -> GradientCheck:
    first = subject.candidates[0]
    P = subject.policy.size
    return GradientCheck(
        mode=spec.mode,
        objective=first.label.objective,
        parameters=P,
        expected_return=first.J,
        gradient_norm=float(np.linalg.norm(first.gradient)),
        gradient=first.gradient.tolist() if P <= LISTED else None,
        parameter_names=[_name(subject.policy, i) for i in range(P)] if P <= LISTED else None,
        estimators=reports,
        values=value_report(subject.policy, subject.environment, first.algorithm) if spec.values else None,
        seconds=seconds,
    )


# --- reports ----------------------------------------------------------------------------------------------------------


def _check_finite(policy: Policy, seed: int, what: str, *numbers: float | None) -> None:
    if not all(number is None or math.isfinite(number) for number in numbers):
        raise DivergedError(policy.updates + 1, seed, what)


@np.errstate(over="ignore", invalid="ignore")
def _of_enumerated(candidate: Candidate, moments: ExactMoments, policy: Policy, seed: int) -> EstimatorReport:
    _check_finite(policy, seed, "an estimate", moments.variance_trace, float(moments.mean @ moments.mean))
    figures = _figures(candidate, moments.mean, moments.variance_trace)
    unit = max(float(np.linalg.norm(candidate.target)), math.sqrt(moments.variance_trace))
    agrees = figures["bias_norm"] <= TOLERANCE * unit
    if candidate.label.kind == "scaled_unknown":
        # the factor is zero where the returns of others never differ, and then every estimate is
        agrees = agrees and (figures["scale"] is None or figures["scale"] > 0.0 or moments.variance_trace == 0.0)
    return EstimatorReport(
        **figures,
        batches=None,
        standard_error=None,
        statistic=None,
        threshold=None,
        worst_parameter=None,
        smallest_detectable_bias=None,
        verdict="agrees" if agrees else "differs",
        as_labelled=agrees or candidate.label.kind == "biased",
    )


@np.errstate(over="ignore", invalid="ignore")
def _of_sampled(
    candidate: Candidate, sampled: Sampled, policy: Policy, false_alarm: float, seed: int
) -> EstimatorReport:
    moments = sampled.estimates
    variance_trace = float(moments.variance.sum())
    _check_finite(policy, seed, "an estimate", variance_trace, float(moments.mean @ moments.mean))
    if candidate.label.kind == "scaled_unknown":
        # half of the probability for the direction, half for the sign
        test = _test(sampled, sampled.across, np.zeros_like(candidate.gradient), candidate, false_alarm / 2)
        seen = test.seen or _is_negative(sampled, candidate, false_alarm / 2)
    else:
        test = _test(sampled, moments, candidate.target, candidate, false_alarm)
        seen = test.seen
    _check_finite(policy, seed, "a figure of the test", test.statistic, test.smallest_detectable)
    return EstimatorReport(
        **_figures(candidate, moments.mean, variance_trace),
        batches=moments.count,
        standard_error=math.sqrt(variance_trace / moments.count),
        statistic=test.statistic,
        threshold=test.threshold,
        worst_parameter=None if test.worst is None else _name(policy, test.worst),
        smallest_detectable_bias=test.smallest_detectable,
        verdict="bias_seen" if seen else "no_bias_seen",
        as_labelled=not seen or candidate.label.kind == "biased",
    )


def _test(sampled: Sampled, moments: Moments, target: np.ndarray, candidate: Candidate, false_alarm: float) -> BiasTest:
    """The test of some moments, with what the model says of the tails where there is one."""
    tails = sampled.tails
    if tails is None:
        return bias_test(moments, target, false_alarm=false_alarm)
    # a mean of K trajectories is less skew by the root of K
    skewness, bounds = tails.skewness / math.sqrt(candidate.algorithm.trajectories), tails.bounds
    if moments is not sampled.estimates:  # made of all parameters together, and of a size that is not known
        skewness = np.full(len(target), skewness.max(initial=0.0))
        bounds = np.full(len(target), math.inf)
    return bias_test(moments, target, false_alarm=false_alarm, bounds=bounds, skewness=skewness)


def _is_negative(sampled: Sampled, candidate: Candidate, false_alarm: float) -> bool:
    """Whether the estimate points away from the gradient, beyond doubt."""
    found = _test(sampled, sampled.along, np.zeros(1), candidate, false_alarm)
    return found.seen and float(sampled.along.mean[0]) < 0.0


def _figures(candidate: Candidate, mean: np.ndarray, variance_trace: float) -> dict[str, Any]:
    """What both modes report alike."""
    gradient, target, K = candidate.gradient, candidate.target, candidate.algorithm.trajectories
    square = float(gradient @ gradient)
    scale = _finite(float(mean @ gradient) / square) if square > 0.0 else None
    if candidate.label.kind == "scaled_unknown":
        target = max(scale or 0.0, 0.0) * gradient
    bias_norm, target_norm = float(np.linalg.norm(mean - target)), float(np.linalg.norm(target))
    mean_norm = float(np.linalg.norm(mean))
    # estimates that are all the same have no noise, but for rounding
    noisy = variance_trace > (ROUNDING * mean_norm) ** 2
    # what is known of the signal is better than what was measured of it
    signal = float(target @ target) if candidate.label.factor is not None else (scale or 0.0) * (scale or 0.0) * square
    angle = None
    if square > 0.0 and mean_norm > 0.0:
        cosine = float(mean @ gradient) / (mean_norm * math.sqrt(square))
        angle = math.degrees(math.acos(min(1.0, max(-1.0, cosine))))
    return {
        "algorithm": candidate.algorithm,
        "label": candidate.label,
        "trajectories": K,
        "expected_return": candidate.J,
        "gradient_norm": math.sqrt(square),
        "mean_norm": mean_norm,
        "bias_norm": bias_norm,
        "relative_bias": _finite(bias_norm / target_norm) if target_norm > 0.0 else None,
        "scale": scale,
        "angle_degrees": angle,
        "variance_trace": variance_trace,
        "signal_to_noise": _finite(signal / variance_trace) if noisy else None,
        "trajectories_for_unit_signal_to_noise": _finite(K * variance_trace / signal) if signal > 0.0 else None,
        "mean": mean.tolist() if len(mean) <= LISTED else None,
    }


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _name(policy: Policy, index: int) -> str:
    """A name such as `theta[0,1]` of a number in the flat parameters."""
    for name in sorted(policy.parameters):
        array = policy.parameters[name]
        if index < array.size:
            position = np.unravel_index(index, array.shape)
            return f"{name}[{','.join(str(int(i)) for i in position)}]" if array.ndim else name
        index -= array.size
    raise IndexError("the policy has fewer parameters")
