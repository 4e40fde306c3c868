"""Where stochastic gradient ascent goes: the numbers and figures of docs/engine/convergence.md.

    python benchmarks/convergence.py [--updates 20000] [--seeds 5] [--output docs/engine]

All gradients that are shown are exact ones, taken at the parameters that training has reached with sampled ones.
"""

import argparse
import datetime
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

import pgengine
from pgengine.exact import best_stationary
from pgengine.score_function import draw_samples, score_function_gradient
from pgengine.spec import AdamSpec, LinearPolicySpec, ScheduleSpec, SgdSpec

CORRIDOR = pgengine.GymnasiumSpec(id="pgengine/Aliased-v0")
"""Three cells that look alike: one parameter matters, and the best policy is a random one, inside the simplex."""

LEARNING_RATE = 0.01  # the curvature at the optimum is 11.3, so a step of 0.01 takes a ninth of the way
SCALE = 20.0  # LEARNING_RATE * SCALE * 11.3 is 2.3, and must exceed 1/2 for the error to fall as 1 / sqrt(updates)
SATURATED = -20.0  # log-odds of going right at which the softmax is flat: a chance of 2e-9
POINTS = 200  # at which a run is measured
TOO_LARGE = 1.0  # a step that throws the parameters out to where the softmax is flat


@dataclass(frozen=True)
class Track:
    """A run, measured exactly after some of its updates.

    Attributes:
        updates: [n] when.
        J: [n] exact J.
        norms: [n] norm of the exact gradient.
        policy: Where it ended.
    """

    updates: list[int]
    J: list[float]
    norms: list[float]
    policy: pgengine.Policy


def corridor_policy(log_odds: float) -> LinearPolicySpec:
    """The policy that goes right with these log-odds."""
    return LinearPolicySpec(initial_parameters={"theta": [[-log_odds / 2.0, log_odds / 2.0]]})


def exact_norm(policy: pgengine.Policy, environment: pgengine.EpisodeEnvironment) -> float:
    """Norm of the exact gradient of the undiscounted return."""
    return float(torch.linalg.vector_norm(pgengine.exact_gradient(policy, environment, gamma=1.0)))


def climb_corridor(
    *,
    updates: int,
    seed: int,
    log_odds: float = 0.0,
    learning_rate: float = LEARNING_RATE,
    scale: float | None = SCALE,
    trajectories: int = 16,
    points: int = POINTS,
) -> Track:
    """SGD in the corridor, with steps learning_rate / (1 + u / scale), or constant ones without a scale."""
    schedule = ScheduleSpec() if scale is None else ScheduleSpec(kind="inverse_time", scale=scale)
    spec = pgengine.TrainingSpec(
        environment=CORRIDOR,
        policy=corridor_policy(log_odds),
        algorithm=pgengine.AlgorithmSpec(
            trajectories=trajectories, optimizer=SgdSpec(learning_rate=learning_rate, schedule=schedule)
        ),
        stop=pgengine.StopSpec(updates=updates),
        diagnostics_every=0,
        seed=seed,
    )
    return track(spec, points)


def track(spec: pgengine.TrainingSpec, points: int = POINTS) -> Track:
    """Trains, and measures before the first update and after some others, evenly spaced in their logarithm."""
    environment = pgengine.open_environment(spec.environment)
    begin = pgengine.create_policy(spec.policy, spec.environment, environment.facts, seed=spec.seed)
    last = spec.stop.updates or 1
    wanted = set(np.unique(np.geomspace(last, 1, points).round().astype(int)).tolist())
    measured = [(0, begin.copy())]
    for update in pgengine.train(spec, environment=environment, policy=begin):
        if update.updates in wanted:
            measured.append((update.updates, update.policy.copy()))
    return Track(
        updates=[updates for updates, _ in measured],
        J=[pgengine.exact_return(policy, environment, gamma=1.0) for _, policy in measured],
        norms=[exact_norm(policy, environment) for _, policy in measured],
        policy=measured[-1][1],
    )


def corridor_optimum() -> float:
    """The best J of a policy without memory."""
    return best_stationary(pgengine.open_environment(CORRIDOR), gamma=1.0).J


# --- plateaus that learning runs into ---------------------------------------------------------------------------------


def linear_run(environment: pgengine.GymnasiumSpec, rate: float, K: int, updates: int, seed: int) -> Track:
    """Adam on a linear policy, with the exact estimate."""
    return track(
        pgengine.TrainingSpec(
            environment=environment,
            policy=LinearPolicySpec(),
            algorithm=pgengine.AlgorithmSpec(trajectories=K, optimizer=AdamSpec(learning_rate=rate)),
            stop=pgengine.StopSpec(updates=updates, target_return=None),
            diagnostics_every=0,
            seed=seed,
        )
    )


