"""Does it learn? The table of `make prove`.

    python benchmarks/learning.py [--seeds 3] [--output benchmarks/learning.md]

Trains with the engine alone, one seed after another, and evaluates each final policy on 100 fresh episodes. The status
is 1 if a policy misses its threshold. Seconds depend on the machine; all else repeats bit for bit on the same one.
"""

import argparse
import datetime
import os
import platform
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import pgengine
from pgengine.spec import AdamSpec


@dataclass(frozen=True)
class Case:
    """What is trained, and the mean return that it must reach."""

    name: str
    spec: pgengine.TrainingSpec
    threshold: float


BANDIT = pgengine.TabularSpec(
    transitions=[[[1.0], [1.0], [1.0]]], rewards=[[0.2, 1.0, 0.5]], initial=[1.0], terminal=[], horizon=1
)
"""Three arms; the best one pays 1."""

CASES = [
    Case(
        "bandit with three arms, linear, Adam 0.1, 200 updates",
        pgengine.TrainingSpec(
            environment=BANDIT,
            policy=pgengine.LinearPolicySpec(),
            algorithm=pgengine.AlgorithmSpec(optimizer=AdamSpec(learning_rate=0.1)),
            stop=pgengine.StopSpec(updates=200),
        ),
        0.95,
    ),
    Case(
        "CartPole-v1, every default",
        pgengine.TrainingSpec(environment=pgengine.GymnasiumSpec(id="CartPole-v1")),
        475.0,
    ),
]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    cells: list[str]
    passed: bool


def trained(case: Case, seed: int) -> Row:
    """Trains one policy and evaluates it."""
    spec = case.spec.model_copy(update={"seed": seed})
    facts = pgengine.describe(spec.environment)
    label = pgengine.label(pgengine.resolve(spec, facts), facts)
    began = time.perf_counter()
    update = deque(pgengine.train(spec), maxlen=1).pop()
    seconds = time.perf_counter() - began
    result = pgengine.evaluate(update.policy, spec.environment, episodes=100, seed=seed)
    low, high = result.confidence_interval
    passed = result.mean_return >= case.threshold
    cells = [
        case.name,
        str(seed),
        label.kind,
        f"{update.stopped_by} at {update.updates}",
        f"{update.progress.env_steps:,}",
        f"{seconds:.2f}",
        f"{result.mean_return:.2f}",
        f"{low:.2f} to {high:.2f}",
        f"{result.deterministic_mean_return:.2f}",
        f"{case.threshold:g}",
        "yes" if passed else "**no**",
    ]
    return Row(cells, passed)


HEAD = [
    "what",
    "seed",
    "label",
    "stopped by",
    "env_steps",
    "seconds",
    "mean of 100 fresh episodes",
    "95% interval",
    "of the mode",
    "threshold",
    "reached",
]


def table(seeds: int) -> Iterator[tuple[str, bool]]:
    """Lines of a dated table, and whether what they tell is as it should be."""
    today = datetime.datetime.now(datetime.UTC).date()
    yield f"{today}, {os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}", True
    yield "", True
    yield f"| {' | '.join(HEAD)} |", True
    yield f"|{'---|' * len(HEAD)}", True
    for case in CASES:
        for seed in range(seeds):
            row = trained(case, seed)
            yield f"| {' | '.join(row.cells)} |", row.passed


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="a file for the table")
    options = parser.parse_args()
    lines, passed = [], True
    for line, as_it_should in table(options.seeds):
        print(line, flush=True)
        lines.append(line)
        passed = passed and as_it_should
    if options.output is not None:
        options.output.write_text("# Learning\n\n`python benchmarks/learning.py`: " + "\n".join(lines) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
