"""How long from a POST to a trained policy, on a warm worker?

    python benchmarks/time_to_policy.py [--seeds 20] [--require-median 5] [--require-solved 19]

Starts the project's server with one worker (SQLite, default settings), lets one job warm it up, then posts the
shortest CartPole-v1 body with one seed after another. A job's time is from before the POST until its terminal event
has come over the event stream: queue, training, selection and the evaluation on 100 fresh episodes included.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

KEY = "benchmark-key-of-one-run"
TARGET = 475.0
BODY: dict[str, Any] = {"environment": {"kind": "gymnasium", "id": "CartPole-v1"}}


@dataclass(frozen=True)
class Job:
    """One job, as its client saw it."""

    seed: int
    seconds: float
    training_seconds: float
    updates: int
    env_steps: int
    mean_return: float


@contextmanager
def served() -> Iterator[httpx.Client]:
    """A client of a server of its own, with one worker."""
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryFile("w+") as log:
        ours = {"DATA_DIR": directory, "API_KEY": KEY, "HOST": "127.0.0.1", "PORT": "0", "WORKERS": "1"}
        others = {name: value for name, value in os.environ.items() if not name.startswith("PGENGINE_")}
        process = subprocess.Popen(
            [sys.executable, "-m", "server", "serve"],
            env=others | {f"PGENGINE_{name}": value for name, value in ours.items()},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            with httpx.Client(base_url=_url(process, log), timeout=600, trust_env=False) as client:
                client.headers["authorization"] = f"Bearer {KEY}"
                yield client
        finally:
            process.terminate()
            process.wait(timeout=60)


def _url(process: subprocess.Popen[str], log: Any) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("API "):
            return line.split()[1]
    log.seek(0)
    raise SystemExit(f"the server did not start:\n{log.read()}")


def train(client: httpx.Client, seed: int) -> Job:
    """Posts one job and follows it to its end."""
    began = time.perf_counter()
    answer = client.post("/v1/training-jobs", json=BODY | {"seed": seed}).raise_for_status()
    path = f"/v1/training-jobs/{answer.json()['id']}"
    training_seconds, last = 0.0, {}
    with client.stream("GET", f"{path}/events", headers={"accept": "text/event-stream"}) as stream:
        for line in stream.iter_lines():
            if line.startswith("data:"):
                last = json.loads(line.removeprefix("data:"))
                for row in last["data"].get("metrics", ()):
                    training_seconds += row["rollout_seconds"] + row["update_seconds"]
    seconds = time.perf_counter() - began
    if last.get("data", {}).get("status") != "succeeded":
        raise SystemExit(f"seed {seed}: the stream ended with {last}")
    job = client.get(path).raise_for_status().json()
    progress, mean_return = job["progress"], job["result"]["evaluation"]["mean_return"]
    return Job(seed, seconds, training_seconds, progress["updates"], progress["env_steps"], mean_return)


def measure(seeds: int) -> list[Job]:
    """One job for each seed, printed as they end."""
    jobs = []
    with served() as client:
        train(client, seeds)  # warms up: imports, caches, the first update
        print("| seed | POST to succeeded, s | of it updates, s | updates | env_steps | mean of 100 fresh episodes |")
        print("|---:|---:|---:|---:|---:|---:|")
        for seed in range(seeds):
            job = train(client, seed)
            jobs.append(job)
            print(
                f"| {job.seed} | {job.seconds:.2f} | {job.training_seconds:.2f} | {job.updates} | {job.env_steps:,} "
                f"| {job.mean_return:.1f} |",
                flush=True,
            )
    return jobs


def solved(jobs: list[Job]) -> int:
    """How many policies reached the target on fresh episodes."""
    return sum(job.mean_return >= TARGET for job in jobs)


def median_seconds(jobs: list[Job]) -> float:
    """Median time from POST to succeeded."""
    return statistics.median(job.seconds for job in jobs)


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--require-median", type=float, default=None, help="exit 1 above so many seconds")
    parser.add_argument("--require-solved", type=int, default=None, help="exit 1 below so many policies")
    options = parser.parse_args()
    jobs = measure(options.seeds)
    median, worst = median_seconds(jobs), max(job.seconds for job in jobs)
    print(
        f"\nPOST to succeeded: median {median:.2f} s, worst {worst:.2f} s; "
        f"{solved(jobs)} of {len(jobs)} with a mean return of {TARGET:.0f} or more"
    )
    slow = options.require_median is not None and median > options.require_median
    poor = options.require_solved is not None and solved(jobs) < options.require_solved
    return 1 if slow or poor else 0


if __name__ == "__main__":
    sys.exit(main())
