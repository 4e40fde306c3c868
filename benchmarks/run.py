"""All comparisons in one run, and one table of ratios: `make bench`.

    python benchmarks/run.py [--rounds 5] [--seconds 5] [--seeds 20]

Machines are noisy, so each row is a ratio of medians whose two sides were measured in turn, in this run. The time to a
trained policy has no other side; it stands against its bound. The status is 1 if a ratio is below what is required.
"""

import argparse
import datetime
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import act
import time_to_policy


@dataclass(frozen=True)
class Ratio:
    """One line of the table: more is better."""

    what: str
    against: str
    ratio: float
    required: float | None

    @property
    def reached(self) -> bool:
        """Whether it is what is required."""
        return self.required is None or self.ratio >= self.required


POST_SECONDS = 5.0
"""POST to succeeded of the shortest CartPole-v1 body on a warm worker, median."""

SOLVED = 0.95
"""Share of the seeds whose policy has a mean return of 475 or more on fresh episodes."""


def ratios(rounds: int, seconds: float, seeds: int) -> Iterator[Ratio]:
    """Measures one after another; what each benchmark prints stands above the table."""
    print("## act, one observation\n", flush=True)
    one = act.compare(rounds, seconds, connections=32, batch=1)
    yield Ratio("act, one observation, requests/s", "an echo of the same body in FastAPI", one, 0.6)
    print("\n## act, 256 observations\n", flush=True)
    many = act.compare(rounds, seconds, connections=8, batch=256)
    yield Ratio("act, 256 observations, requests/s", "an echo of one observation in FastAPI", many, None)
    print("\n## time to a policy\n", flush=True)
    jobs = time_to_policy.measure(seeds)
    median = time_to_policy.median_seconds(jobs)
    yield Ratio(f"POST to succeeded, {median:.2f} s", f"{POST_SECONDS:g} s", POST_SECONDS / median, 1.0)
    share = time_to_policy.solved(jobs) / len(jobs)
    yield Ratio(f"policies at {time_to_policy.TARGET:g} or more", f"{len(jobs)} seeds", share, SOLVED)


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side of act")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each of them")
    parser.add_argument("--seeds", type=int, default=20, help="jobs of the time to a policy")
    options = parser.parse_args()
    rows = list(ratios(options.rounds, options.seconds, options.seeds))
    today = datetime.datetime.now(datetime.UTC).date()
    print(f"\n{today}, {os.cpu_count()} cores ({platform.machine()}), medians of {options.rounds}\n")
    print("| what | against | ratio | required |\n|---|---|---:|---:|")
    for row in rows:
        required = "" if row.required is None else f"{row.required:.2f}"
        print(f"| {row.what} | {row.against} | {row.ratio:.2f} | {required}{'' if row.reached else ' **missed**'} |")
    return 0 if all(row.reached for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
