"""Does it learn? The table of `make prove`.

    python benchmarks/learning.py [--seeds 3] [--only NAME] [--output benchmarks/learning.md]

Trains with the engine alone, one seed after another. Where J is known exactly, that of the final policy is taken, and
otherwise the mean of fresh episodes; the mode is a second number. The status is 1 if a policy misses its threshold.
Seconds depend on the machine; all else repeats bit for bit on the same one.

tests/engine/test_learning.py learns the same cases with one seed.
"""

import argparse
import datetime
import math
import os
import platform
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pgengine
from pgengine.environments import EpisodeEnvironment, Lqr, TabularMDP
from pgengine.exact import best_linear, best_stationary
from pgengine.spec import AdamSpec, GaussianSpec, LinearPolicySpec, MlpPolicySpec, ScheduleSpec, TransformerPolicySpec

EXACTLY = 1e-9  # how far an exact J may lie from a bound that holds for every policy of its class


@dataclass(frozen=True)
class Case:
    """What is trained, and what its policy must reach.

    Attributes:
        name: A word for it.
        settings: What differs from the defaults.
        spec: All of it, at seed 0.
        best: The best J of the policies of this class, from the environment; or None where nobody knows it.
        threshold: J that must be reached, from the best.
        reason: Why this threshold.
        exact: Whether J is computed exactly, or estimated on fresh episodes.
        episodes: How many of them.
        is_upper: Whether the threshold is one that no policy of this class passes.
    """

    name: str
    settings: str
    spec: pgengine.TrainingSpec
    best: Callable[[EpisodeEnvironment], float] | None
    threshold: Callable[[float], float]
    reason: str
    exact: bool = False
    episodes: int = 100
    is_upper: bool = False


@dataclass(frozen=True)
class Result:
    """What came of it.

    Attributes:
        J: Exact, or the mean of fresh episodes.
        interval: 95% interval of the mean; None if J is exact.
        mode: Mean return of the mode.
        best: The best J of the class, or None.
        threshold: What had to be reached.
        passed: Whether it was.
        update: The last update.
        seconds: Of training.
        label: What the estimates of the gradient were.
    """

    J: float
    interval: tuple[float, float] | None
    mode: float
    best: float | None
    threshold: float
    passed: bool
    update: pgengine.Update
    seconds: float
    label: str


# --- what is known without learning -----------------------------------------------------------------------------------


def stationary_optimum(environment: EpisodeEnvironment) -> float:
    """The best J of a finite MDP without a clock."""
    assert isinstance(environment, TabularMDP)
    return best_stationary(environment, gamma=1.0).J


def riccati_optimum(environment: EpisodeEnvironment) -> float:
    """The best J of a linear policy without a clock whose actions have the deviation `LQR_SIGMA`."""
    assert isinstance(environment, Lqr)
    return best_linear(environment, gamma=1.0, deviation=LQR_SIGMA).J


def known(value: float) -> Callable[[EpisodeEnvironment], float]:
    """A best J that is known on paper."""
    return lambda _: value


def pendulum_optimum(angles: int = 201, speeds: int = 161, torques: int = 17) -> float:
    """About the best J of Pendulum-v1: backward induction over its 200 steps on a grid, with linear interpolation."""
    angle = np.linspace(-np.pi, np.pi, angles)[:, None, None]
    speed = np.linspace(-8.0, 8.0, speeds)[None, :, None]
    torque = np.linspace(-2.0, 2.0, torques)
    reward = -(angle**2 + 0.1 * speed**2 + 0.001 * torque**2)
    next_speed = np.clip(speed + (15.0 * np.sin(angle) + 3.0 * torque) * 0.05, -8.0, 8.0)
    next_angle = (angle + next_speed * 0.05 + np.pi) % (2.0 * np.pi) - np.pi
    i, di = _between((next_angle + np.pi) / (2.0 * np.pi) * (angles - 1), angles)
    j, dj = _between((next_speed + 8.0) / 16.0 * (speeds - 1), speeds)
    v = np.zeros((angles, speeds))
    for _ in range(200):
        low = v[i, j] * (1.0 - dj) + v[i, j + 1] * dj
        high = v[i + 1, j] * (1.0 - dj) + v[i + 1, j + 1] * dj
        v = (reward + low * (1.0 - di) + high * di).max(axis=2)
    begins = v[:, np.abs(speed.ravel()) <= 1.0]  # an episode begins at any angle, with a speed from -1 to 1
    return float(begins[:-1].mean())


