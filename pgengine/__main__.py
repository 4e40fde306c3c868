"""Training, evaluation, gradient checks and explanations without a server.

python -m pgengine train CartPole-v1 --seed 1 --output policy.safetensors
python -m pgengine evaluate policy.safetensors CartPole-v1
python -m pgengine check FrozenLake-v1 --mode sample --batches 2000
python -m pgengine explain CartPole-v1 --update 3 --episodes 1
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

import pgengine
from pgengine.checking import EstimatorReport, GradientCheck, check_steps
from pgengine.explaining import ExplainedEpisode, ExplainedStep, Explanation, explain
from pgengine.policies import Policy
from pgengine.spec import AlgorithmSpec, EnvironmentSpec, GradientCheckSpec, GymnasiumSpec, Spec, TrainingSpec

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, or 2 for a request that cannot be carried out."""
    parser = argparse.ArgumentParser(prog="python -m pgengine", description="Policy gradients without a server.")
    parser.add_argument("--version", action="version", version=f"pgengine {pgengine.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands.add_parser("train", help="train a policy and show how it learns"))
    _add_evaluate(commands.add_parser("evaluate", help="play fresh episodes with a kept policy"))
    _add_check(commands.add_parser("check", help="compare estimators with the exact gradient"))
    _add_explain(commands.add_parser("explain", help="lay one update out, step by step"))
    chosen = parser.parse_args(arguments)
    try:
        chosen.run(chosen)
    except ValidationError as error:
        first = error.errors()[0]
        where = "/".join(map(str, first["loc"]))
        print(f"pgengine: {where}: {first['msg']}" if where else f"pgengine: {first['msg']}", file=sys.stderr)
        return 2
    except (pgengine.PgengineError, OSError, ValueError) as error:
        print(f"pgengine: {error}", file=sys.stderr)
        return 2
    return 0


def _from_file_or_id(what: str, spec: type[Spec], changes: dict[str, Any]) -> Any:
    """A spec from a JSON file, or from the id of an environment, with some fields changed."""
    path = Path(what)
    if path.suffix == ".json":
        read = spec.model_validate_json(path.read_text())
    else:
        read = spec.model_validate({"environment": GymnasiumSpec(id=what)})
    fields = {name: getattr(read, name) for name in read.model_fields_set}
    return spec.model_validate(fields | {name: value for name, value in changes.items() if value is not None})


def _environment(what: str) -> EnvironmentSpec:
    path = Path(what)
    if path.suffix != ".json":
        return GymnasiumSpec(id=what)
    environment: EnvironmentSpec = TypeAdapter(EnvironmentSpec).validate_json(path.read_text())
    return environment


def _policy(path: Path | None) -> Policy | None:
    return None if path is None else pgengine.load(path.read_bytes())


def _print_json(result: BaseModel) -> None:
    print(result.model_dump_json(indent=2))


# --- train ------------------------------------------------------------------------------------------------------------


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", help="id of a Gymnasium environment, or a JSON file with a training spec")
    parser.add_argument("--seed", type=int, help="every random number is derived from it (default: the spec's, or 0)")
    parser.add_argument("--updates", type=int, help="stop after so many updates")
    parser.add_argument("--policy", type=Path, help="policy to start from, as --output writes it")
    parser.add_argument("--behaviour", type=Path, help="policy that acts, if the spec's behaviour is of kind policy")
    parser.add_argument("--output", type=Path, help="file for the trained policy (safetensors)")
    parser.set_defaults(run=_train)


def _train(chosen: argparse.Namespace) -> None:
    spec: TrainingSpec = _from_file_or_id(chosen.what, TrainingSpec, {"seed": chosen.seed})
    if chosen.updates is not None:
        stop = {**spec.stop.model_dump(exclude_unset=True), "updates": chosen.updates}
        spec = TrainingSpec.model_validate(
            {name: getattr(spec, name) for name in spec.model_fields_set} | {"stop": stop}
        )
    facts = pgengine.describe(spec.environment)
    print(f"label: {pgengine.label(pgengine.resolve(spec, facts), facts).kind}")
    update = None
    for update in pgengine.train(spec, policy=_policy(chosen.policy), behaviour=_policy(chosen.behaviour)):
        figures = update.metrics
        print(
            f"update {update.updates:5d}  mean return {figures['mean_return']:10.2f}  "
            f"entropy {figures.get('entropy', math.nan):6.3f}  {figures['env_steps_per_second']:8.0f} env_steps/s"
        )
    assert update is not None
    result = pgengine.evaluate(
        update.policy,
        spec.environment,
        episodes=spec.evaluation.episodes,
        seed=spec.seed,
        deterministic_episodes=spec.evaluation.deterministic_episodes,
        survival=spec.algorithm.survival,
    )
    print(json.dumps({"stopped_by": update.stopped_by, "evaluation": result.model_dump()}, indent=2))
    if chosen.output is not None:
        chosen.output.write_bytes(update.policy.to_bytes())


# --- evaluate ---------------------------------------------------------------------------------------------------------


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("policy", type=Path, help="file written by train --output")
    parser.add_argument("environment", help="id of a Gymnasium environment, or a JSON file with an environment")
    parser.add_argument("--episodes", type=int, default=100, help="fresh episodes (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.set_defaults(run=_evaluate)


def _evaluate(chosen: argparse.Namespace) -> None:
    policy = pgengine.load(chosen.policy.read_bytes())
    _print_json(pgengine.evaluate(policy, _environment(chosen.environment), episodes=chosen.episodes, seed=chosen.seed))


# --- check ------------------------------------------------------------------------------------------------------------


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        help="JSON file with a gradient check, or id of an environment with a transition table",
    )
    parser.add_argument("--mode", choices=["enumerate", "sample"], help="default: the file's, or sample")
    parser.add_argument("--batches", type=int, help="batches to play for each estimator (default: the file's, or 2000)")
    parser.add_argument("--seed", type=int, help="default: the file's, or 0")
    parser.add_argument("--policy", type=Path, help="policy at whose parameters the gradient is taken")
    parser.add_argument("--behaviour", type=Path, help="policy that acts, for behaviours of kind policy")
    parser.add_argument("--json", action="store_true", help="print the report as JSON and nothing else")
    parser.set_defaults(run=_check)


def _check(chosen: argparse.Namespace) -> None:
    changes = {"mode": chosen.mode, "batches": chosen.batches, "seed": chosen.seed}
    if not chosen.what.endswith(".json"):
        changes["estimators"] = _side_by_side(2 if chosen.mode == "enumerate" else 16)
    spec: GradientCheckSpec = _from_file_or_id(chosen.what, GradientCheckSpec, changes)
    result: GradientCheck | None = None
    for progress in check_steps(spec, _policy(chosen.policy), behaviour=_policy(chosen.behaviour)):
        result = progress.result
    assert result is not None
    if chosen.json:
        _print_json(result)
    else:
        _print_check(result, spec)


def _side_by_side(trajectories: int) -> list[AlgorithmSpec]:
    """What is compared where nothing else was asked for: estimators of the lectures, and two common ones with a bias."""
    choices: list[dict[str, Any]] = [
        {"credit": "total_return", "baseline": {"kind": "none"}},
        {"baseline": {"kind": "none"}},
        {"baseline": {"kind": "leave_one_out"}},
        {"baseline": {"kind": "batch_mean", "over": "time_step"}},
        {"baseline": {"kind": "none"}, "mean_over": "all_steps"},
        {"baseline": {"kind": "none"}, "mean_over": "own_steps"},
    ]
    return [AlgorithmSpec.model_validate({"trajectories": trajectories, **choice}) for choice in choices]


def _print_check(result: GradientCheck, spec: GradientCheckSpec) -> None:
    print(f"objective: {result.objective.text}")
    print(
        f"exact value {result.expected_return:.6g}, exact gradient of norm {result.gradient_norm:.6g}, "
        f"{result.parameters} parameters"
    )
    if result.mode == "enumerate":
        print("all batches of the finite MDP; agrees: to 1e-9")
    else:
        print(
            f"{spec.batches} batches for each estimator; an unbiased one is called biased with odds of at most "
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


# --- explain ----------------------------------------------------------------------------------------------------------


def _add_explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", help="JSON file with a training spec, or id of a Gymnasium environment")
    parser.add_argument("--update", type=int, default=1, help="number of the policy's update (default: 1)")
    parser.add_argument("--seed", type=int, help="default: the file's, or 0")
    parser.add_argument("--state", type=Path, help="state of the run before that update; default: from the beginning")
    parser.add_argument("--policy", type=Path, help="policy that the run started from")
    parser.add_argument("--behaviour", type=Path, help="policy that acted, for behaviours of kind policy")
    parser.add_argument("--first-episode", type=int, default=0, help="first episode to show (default: 0)")
    parser.add_argument("--episodes", type=int, default=2, help="how many to show (default: 2)")
    parser.add_argument("--max-steps", type=int, default=200, help="time steps to show in all (default: 200)")
    parser.add_argument("--json", action="store_true", help="print the explanation as JSON and nothing else")
    parser.set_defaults(run=_explain)


def _explain(chosen: argparse.Namespace) -> None:
    spec: TrainingSpec = _from_file_or_id(chosen.what, TrainingSpec, {"seed": chosen.seed})
    worked = explain(
        spec,
        chosen.update,
        policy=_policy(chosen.policy),
        behaviour=_policy(chosen.behaviour),
        resume_from=None if chosen.state is None else chosen.state.read_bytes(),
        first_episode=chosen.first_episode,
        episodes=chosen.episodes,
        max_steps=chosen.max_steps,
    )
    if chosen.json:
        _print_json(worked)
    else:
        _print_explanation(worked)


def _print_explanation(worked: Explanation) -> None:
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
    optimizer = worked.algorithm.optimizer.kind
    print(f"step of {optimizer} at rate {worked.step.learning_rate:g}".ljust(40) + f"norm {worked.step.norm:.6g}")


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


if __name__ == "__main__":
    sys.exit(main())