FROZEN_LAKE = pgengine.GymnasiumSpec(id="FrozenLake-v1")
CLIFF = pgengine.GymnasiumSpec(id="CliffWalking-v1", max_episode_steps=100)
MET = [
    ("FrozenLake-v1, Adam 0.1, K = 64, 500 updates", FROZEN_LAKE, 0.1, 64, 500),
    ("FrozenLake-v1, Adam 0.3, K = 64, 500 updates", FROZEN_LAKE, 0.3, 64, 500),
    ("CliffWalking-v1, 100 steps, Adam 0.1, K = 64, 500 updates", CLIFF, 0.1, 64, 500),
    ("CliffWalking-v1, 100 steps, Adam 0.2, K = 64, 500 updates", CLIFF, 0.2, 64, 500),
]


def met(seeds: int) -> Iterator[str]:
    """Lines of a table of where runs came to rest."""
    yield "| run | best J | J at the end | norm of the exact gradient at the start | largest | at the end |"
    yield "|---|---|---|---|---|---|"
    for name, environment, rate, K, updates in MET:
        best = best_stationary(pgengine.open_environment(environment), gamma=1.0).J
        for seed in range(seeds):
            run = linear_run(environment, rate, K, updates, seed)
            norms = f"{run.norms[0]:.2g} | {max(run.norms):.2g} | {run.norms[-1]:.2g}"
            yield f"| {name}, seed {seed} | {best:.4g} | {run.J[-1]:.4g} | {norms} |"


# --- mass moves to where f is large -----------------------------------------------------------------------------------


def staircase(x: torch.Tensor) -> torch.Tensor:
    """A low hill at -2 and a high one at 2, cut into stairs: its derivative is zero wherever it exists."""
    smooth = 0.49 * torch.exp(-((x + 2.0) ** 2)) + 0.99 * torch.exp(-((x - 2.0) ** 2) / 2.0)
    return (smooth * 10.0).floor() / 10.0


def move_mass(updates: int, *, seed: int, samples: int = 200, learning_rate: float = 0.2) -> list[tuple[float, float]]:
    """Mean and deviation of a normal distribution before and after each step up the gradient of E[f(x)]."""

    def make(p: dict[str, torch.Tensor]) -> torch.distributions.Distribution:
        return torch.distributions.Normal(p["mean"], p["log_sigma"].exp())

    theta = {"mean": torch.tensor(-1.0), "log_sigma": torch.tensor(1.5).log()}
    path = [(float(theta["mean"]), float(theta["log_sigma"].exp()))]
    for u in range(updates):
        x = draw_samples(make(theta), samples, seed=seed + u)
        estimate = score_function_gradient(make, lambda x, _: staircase(x), theta, x)
        theta = {name: value + learning_rate * estimate.gradient[name] for name, value in theta.items()}
        path.append((float(theta["mean"]), float(theta["log_sigma"].exp())))
    return path


# --- figures ----------------------------------------------------------------------------------------------------------


