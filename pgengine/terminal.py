"""Gradient checks and explanations, laid out for people in a terminal."""

from typing import Any

from pgengine.checking import EstimatorReport, GradientCheck
from pgengine.explanations import ExplainedEpisode, ExplainedStep, Explanation
from pgengine.spec import AlgorithmSpec, GradientCheckSpec

__all__ = ["print_check", "print_explanation"]


def print_check(result: GradientCheck, spec: GradientCheckSpec) -> None:
    """A table with a row for each estimator."""
    print(f"objective: {result.objective.text}")
    print(
        f"exact value {result.expected_return:.6g}, exact gradient of norm {result.gradient_norm:.6g}, "
        f"{result.parameters} parameters"
    )
    if result.mode == "enumerate":
        print("all batches of the finite MDP; agrees: to 1e-9")
    else:
        print(
            f"{spec.batches} batches for each estimator; an unbiased one is called biased with a probability of about "
            f"{spec.false_alarm:g}"
        )
    print()
    head = ["estimator", "label", "verdict", "bias", "detectable", "angle", "signal/noise", "K for 1", "as labelled"]
    _print_table([head, *(_check_row(report) for report in result.estimators)])


def _check_row(report: EstimatorReport) -> list[str]:
    target = report.bias_norm / report.relative_bias if report.relative_bias else report.gradient_norm
    scaled = report.label.kind == "scaled"
    return [
        _described(report.algorithm),
        f"scaled {report.label.factor:.4g}" if scaled else report.label.kind,
        report.verdict,
        _percent(report.bias_norm, target),
        _percent(report.smallest_detectable_bias, target),
        "-" if report.angle_degrees is None else f"{report.angle_degrees:.2f}°",
        _figure(report.signal_to_noise, ".3g"),
        _figure(report.trajectories_for_unit_signal_to_noise, ".3g"),
        "yes" if report.as_labelled else "NO",
    ]


def _percent(value: float | None, of: float) -> str:
    return "-" if value is None or of == 0.0 else f"{100 * value / of:.3g} %"


def _described(algorithm: AlgorithmSpec) -> str:
    """An estimator in a few words: credit, baseline, K, and what else is not as usual."""
    usual = AlgorithmSpec()
    baseline = algorithm.baseline.kind
    over = getattr(algorithm.baseline, "over", None)
    words = [algorithm.credit, baseline if over is None else f"{baseline} over {over}", f"K={algorithm.trajectories}"]
    if algorithm.gamma != usual.gamma:
        words.append(f"gamma={algorithm.gamma:g}")
        if algorithm.discount == "termination":
            words.append("by termination")
        elif algorithm.credit == "reward_to_go" and algorithm.discount_weight == "none":
            words.append("without gamma^t")
    for name in ("mean_over", "horizon", "within_episode"):
        if getattr(algorithm, name) != getattr(usual, name):
            words.append(f"{name} {getattr(algorithm, name)}")
    if algorithm.standardise != usual.standardise:
        words.append(f"standardise {algorithm.standardise}")
    if algorithm.entropy is not None:
        words.append(f"entropy {algorithm.entropy.coefficient:g} as {algorithm.entropy.as_}")
    if algorithm.importance.kind != "none":
        words.append(f"{algorithm.importance.kind} ratios of {algorithm.importance.behaviour.kind}")
    return ", ".join(words)


# --- explanations ---------------------------------------------------------------------------------------------------


def print_explanation(worked: Explanation) -> None:
    """The worked example of one update: a table for each episode, their sum, and the step."""
    print(f"update {worked.update}, an estimate from {worked.episodes_total} episodes ({worked.steps_total} steps)")
    print(f"estimator: {_described(worked.algorithm)}")
    print(f"label: {worked.label.kind}, {worked.label.objective.text}")
    for reason in worked.label.reasons:
        print(f"  {reason.code}: {reason.message}")
    for episode in worked.episodes:
        _print_episode(episode)
    print()
    print(f"sum of the contributions of all steps   norm {worked.sum_of_contributions_norm:.6g}")
    print(f"estimate of the gradient                norm {worked.estimate_norm:.6g}")
    if worked.exact_gradient_norm is not None and worked.expected_return is not None:
        print(f"exact gradient                          norm {worked.exact_gradient_norm:.6g}")
        print(f"exact value of the objective            {worked.expected_return:.6g}")
    elif worked.exact_absent is not None:
        print(f"no exact value: {worked.exact_absent.message}")
    optimizer = worked.algorithm.optimizer.kind
    made = f"step of {optimizer} at rate {worked.step.learning_rate:g}".ljust(40) + f"norm {worked.step.norm:.6g}"
    print(made if worked.unusable is None else f"{made}: the batch was not learned from, {_UNUSABLE[worked.unusable]}")


_UNUSABLE = {
    "effective_sample_size": "its effective sample size is too small",
    "ratio_variance": "its ratios have an infinite variance",
}


def _print_episode(episode: ExplainedEpisode) -> None:
    end = "terminated" if episode.terminated else "cut by the limit" if episode.truncated else "not ended"
    print()
    print(f"episode {episode.number}: {episode.length} steps, return {episode.total_return:.6g}, {end}")
    with_ratio = any(step.ratio is not None for step in episode.steps)
    with_entropy = any(step.entropy_weight is not None for step in episode.steps)
    head = ["t", "observation", "action", "reward", "G", "credit", "baseline"]
    head += ["ratio"] * with_ratio + ["weight", "|score|"] + ["entropy weight"] * with_entropy + ["|contribution|"]
    _print_table([head, *(_step_row(step, with_ratio, with_entropy) for step in episode.steps)], indent="  ")
    if len(episode.steps) < episode.length:
        print(f"  … {episode.length - len(episode.steps)} more steps")
    print(f"  contribution of the episode: norm {episode.contribution_norm:.6g}")


def _step_row(step: ExplainedStep, with_ratio: bool, with_entropy: bool) -> list[str]:
    row = [str(step.time), _short(step.observation), _short(step.action)]
    row += [_figure(value, ".4g") for value in (step.reward, step.return_to_go, step.credit, step.baseline)]
    if with_ratio:
        row.append(_figure(step.ratio, ".4g"))
    row += [_figure(step.weight, ".4g"), _figure(step.score_norm, ".4g")]
    if with_entropy:
        row.append(_figure(step.entropy_weight, ".4g"))
    return [*row, _figure(step.contribution_norm, ".4g")]


# --- tables -----------------------------------------------------------------------------------------------------------


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _short(value: Any) -> str:
    """An observation or an action on one line; of a long one the first numbers."""
    if not isinstance(value, list):
        return _figure(value, ".3g") if isinstance(value, float) else str(value)
    parts = [_short(part) for part in value[:6]]
    return "[" + " ".join(parts) + (" …]" if len(value) > 6 else "]")


def _print_table(rows: list[list[str]], indent: str = "") -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print(indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
