"""How often intervals hold the mean, and how often runs stop below their target: worlds with rare and skewed returns.

    python benchmarks/intervals.py --output benchmarks/intervals.md

Samples are drawn from distributions whose mean is known; no policy is played, so that there can be many.
"""

import argparse
import datetime
import math
from pathlib import Path

import numpy as np

from pgengine.intervals import ReturnRange, lower_bound, mean_interval

UNIT = ReturnRange(low=0.0, high=1.0)
COIN = ReturnRange(low=0.0, high=1.0, two_values=True)
SAMPLES = 1000
RUNS = 300
EPISODES = 100
LOOKS = 10  # of a run, each at a policy that is worth the same

WORLDS: dict[str, tuple[list[float], list[float]]] = {
    "coin 0.5": ([0, 1], [0.5, 0.5]),
    "coin 0.98": ([0, 1], [0.02, 0.98]),
    "coin 0.01": ([0, 1], [0.99, 0.01]),
    "coin 0.999": ([0, 1], [0.001, 0.999]),
    "0.6 with probability 0.05, else 1": ([0.6, 1], [0.05, 0.95]),
    "1 with probability 0.01, else 0 or 0.1": ([0, 0.1, 1], [0.5, 0.49, 0.01]),
    "0 with probability 0.005, else 0.9 to 1": ([0, 0.9, 0.95, 1], [0.005, 0.3, 0.3, 0.395]),
    "0, 0.25, 0.5, 0.75 or 1": ([0, 0.25, 0.5, 0.75, 1], [0.2] * 5),
}


HEAD = """# Intervals and targets, simulated

`python benchmarks/intervals.py`, {today:%Y-%m-%d}. {samples:,} samples of {episodes} returns, and {runs:,} runs of
{looks} looks at policies that are all worth the mean, with a target just above it. Promised by all but `t`: 0.95 held,
and at most 0.05 of the runs stopped. Where all returns of a sample are alike `t` gives no interval; here it counts as
one of width zero, which is what its formula says.
"""


def coverage(values: np.ndarray, chances: np.ndarray, known: ReturnRange | None) -> tuple[float, float, float]:
    """Share of intervals that hold the mean, their mean width, and the share of those without any width."""
    generator, mean = np.random.default_rng(0), float(values @ chances)
    held, widths, points = 0, [], 0
    for sample in generator.choice(values, p=chances, size=(SAMPLES, EPISODES)):
        found = mean_interval(sample, known)
        alike = sample.min() == sample.max()
        if known is None and alike:  # as an interval of width zero, which is what the formula gives
            held, points = held + bool(np.isclose(sample[0], mean)), points + 1
            continue
        held += found.low <= mean <= found.high
        widths.append(found.high - found.low)
    return held / SAMPLES, float(np.mean(widths)), points / SAMPLES


def stopped(values: np.ndarray, chances: np.ndarray, known: ReturnRange | None) -> float:
    """Share of runs of LOOKS looks that stop at a target just above the mean."""
    generator, mean = np.random.default_rng(1), float(values @ chances)
    target = mean + 1e-9
    stops = 0
    for _ in range(RUNS):
        for look in range(1, LOOKS + 1):
            sample = generator.choice(values, p=chances, size=EPISODES)
            error = 0.05 / (look * (look + 1))
            low, _ = lower_bound(sample, known, error, planned=EPISODES)
            if known is not None and low < target <= sample.mean():
                sample = np.concatenate([sample, generator.choice(values, p=chances, size=EPISODES)])
                low, _ = lower_bound(sample, known, error, planned=EPISODES)
            if low >= target:
                stops += 1
                break
    return stops / RUNS


def table() -> list[str]:
    """One row for each world."""
    head = ["returns", "mean", "held by `t`", "of width zero", "held by `betting`", "held by `clopper_pearson`"]
    head += ["width, `t`, if any", "width, proven", "runs stopped by `t`", "runs stopped by `betting`"]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, (given, odds) in WORLDS.items():
        values, chances = np.array(given, dtype=float), np.array(odds)
        t, bet = coverage(values, chances, None), coverage(values, chances, UNIT)
        two = coverage(values, chances, COIN) if set(given) == {0, 1} else (math.nan, bet[1], 0.0)
        cells = [name, f"{values @ chances:.4g}", f"{t[0]:.3f}", f"{t[2]:.3f}", f"{bet[0]:.3f}"]
        cells += ["-" if math.isnan(two[0]) else f"{two[0]:.3f}", f"{t[1]:.3f}", f"{two[1]:.3f}"]
        cells += [f"{stopped(values, chances, None):.3f}", f"{stopped(values, chances, UNIT):.3f}"]
        rows.append(f"| {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Simulate and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="Markdown file to write")
    chosen = parser.parse_args()
    today = datetime.datetime.now(datetime.UTC)
    today = datetime.datetime.now(datetime.UTC)
    head = HEAD.format(today=today, samples=SAMPLES, episodes=EPISODES, runs=RUNS, looks=LOOKS)
    text = [head, *table(), ""]
    chosen.output.write_text("\n".join(text))


if __name__ == "__main__":
    main()