def draw_convergence(falling: list[Track], constant: list[Track], optimum: float, file: Path) -> None:
    """Norm of the exact gradient, and distance of J from the optimum, with steps that fall and that do not."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for tracks, colour, name in ((constant, "tab:orange", "constant step"), (falling, "tab:blue", "falling step")):
        u = np.array(tracks[0].updates[1:])
        norms = np.array([t.norms[1:] for t in tracks])
        gaps = np.array([optimum - np.array(t.J[1:]) for t in tracks])
        for axes, values in ((left, norms), (right, gaps)):
            axes.loglog(u, values.T, color=colour, alpha=0.2, linewidth=0.6)
        left.loglog(_binned(u), np.sqrt(_binned((norms**2).mean(axis=0))), color=colour, linewidth=2, label=name)
        right.loglog(_binned(u), _binned(gaps.mean(axis=0)), color=colour, linewidth=2, label=name)
    reference = np.array([100.0, falling[0].updates[-1]])
    left.loglog(reference, 12.0 / np.sqrt(reference), "k--", linewidth=1, label="1 / sqrt(updates)")
    right.loglog(reference, 20.0 / reference, "k--", linewidth=1, label="1 / updates")
    left.set(xlabel="updates", title="norm of the exact gradient")
    right.set(xlabel="updates", title="optimum minus exact J")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.suptitle(f"SGD in the aliased corridor, {len(falling)} seeds each (thin), and their mean (thick)")
    _keep(figure, file)


def _binned(values: np.ndarray, size: int = 10) -> np.ndarray:
    """Means of about so many neighbours."""
    return np.array([part.mean() for part in np.array_split(values, max(1, len(values) // size))])


def draw_plateau(tracks: dict[str, Track], file: Path) -> None:
    """J and the norm of its gradient over the one parameter that matters, and runs that do and do not get away."""
    import matplotlib.pyplot as plt

    environment = pgengine.open_environment(CORRIDOR)
    odds = np.linspace(-25.0, 25.0, 401)
    policies = [
        pgengine.create_policy(corridor_policy(float(d)), CORRIDOR, environment.facts, seed=0) for d in odds.tolist()
    ]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    left.plot(odds, [pgengine.exact_return(p, environment, gamma=1.0) for p in policies], color="tab:blue")
    left.set(xlabel="log-odds of going right", title="exact J (blue) and norm of its gradient (red)")
    left.tick_params(axis="y", colors="tab:blue")
    beside = left.twinx()
    beside.semilogy(odds, [exact_norm(p, environment) for p in policies], color="tab:red")
    beside.tick_params(axis="y", colors="tab:red")
    left.grid(alpha=0.3)
    for (name, run), colour in zip(tracks.items(), ("tab:blue", "tab:orange", "tab:red"), strict=True):
        label = f"{name}: J = {run.J[-1]:.1f}"
        right.loglog([1 + u for u in run.updates], np.maximum(run.norms, 1e-16), color=colour, label=label)
    right.set(xlabel="1 + updates", title="norm of the exact gradient along a run", ylim=(1e-14, 1e3))
    right.grid(alpha=0.3)
    right.legend(frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    _keep(figure, file)


def draw_mass(path: list[tuple[float, float]], file: Path) -> None:
    """The density on its way to where f is large."""
    import matplotlib.pyplot as plt

    x = torch.linspace(-5.0, 5.0, 1001)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    left.fill_between(x, staircase(x), color="0.85", step="mid", label="f(x)")
    shown = [0, 20, 60, 120, len(path) - 1]
    for u, colour in zip(shown, plt.get_cmap("viridis")(np.linspace(0.0, 0.9, len(shown))), strict=True):
        mean, deviation = path[u]
        density = torch.distributions.Normal(mean, deviation).log_prob(x).exp()
        left.plot(x, density, color=colour, label=f"after {u} steps")
    left.set(xlabel="x", title="density of P_theta over f", ylim=(0.0, 2.4))
    left.legend(frameon=False, fontsize="small", loc="upper left")
    right.plot([expected_height(*place) for place in path], color="tab:blue")
    right.set(xlabel="steps", title="E[f(x)]")
    right.grid(alpha=0.3)
    _keep(figure, file)


def expected_height(mean: float, deviation: float) -> float:
    """E[f(x)] of the normal distribution, by adding up the stairs on a fine grid."""
    x = torch.linspace(-12.0, 12.0, 24_001, dtype=torch.float64)
    density = torch.distributions.Normal(mean, deviation).log_prob(x).exp()
    return float((density * staircase(x)).sum() * (x[1] - x[0]))


def _keep(figure: object, file: Path) -> None:
    import matplotlib.pyplot as plt

    figure.savefig(file, dpi=90, metadata={"Software": None})  # type: ignore[attr-defined]
    plt.close("all")


# --- the page's numbers -----------------------------------------------------------------------------------------------


def milestones(name: str, tracks: list[Track], optimum: float) -> Iterator[str]:
    """Lines of a table: root mean square of the norm, mean distance of J, at some updates."""
    measured = np.array(tracks[0].updates)
    for at in sorted({int(np.abs(measured - wanted).argmin()) for wanted in (0, 100, 1000, 10_000, measured[-1])}):
        norms = np.array([t.norms[at] for t in tracks])
        gaps = np.array([optimum - t.J[at] for t in tracks])
        yield f"| {name} | {tracks[0].updates[at]:,} | {np.sqrt((norms**2).mean()):.3g} | {gaps.mean():.2g} |"


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=20_000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("docs/engine"), help="a folder for the figures")
    options = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    optimum = corridor_optimum()
    print(f"{datetime.datetime.now(datetime.UTC).date()}, optimum {optimum:.5f}\n")
    falling = [climb_corridor(updates=options.updates, seed=s) for s in range(options.seeds)]
    constant = [climb_corridor(updates=options.updates, seed=s, scale=None) for s in range(options.seeds)]
    draw_convergence(falling, constant, optimum, options.output / "convergence.png")
    print("| steps | after updates | norm of the exact gradient | optimum minus J |\n|---|---|---|---|")
    for name, tracks in (("falling", falling), ("constant", constant)):
        print("\n".join(milestones(name, tracks, optimum)))
    lost = climb_corridor(updates=1000, seed=0, learning_rate=TOO_LARGE)
    stuck = climb_corridor(updates=1000, seed=0, log_odds=SATURATED)
    tracks = {"from equal odds, step 0.01": falling[0], "the same, step 1": lost, "from log-odds -20": stuck}
    draw_plateau(tracks, options.output / "plateau.png")
    print("\n| run | J at the end | norm at the start | at the end |\n|---|---|---|---|")
    for name, run in tracks.items():
        print(f"| {name} | {run.J[-1]:.2f} | {run.norms[0]:.2g} | {run.norms[-1]:.2g} |")
    path = move_mass(300, seed=0)
    draw_mass(path, options.output / "score_function.png")
    print(
        f"\nE[f] from {expected_height(*path[0]):.3f} to {expected_height(*path[-1]):.3f}, mean and deviation", path[-1]
    )
    risen = sum(expected_height(*after) > expected_height(*before) for before, after in pairwise(path))
    print(f"{risen} of {len(path) - 1} steps raised it\n")
    print("\n".join(met(min(options.seeds, 3))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