def _between(place: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Cell of a grid in which a place lies, and how far in."""
    cell = np.minimum(place.astype(int), size - 2)
    return cell, place - cell


# --- the cases --------------------------------------------------------------------------------------------------------


def case(
    environment: pgengine.GymnasiumSpec | pgengine.LqrSpec,
    policy: LinearPolicySpec | MlpPolicySpec | TransformerPolicySpec,
    algorithm: dict[str, Any],
    stop: dict[str, Any],
) -> pgengine.TrainingSpec:
    """A training run at seed 0 that measures nothing on its way."""
    return pgengine.TrainingSpec(
        environment=environment,
        policy=policy,
        algorithm=pgengine.AlgorithmSpec(**algorithm),
        stop=pgengine.StopSpec(**stop),
        diagnostics_every=0,
    )


def adam(learning_rate: float, scale: float | None = None) -> AdamSpec:
    """Adam with a constant step size, or one that falls as 1 / (1 + u / scale)."""
    if scale is None:
        return AdamSpec(learning_rate=learning_rate)
    return AdamSpec(learning_rate=learning_rate, schedule=ScheduleSpec(kind="inverse_time", scale=scale))


LQR_SIGMA = 0.3
LQR = pgengine.LqrSpec(
    dynamics=[[0.9, 0.3], [-0.1, 0.9]],
    control=[[0.0], [0.5]],
    state_cost=[[1.0, 0.0], [0.0, 1.0]],
    action_cost=[[0.5]],
    noise_deviation=[0.1, 0.1],
    horizon=20,
)
"""A damped turn in the plane that is pushed along one axis."""

FAILED = {"target_return": None}  # a run that stops early would stop by luck

CASES = [
    Case(
        "Bandit-v0",
        "linear, Adam 0.1, K = 32, 200 updates",
        case(
            pgengine.GymnasiumSpec(id="pgengine/Bandit-v0"),
            LinearPolicySpec(),
            {"trajectories": 32, "optimizer": adam(0.1)},
            {"updates": 200},
        ),
        stationary_optimum,
        lambda best: best - 0.01,
        "the best arm pays 0.9 and the next one 0.7: within 0.01, the best arm has at least 95% of the mass",
        exact=True,
    ),
    Case(
        "Aliased-v0",
        "linear, Adam 0.05 / (1 + u / 20), K = 32, 150 updates",
        case(
            pgengine.GymnasiumSpec(id="pgengine/Aliased-v0"),
            LinearPolicySpec(),
            {"trajectories": 32, "optimizer": adam(0.05, 20)},
            {"updates": 150},
        ),
        stationary_optimum,
        lambda best: 1.02 * best,
        "2% of the best, which is a random policy: every deterministic one has J = -200",
        exact=True,
    ),
    Case(
        "FrozenLake-v1",
        "linear, Adam 0.1, K = 128, 300 updates",
        case(
            pgengine.GymnasiumSpec(id="FrozenLake-v1"),
            LinearPolicySpec(),
            {"trajectories": 128, "optimizer": adam(0.1)},
            {"updates": 300, **FAILED},
        ),
        stationary_optimum,
        lambda best: 0.95 * best,
        "95% of the best policy without a clock, and above the 0.70 at which the id is registered as solved",
        exact=True,
    ),
    Case(
        "FrozenLake-v1, defaults",
        "every default: linear, Adam 0.05, K = 128, until 0.70 is proven or 500 updates",
        pgengine.TrainingSpec(environment=pgengine.GymnasiumSpec(id="FrozenLake-v1"), diagnostics_every=0),
        stationary_optimum,
        lambda _: 0.70,
        "the reward threshold with which the id is registered",
        exact=True,
    ),
    *[
        Case(
            f"{name}, defaults",
            "every default: linear, Adam 0.05, K = 128, 500 updates",
            pgengine.TrainingSpec(environment=pgengine.GymnasiumSpec(id=f"pgengine/{name}"), diagnostics_every=0),
            stationary_optimum,
            lambda best: best - 0.05 * abs(best),
            "5% of the best",
            exact=True,
        )
        for name in ("Chain-v0", "GridWorld-v0")
    ],
    Case(
        "CliffWalking-v1",
        "200 steps declared, linear, Adam 0.2, K = 64, 300 updates",
        case(
            pgengine.GymnasiumSpec(id="CliffWalking-v1", max_episode_steps=200),
            LinearPolicySpec(),
            {"trajectories": 64, "optimizer": adam(0.2)},
            {"updates": 300},
        ),
        stationary_optimum,
        lambda _: -20.0,
        "the safe ways around take 15 or 17 steps; along the edge, 13, a slip of a still random policy costs 100, so "
        "learning settles on a safe one; 3 steps are left for what is random still",
        exact=True,
    ),
    Case(
        "LQR",
        "2 numbers of state, 1 of action, 20 steps; linear, sigma fixed at 0.3, Adam 0.1 / (1 + u / 20), K = 128, "
        "200 updates",
        case(
            LQR,
            LinearPolicySpec(distribution=GaussianSpec(sigma="fixed", initial_sigma=LQR_SIGMA)),
            {"trajectories": 128, "optimizer": adam(0.1, 20)},
            {"updates": 200},
        ),
        riccati_optimum,
        lambda best: 1.02 * best,
        "2% of the best gain without a clock, which costs 0.6% more than Riccati's gains with one (-8.884); doing "
        "nothing has -21.3",
        exact=True,
    ),
    Case(
        "CartPole-v1",
        "every default",
        pgengine.TrainingSpec(environment=pgengine.GymnasiumSpec(id="CartPole-v1")),
        known(500.0),
        lambda _: 475.0,
        "the reward threshold with which the id is registered",
    ),
    Case(
        "Acrobot-v1",
        "every default",
        pgengine.TrainingSpec(environment=pgengine.GymnasiumSpec(id="Acrobot-v1")),
        None,
        lambda _: -100.0,
        "the reward threshold with which the id is registered; never swinging up is -500",
    ),
    Case(
        "Particle-v0",
        "MLP of 32, Adam 0.02, 100 updates",
        case(
            pgengine.GymnasiumSpec(id="pgengine/Particle-v0"),
            MlpPolicySpec(hidden=[32]),
            {"optimizer": adam(0.02)},
            {"updates": 100},
        ),
        known(-2.7378),
        lambda best: best - 0.05 * (best + 36.667),
        "95% of the way from staying (-36.667) to the best",
        episodes=400,
    ),
    Case(
        "ParticleContinuous-v0",
        "MLP of 32, Adam 0.02, 100 updates",
        case(
            pgengine.GymnasiumSpec(id="pgengine/ParticleContinuous-v0"),
            MlpPolicySpec(hidden=[32]),
            {"optimizer": adam(0.02)},
            {"updates": 100},
        ),
        known(-1.35),
        lambda best: best - 0.05 * (best + 100.0 / 3.0),
        "95% of the way from staying (-33.333) to the best",
        episodes=400,
    ),
    Case(
        "Pendulum-v1",
        "MLP of 32, 32, sigma 1 at the start, neural value of 32, 32, gamma 0.95 without gamma^t, Adam 0.01, "
        "200 updates",
        case(
            pgengine.GymnasiumSpec(id="Pendulum-v1"),
            MlpPolicySpec(hidden=[32, 32], distribution=GaussianSpec(initial_sigma=1.0)),
            {
                "gamma": 0.95,
                "discount_weight": "none",
                "baseline": {"kind": "neural_value", "hidden": [32, 32]},
                "optimizer": adam(0.01),
            },
            {"updates": 200},
        ),
        lambda _: pendulum_optimum(),
        lambda _: -400.0,
        "who never swings up gets about -900 to -1,250, who does and holds about -250 or better; the optimum counts "
        "no noise of the actions",
    ),
    Case(
        "TMaze-v0, transformer",
        "window 5, width 32, Adam 0.003, K = 32, 100 updates",
        case(
            pgengine.GymnasiumSpec(id="pgengine/TMaze-v0"),
            TransformerPolicySpec(window=5),
            {"trajectories": 32, "optimizer": adam(0.003)},
            {"updates": 100},
        ),
        known(1.0),
        lambda _: 0.95,
        "the cue is remembered in 9 of 10 episodes; a policy without memory gets 0.5",
        episodes=400,
    ),
    Case(
        "TMaze-v0, MLP",
        "64, 64, Adam 0.003, K = 32, 100 updates",
        case(
            pgengine.GymnasiumSpec(id="pgengine/TMaze-v0"),
            MlpPolicySpec(),
            {"trajectories": 32, "optimizer": adam(0.003)},
            {"updates": 100},
        ),
        stationary_optimum,
        lambda best: best,
        "**at most** one half: without memory the cue is lost, whatever is learned",
        exact=True,
        is_upper=True,
    ),
]


def trained(case: Case, seed: int) -> Result:
    """Trains one policy and measures it."""
    spec = case.spec.model_copy(update={"seed": seed})
    facts = pgengine.describe(spec.environment)
    label = pgengine.label(pgengine.resolve(spec, facts), facts)
    began = time.perf_counter()
    update = deque(pgengine.train(spec), maxlen=1).pop()
    seconds = time.perf_counter() - began
    opened = pgengine.open_environment(spec.environment)
    try:
        best = None if case.best is None else case.best(opened)
        fresh = pgengine.evaluate(update.policy, opened, episodes=case.episodes, seed=seed)
        J = pgengine.exact_return(update.policy, opened, gamma=1.0) if case.exact else fresh.mean_return
    finally:
        opened.close()
    assert fresh.deterministic_mean_return is not None
    threshold = case.threshold(float("nan") if best is None else best)
    return Result(
        J=J,
        interval=None if case.exact else _interval(fresh),
        mode=fresh.deterministic_mean_return,
        best=best,
        threshold=threshold,
        passed=threshold + EXACTLY >= J if case.is_upper else threshold <= J,
        update=update,
        seconds=seconds,
        label=label.kind,
    )


def _interval(evaluation: pgengine.Evaluation) -> tuple[float, float]:
    low, high = evaluation.confidence_interval
    return (-math.inf if low is None else low, math.inf if high is None else high)


HEAD = [
    "what",
    "seed",
    "label",
    "stopped by",
    "env_steps",
    "seconds",
    "J",
    "95% interval",
    "of the mode",
    "best",
    "threshold",
    "reached",
]


def row(case: Case, seed: int, result: Result) -> str:
    """One line of the table."""
    digits = 3 if abs(result.threshold) < 50 else 1
    interval = result.interval
    progress = result.update.progress
    cells = [
        case.name,
        str(seed),
        result.label,
        f"{result.update.stopped_by} at {result.update.updates}",
        f"{progress.env_steps:,}",
        f"{result.seconds:.1f}",
        f"{result.J:.{digits}f}",
        "exact" if interval is None else f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}",
        f"{result.mode:.{digits}f}",
        "" if result.best is None else f"{result.best:.{digits}f}",
        f"{'at most ' if case.is_upper else ''}{result.threshold:.{digits}f}",
        "yes" if result.passed else "**no**",
    ]
    return f"| {' | '.join(cells)} |"


def table(cases: list[Case], seeds: int) -> Iterator[tuple[str, bool]]:
    """Lines of a dated table, and whether what they tell is as it should be."""
    today = datetime.datetime.now(datetime.UTC).date()
    yield f"{today}, {os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}", True
    yield "", True
    yield f"| {' | '.join(HEAD)} |", True
    yield f"|{'---|' * len(HEAD)}", True
    for case in cases:
        for seed in range(seeds):
            result = trained(case, seed)
            yield row(case, seed, result), result.passed


def reasons(cases: list[Case]) -> Iterator[str]:
    """What was set, and why the thresholds are what they are."""
    yield from ("", "## Settings and thresholds", "", "| what | settings | threshold |", "|---|---|---|")
    for case in cases:
        yield f"| {case.name} | {case.settings} | {case.reason} |"


# --- what is not learned ----------------------------------------------------------------------------------------------


UNSOLVED = {
    "MountainCar-v0, every default": pgengine.TrainingSpec(
        environment=pgengine.GymnasiumSpec(id="MountainCar-v0"),
        stop=pgengine.StopSpec(updates=100),
        diagnostics_every=0,
    ),
    "Pendulum-v1 as above, but gamma 1 and 300 updates": case(
        pgengine.GymnasiumSpec(id="Pendulum-v1"),
        MlpPolicySpec(hidden=[32, 32], distribution=GaussianSpec(initial_sigma=1.0)),
        {"baseline": {"kind": "neural_value", "hidden": [32, 32]}, "optimizer": adam(0.01)},
        {"updates": 300},
    ),
}


def unsolved(seeds: int) -> Iterator[str]:
    """What plain policy gradient does not solve, with numbers."""
    yield from ("", "## What it does not solve, or not always", "")
    yield "| what | seed | label | episodes | of them ended before the limit | updates with an estimate of zero | J |"
    yield "|---|---|---|---|---|---|---|"
    for name, spec in UNSOLVED.items():
        for seed in range(seeds):
            yield _unsolved(name, spec.model_copy(update={"seed": seed}))
    yield ""
    yield (
        "In MountainCar-v0 every step costs 1 until the goal, which a policy that is not there yet does not reach "
        "within 200 steps: all returns are alike, the leave-one-out baseline leaves weights of zero, and there is "
        "nothing to learn from. That is no defect of the estimate: the gradient is that small. Exploration is not part "
        "of the method. In Pendulum-v1 the exact estimate of the gradient of the undiscounted return has the noise of "
        "up to 200 rewards in the weight of each action, and some runs settle on swinging without getting up; a "
        "discount of 0.95 without gamma^t cuts the noise, and is labelled for what it is."
    )


def _unsolved(name: str, spec: pgengine.TrainingSpec) -> str:
    facts = pgengine.describe(spec.environment)
    label = pgengine.label(pgengine.resolve(spec, facts), facts).kind
    ended, zeros = 0.0, 0
    for update in pgengine.train(spec):
        ended += (1.0 - update.metrics["truncated_fraction"]) * spec.algorithm.trajectories
        zeros += update.metrics["gradient_norm"] == 0.0
    fresh = pgengine.evaluate(update.policy, spec.environment, seed=spec.seed)
    episodes = update.progress.episodes
    share = f"{round(ended):,} ({ended / episodes:.1%})"
    of_all = f"{zeros} of {update.updates}"
    cells = [name, str(spec.seed), label, f"{episodes:,}", share, of_all, f"{fresh.mean_return:.1f}"]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--output", type=Path, help="a file for the table")
    options = parser.parse_args()
    cases = [case for case in CASES if options.only is None or options.only in case.name]
    lines, passed = [], True
    for line, as_it_should in table(cases, options.seeds):
        print(line, flush=True)
        lines.append(line)
        passed = passed and as_it_should
    for line in reasons(cases):
        print(line, flush=True)
        lines.append(line)
    if options.only is None:
        for line in unsolved(options.seeds):
            print(line, flush=True)
            lines.append(line)
    if options.output is not None:
        options.output.write_text("# Learning\n\n`python benchmarks/learning.py`: " + "\n".join(lines) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
