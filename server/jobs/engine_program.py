"""The program that answers what the API asks the engine about jobs: `python -m server.jobs.engine_program`.

It reads one request from the directory that it is given, writes one answer to its standard output, and ends: with its
work, or with the API process, which holds the other end of its standard input.
"""

import argparse
import importlib
import json
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from server.memory import bound_this_process, is_out_of_memory, out_of_memory

if TYPE_CHECKING:
    from pgengine import Policy

__all__ = ["ORPHANED", "main"]

ORPHANED = 3
"""Exit status of a program that nobody waits for any more."""


def main() -> int:
    """Answer the request; what the engine refuses is an answer, too."""
    parser = argparse.ArgumentParser(prog="server.jobs.engine_program", description=__doc__)
    parser.add_argument("directory", type=Path, help="where the request lies")
    parser.add_argument("--threads", type=int, required=True, help="threads of torch")
    parser.add_argument("--memory", type=int, required=True, help="bytes of memory that it may take")
    parser.add_argument("--module", action="append", default=[], help="module that registers environments")
    arguments = parser.parse_args()
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    bound_this_process(arguments.memory)
    # what an environment prints belongs into the log
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with answers:
        json.dump(_answer(arguments), answers)
    return 0


def _end_with_stdin() -> NoReturn:
    while os.read(0, 1024):
        pass
    os._exit(ORPHANED)


def _answer(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from pgengine.errors import PgengineError, SpecError

    torch.set_num_threads(arguments.threads)
    for module in arguments.module:
        importlib.import_module(module)
    request = json.loads((arguments.directory / "request.json").read_text())
    try:
        return {"answer": _QUESTIONS[request["question"]](request, arguments.directory)}
    except SpecError as error:
        return {"refused": {"pointer": error.pointer, "code": error.code, "message": error.message}}
    except Exception as error:
        # an environment may be what has asked for too much; the engine keeps what it raised as the cause
        if is_out_of_memory(error):
            return {"failed": out_of_memory()}
        if isinstance(error, PgengineError):
            return {"failed": str(error)}
        raise


def _check(request: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Whether a gradient check can be made, and its estimators with all defaults written out and their labels."""
    import pgengine
    from pgengine.checking import refuse, resolve_estimators
    from pgengine.spec import GradientCheckSpec

    spec = GradientCheckSpec.model_validate(request["spec"])
    facts = pgengine.describe(spec.environment)
    refuse(spec, facts, _policy(directory, "policy"))
    resolved = resolve_estimators(spec, facts)
    return {
        "estimators": [one.algorithm.model_dump(mode="json") for one in resolved],
        "labels": [pgengine.label(one, facts).model_dump(mode="json") for one in resolved],
    }


def _explain(request: dict[str, Any], directory: Path) -> dict[str, Any]:
    """How one update of a training came about."""
    import pgengine

    state = directory / "state"
    recorded = pgengine.Recorded(dict(request["recorded"]), request["runtime"])
    explanation = pgengine.explain(
        pgengine.TrainingSpec.model_validate(request["spec"]),
        request["update"],
        policy=_policy(directory, "policy"),
        behaviour=_policy(directory, "behaviour"),
        resume_from=state.read_bytes() if state.exists() else None,
        recorded=recorded,
        first_episode=request["first_episode"],
        episodes=request["episodes"],
    )
    return explanation.model_dump(mode="json")


_QUESTIONS = {"check": _check, "explain": _explain}


def _policy(directory: Path, name: str) -> "Policy | None":
    import pgengine

    path = directory / name
    return pgengine.load(path.read_bytes()) if path.exists() else None


if __name__ == "__main__":
    sys.exit(main())
