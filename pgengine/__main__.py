"""Training without a server.

python -m pgengine train CartPole-v1 --seed 1 --output policy.safetensors
python -m pgengine evaluate policy.safetensors CartPole-v1
"""

import argparse
import json
import sys
from pathlib import Path

from pydantic import ValidationError

import pgengine
from pgengine.spec import GymnasiumSpec, TrainingSpec

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, or 2 for a request that cannot be carried out."""
    parser = argparse.ArgumentParser(prog="python -m pgengine", description="Policy gradients without a server.")
    parser.add_argument("--version", action="version", version=f"pgengine {pgengine.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands.add_parser("train", help="train a policy and show how it learns"))
    _add_evaluate(commands.add_parser("evaluate", help="play fresh episodes with a kept policy"))
    chosen = parser.parse_args(arguments)
    try:
        chosen.run(chosen)
    except ValidationError as error:
        first = error.errors()[0]
        print(f"pgengine: {'/'.join(map(str, first['loc']))}: {first['msg']}", file=sys.stderr)
        return 2
    except (pgengine.PgengineError, OSError, ValueError) as error:
        print(f"pgengine: {error}", file=sys.stderr)
        return 2
    return 0


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", help="id of a Gymnasium environment, or a JSON file with a training spec")
    parser.add_argument("--seed", type=int, help="every random number is derived from it (default: the spec's, or 0)")
    parser.add_argument("--updates", type=int, help="stop after so many updates")
    parser.add_argument("--output", type=Path, help="file for the trained policy (safetensors)")
    parser.set_defaults(run=_train)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("policy", type=Path, help="file written by train --output")
    parser.add_argument("environment", help="id of a Gymnasium environment")
    parser.add_argument("--episodes", type=int, default=100, help="fresh episodes (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.set_defaults(run=_evaluate)


def _train(chosen: argparse.Namespace) -> None:
    spec = _spec(chosen)
    facts = pgengine.describe(spec.environment)
    print(f"label: {pgengine.label(pgengine.resolve(spec, facts), facts).kind}")
    update = None
    for update in pgengine.train(spec):
        figures = update.metrics
        print(
            f"update {update.updates:5d}  mean return {figures['mean_return']:10.2f}  "
            f"entropy {figures['entropy']:6.3f}  {figures['env_steps_per_second']:8.0f} env_steps/s"
        )
    assert update is not None
    result = pgengine.evaluate(update.policy, spec.environment, episodes=spec.evaluation.episodes, seed=spec.seed)
    print(json.dumps({"stopped_by": update.stopped_by, "evaluation": result.model_dump()}, indent=2))
    if chosen.output is not None:
        chosen.output.write_bytes(update.policy.to_bytes())


def _spec(chosen: argparse.Namespace) -> TrainingSpec:
    path = Path(chosen.what)
    if path.suffix == ".json":
        spec = TrainingSpec.model_validate_json(path.read_text())
    else:
        spec = TrainingSpec(environment=GymnasiumSpec(id=chosen.what))
    fields = {name: getattr(spec, name) for name in spec.model_fields_set}
    if chosen.seed is not None:
        fields["seed"] = chosen.seed
    if chosen.updates is not None:
        fields["stop"] = {**spec.stop.model_dump(exclude_unset=True), "updates": chosen.updates}
    return TrainingSpec.model_validate(fields)


def _evaluate(chosen: argparse.Namespace) -> None:
    policy = pgengine.load(chosen.policy.read_bytes())
    environment = GymnasiumSpec(id=chosen.environment)
    result = pgengine.evaluate(policy, environment, episodes=chosen.episodes, seed=chosen.seed)
    print(json.dumps(result.model_dump(), indent=2))


if __name__ == "__main__":
    sys.exit(main())
