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
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

import pgengine
from pgengine.checking import GradientCheck, check_steps
from pgengine.environments import EnvironmentFacts, EpisodeEnvironment
from pgengine.errors import SpecError
from pgengine.explaining import explain
from pgengine.policies import Policy, create_policy
from pgengine.spec import (
    AlgorithmSpec,
    EnvironmentSpec,
    GradientCheckSpec,
    GymnasiumSpec,
    PolicyBehaviourSpec,
    TrainingSpec,
)
from pgengine.terminal import print_check, print_explanation

__all__ = ["main"]

INTERRUPTED = 130  # what shells report of a program that Ctrl-C ended: 128 + SIGINT

_OPTIONS = {
    "behaviour_missing": "another policy is to act; give it with --behaviour",
    "episode_limit_missing": "the id has no episode limit of its own; give --max-episode-steps (in a file "
    "max_episode_steps), it is part of the objective",
}
"""What the engine asks for with these codes, as one gives it on the command line."""


class _Refused(Exception):
    """A command that cannot be carried out, in the words of the command line."""


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    Returns:
        0; 2 for a request that cannot be carried out; 130 if Ctrl-C ended it.
    """
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
    except KeyboardInterrupt:
        print("pgengine: interrupted", file=sys.stderr)
        return INTERRUPTED
    except SpecError as error:
        message = _OPTIONS.get(error.code, error.message)
        print(f"pgengine: {error.pointer}: {message}" if error.pointer else f"pgengine: {message}", file=sys.stderr)
        return 2
    except (_Refused, pgengine.PgengineError, OSError, ValueError) as error:
        print(f"pgengine: {error}", file=sys.stderr)
        return 2
    return 0


# --- what is given ----------------------------------------------------------------------------------------------------

Given = TypeVar("Given", TrainingSpec, GradientCheckSpec)


def _is_file(what: str) -> bool:
    return Path(what).suffix == ".json"


def _from_file_or_id(chosen: argparse.Namespace, kind: type[Given], changes: dict[str, Any]) -> Given:
    """A spec from a JSON file, or from the id of an environment, with some fields changed."""
    if _is_file(chosen.what):
        _no_limit_of_a_file(chosen)
        text = Path(chosen.what).read_text()
        if "kind" in _members(text):
            raise _Refused(f"{chosen.what}: found an environment, expected an object that has it as its `environment`")
        read: Given = _validated(kind, text)
    else:
        read = kind.model_validate({"environment": _registered(chosen.what, chosen)})
    changes = {name: value for name, value in changes.items() if value is not None}
    changed: Given = _validated(kind, {name: getattr(read, name) for name in read.model_fields_set} | changes)
    return changed


def _environment(chosen: argparse.Namespace) -> EnvironmentSpec:
    """An environment alone, from a JSON file or its id."""
    if not _is_file(chosen.environment):
        return _registered(chosen.environment, chosen)
    _no_limit_of_a_file(chosen)
    text = Path(chosen.environment).read_text()
    members = _members(text)
    if members and "kind" not in members:
        raise _Refused(
            f"{chosen.environment}: expected an environment, which has a `kind`: gymnasium, tabular or lqr; of a "
            "training spec or a gradient check give the object that is its `environment`, in a file of its own"
        )
    environment: EnvironmentSpec = _validated(EnvironmentSpec, text)
    return environment


def _registered(id: str, chosen: argparse.Namespace) -> GymnasiumSpec:
    registered: GymnasiumSpec = _validated(GymnasiumSpec, {"id": id, "max_episode_steps": chosen.max_episode_steps})
    return registered


def _no_limit_of_a_file(chosen: argparse.Namespace) -> None:
    if chosen.max_episode_steps is not None:
        raise _Refused("--max-episode-steps belongs to an id; in a file the environment has its own limit")


def _members(text: str) -> dict[str, Any]:
    """The members of a JSON object; nothing of what is none, which is refused later and by name."""
    try:
        read = json.loads(text)
    except ValueError:
        return {}
    return read if isinstance(read, dict) else {}


def _validated(kind: Any, given: str | dict[str, Any]) -> Any:
    """What was given, JSON or members, as a spec of a kind.

    Raises:
        SpecError: with a pointer into what was given.
    """
    adapter = TypeAdapter(kind)
    try:
        return adapter.validate_json(given) if isinstance(given, str) else adapter.validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        inside = _members(given) if isinstance(given, str) else given
        pointer = _pointer(first["loc"], inside, missing=first["type"] == "missing")
        raise SpecError(pointer, first["type"], first["msg"]) from None


def _pointer(place: Sequence[str | int], inside: Any, *, missing: bool) -> str:
    """A place as pydantic names it, without the names of the alternatives that it tried on the way."""
    pointer = ""
    for number, part in enumerate(place):
        if isinstance(inside, dict) and part in inside:
            inside = inside[part]
        elif isinstance(inside, list) and isinstance(part, int):
            inside = inside[part] if part < len(inside) else None
        elif not (missing and number == len(place) - 1):
            continue
        pointer += f"/{part}"
    return pointer


def _policy(path: Path | None) -> Policy | None:
    return None if path is None else pgengine.load(path)


def _behaviour(path: Path | None, algorithms: Iterable[AlgorithmSpec]) -> Policy | None:
    if path is not None and not any(isinstance(a.importance.behaviour, PolicyBehaviourSpec) for a in algorithms):
        raise _Refused(
            "--behaviour: nobody asks for it; expected a file in which importance.behaviour is of kind policy"
        )
    return _policy(path)


@contextmanager
def _opened(spec: TrainingSpec) -> Iterator[EpisodeEnvironment]:
    """The environment of a spec; errors point into the spec."""
    try:
        environment = pgengine.open_environment(spec.environment)
    except SpecError as error:
        raise error.under("/environment") from None
    try:
        yield environment
    finally:
        environment.close()


def _created(spec: TrainingSpec, facts: EnvironmentFacts) -> Policy:
    """The policy with which a run of a resolved spec begins; errors point into the spec."""
    try:
        return create_policy(spec.policy, spec.environment, facts, seed=spec.seed)
    except SpecError as error:
        raise error.under("/policy") from None


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer from 1 on, found {text!r}")
    return int(text)


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, found {text!r}")
    return value


def _add_limit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-episode-steps",
        type=_at_least_one,
        metavar="STEPS",
        help="episode limit of an id, part of the objective (default: the id's own)",
    )


def _print_json(result: BaseModel) -> None:
    print(result.model_dump_json(indent=2))


# --- train ------------------------------------------------------------------------------------------------------------


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", help="id of a Gymnasium environment, or a JSON file with a training spec")
    parser.add_argument("--seed", type=int, help="what the engine draws is derived from it (default: the spec's, or 0)")
    parser.add_argument("--updates", type=int, help="stop after so many updates")
    parser.add_argument("--policy", type=Path, help="policy to go on with, as --output writes it")
    parser.add_argument("--behaviour", type=Path, help="policy that acts, if the spec's behaviour is of kind policy")
    parser.add_argument("--output", type=Path, help="file for the trained policy (safetensors)")
    _add_limit(parser)
    parser.set_defaults(run=_train)


def _train(chosen: argparse.Namespace) -> None:
    spec = _from_file_or_id(chosen, TrainingSpec, {"seed": chosen.seed})
    if chosen.updates is not None:
        stop = {**spec.stop.model_dump(exclude_unset=True), "updates": chosen.updates}
        fields = {name: getattr(spec, name) for name in spec.model_fields_set}
        spec = _validated(TrainingSpec, fields | {"stop": stop})
    if chosen.output is not None:
        _check_output(chosen.output)
    policy, behaviour = _policy(chosen.policy), _behaviour(chosen.behaviour, [spec.algorithm])
    with _opened(spec) as environment:
        resolved = pgengine.resolve(spec, environment.facts, continues=policy is not None)
        policy = policy or _created(resolved, environment.facts)
        update: pgengine.Update | None = None
        for made in pgengine.train(resolved, environment=environment, policy=policy, behaviour=behaviour):
            if update is None:  # not before: now nothing is refused any more
                print(f"label: {pgengine.label(resolved, environment.facts).kind}")
                for notice in pgengine.notices_of(pgengine.describe(spec.environment), policy.spec):
                    print(f"{notice.code}: {notice.message}")
            update = made
            figures = made.metrics
            print(
                f"update {made.updates:5d}  mean return {figures['mean_return']:10.2f}  "
                f"entropy {figures.get('entropy', math.nan):6.3f}  {figures['env_steps_per_second']:8.0f} env_steps/s"
            )
        assert update is not None
        # an evaluation that fails or is interrupted must not cost the policy
        if chosen.output is not None:
            chosen.output.write_bytes(update.policy.to_bytes())
        result = pgengine.evaluate(
            update.policy,
            environment,
            episodes=spec.evaluation.episodes,
            seed=spec.seed,
            deterministic_episodes=spec.evaluation.deterministic_episodes,
            survival=spec.algorithm.survival,
        )
        found = [finding.model_dump() for finding in update.findings(result)]
    told = {
        "stopped_by": update.stopped_by,
        "selection": None if update.selection is None else update.selection.model_dump(),
        "evaluation": result.model_dump(mode="json"),
        "findings": found,
    }
    print(json.dumps(told, indent=2))


def _check_output(path: Path) -> None:
    """Refuses a file that cannot be written, by trying it, before hours are spent on what would be in it."""
    try:
        if path.exists():
            with path.open("ab"):
                pass
        else:
            with tempfile.TemporaryFile(dir=path.parent):
                pass
    except OSError as error:
        raise _Refused(f"--output: {path} cannot be written: {error.strerror}") from None


# --- evaluate ---------------------------------------------------------------------------------------------------------


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("policy", type=Path, help="file written by train --output")
    parser.add_argument("environment", help="id of a Gymnasium environment, or a JSON file with an environment")
    parser.add_argument("--episodes", type=int, default=100, help="fresh episodes (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--gamma",
        type=_probability,
        default=1.0,
        help="episodes end with probability 1 - gamma after each step, for policies trained with discount termination "
        "(default: 1)",
    )
    _add_limit(parser)
    parser.set_defaults(run=_evaluate)


def _evaluate(chosen: argparse.Namespace) -> None:
    policy = pgengine.load(chosen.policy)
    environment = _environment(chosen)
    try:
        result = pgengine.evaluate(
            policy, environment, episodes=chosen.episodes, seed=chosen.seed, survival=chosen.gamma
        )
    except SpecError as error:
        if error.code != "no_certain_end":
            raise
        message = (
            "some policies would never end an episode; give a horizon, or, for a policy that was trained with discount "
            "termination, --gamma"
        )
        raise SpecError(error.pointer, error.code, message) from None
    _print_json(result)


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
    _add_limit(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON and nothing else")
    parser.set_defaults(run=_check)


def _check(chosen: argparse.Namespace) -> None:
    changes = {"mode": chosen.mode, "batches": chosen.batches, "seed": chosen.seed}
    if not _is_file(chosen.what):
        changes["estimators"] = _side_by_side(2 if chosen.mode == "enumerate" else 16)
    spec = _from_file_or_id(chosen, GradientCheckSpec, changes)
    behaviour = _behaviour(chosen.behaviour, spec.estimators)
    result: GradientCheck | None = None
    for progress in check_steps(spec, _policy(chosen.policy), behaviour=behaviour):
        result = progress.result
    assert result is not None
    if chosen.json:
        _print_json(result)
    else:
        print_check(result, spec)


def _side_by_side(trajectories: int) -> list[AlgorithmSpec]:
    """What is compared where nothing else is asked for: estimators of the lectures, and two common ones with a bias."""
    choices: list[dict[str, Any]] = [
        {"credit": "total_return", "baseline": {"kind": "none"}},
        {"baseline": {"kind": "none"}},
        {"baseline": {"kind": "leave_one_out"}},
        {"baseline": {"kind": "batch_mean", "over": "time_step"}},
        {"baseline": {"kind": "none"}, "mean_over": "all_steps"},
        {"baseline": {"kind": "none"}, "mean_over": "own_steps"},
    ]
    return [AlgorithmSpec.model_validate({"trajectories": trajectories, **choice}) for choice in choices]


# --- explain ----------------------------------------------------------------------------------------------------------


def _add_explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", help="JSON file with a training spec, or id of a Gymnasium environment")
    parser.add_argument("--update", type=int, default=1, help="number of the policy's update (default: 1)")
    parser.add_argument("--seed", type=int, help="default: the file's, or 0")
    parser.add_argument("--state", type=Path, help="state of the run before that update; default: from the beginning")
    parser.add_argument("--policy", type=Path, help="policy that the run started from")
    parser.add_argument("--behaviour", type=Path, help="policy that acted, for behaviours of kind policy")
    parser.add_argument("--first-episode", type=int, default=0, help="first episode to show (default: 0)")
    parser.add_argument("--episodes", type=_at_least_one, default=2, help="how many to show (default: 2)")
    parser.add_argument("--max-steps", type=_at_least_one, default=200, help="time steps to show in all (default: 200)")
    _add_limit(parser)
    parser.add_argument("--json", action="store_true", help="print the explanation as JSON and nothing else")
    parser.set_defaults(run=_explain)


def _explain(chosen: argparse.Namespace) -> None:
    spec = _from_file_or_id(chosen, TrainingSpec, {"seed": chosen.seed})
    policy, behaviour = _policy(chosen.policy), _behaviour(chosen.behaviour, [spec.algorithm])
    state = None if chosen.state is None else chosen.state.read_bytes()
    with _opened(spec) as environment:
        if policy is None and state is None:
            spec = pgengine.resolve(spec, environment.facts)
            policy = _created(spec, environment.facts)
        worked = explain(
            spec,
            chosen.update,
            policy=policy,
            behaviour=behaviour,
            resume_from=state,
            environment=environment,
            first_episode=chosen.first_episode,
            episodes=chosen.episodes,
            max_steps=chosen.max_steps,
        )
    if chosen.json:
        _print_json(worked)
    else:
        print_explanation(worked)


if __name__ == "__main__":
    sys.exit(main())
