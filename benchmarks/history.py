"""What it costs to read a long job: processor time of the API for one page of events and one set of curves.

    python benchmarks/history.py [--updates 1000 50000] [--database URL]

Makes a job of so many updates in reports of 500, as a worker would ten times a second, in a SQLite file of its own or
in an empty database; asks the application without a socket; prints medians of the processor time of this process.
"""

import argparse
import asyncio
import math
import statistics
import tempfile
import time
from collections.abc import Sequence

import httpx

from migrations import migrate
from server.app import create_app
from server.database import Database
from server.jobs import history, store
from server.jobs.reports import Measured, Progress, Report
from server.settings import Settings

REPORT = 500
BANDIT = {
    "kind": "tabular",
    "transitions": [[[1.0], [1.0]]],
    "rewards": [[0.0, 1.0]],
    "initial": [1.0],
    "horizon": 1,
}


def measured(update: int) -> Measured:
    """One update with every metric, none of them a round number."""
    values = {name: math.sin(update + place) for place, name in enumerate(history.METRICS)}
    return Measured(update, 10 * update, values | {"env_steps": 10.0 * update})


def fill(database: Database, updates: int) -> float:
    """Report so many updates of the queued job; returns seconds for each report."""
    with database.write() as session:
        claim = store.claim(session, "worker", 3600.0)
        assert claim is not None
    began = time.perf_counter()
    for first in range(1, updates + 1, REPORT):
        part = tuple(measured(update) for update in range(first, min(first + REPORT, updates + 1)))
        with database.write() as session:
            store.report(session, claim.job_id, claim.token, Report(Progress(part[-1].update), part))
    return (time.perf_counter() - began) / math.ceil(updates / REPORT)


async def asked(client: httpx.AsyncClient, path: str, rounds: int) -> tuple[float, int]:
    """Median processor time in milliseconds of a request, and the size of its answer."""
    times, size = [], 0
    for _ in range(rounds):
        began = time.process_time()
        answer = await client.get(path)
        times.append(1000 * (time.process_time() - began))
        answer.raise_for_status()
        size = len(answer.content)
    return statistics.median(times), size


async def measure(database: Database, updates: int, rounds: int) -> None:
    """Print one line for each request."""
    app = create_app(Settings(no_auth=True), database)
    async with (
        app.fastapi.router.lifespan_context(app.fastapi),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost:8000") as client,
    ):
        job = (await client.post("/v1/training-jobs", json={"environment": BANDIT})).json()["id"]
        seconds = await asyncio.to_thread(fill, database, updates)
        print(f"{updates:,} updates, written in reports of {REPORT}: {1000 * seconds:.1f} ms each")
        for what in (
            "metrics?max_points=1000",
            "metrics?max_points=1000&keys=mean_return",
            "metrics?max_points=10000&keys=mean_return",
            f"metrics?from_update={max(1, updates - 500)}",
            "events?limit=100",
        ):
            time_, size = await asked(client, f"/v1/training-jobs/{job}/{what}", rounds)
            print(f"    {what:42} {time_:8.1f} ms {size / 1000:10,.0f} kB")
        await client.post(f"/v1/training-jobs/{job}/cancel")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each number of updates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, nargs="+", default=[1000, 50_000])
    parser.add_argument("--database", default=None)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    for updates in options.updates:
        with tempfile.TemporaryDirectory() as directory:
            database = Database(options.database or f"sqlite:///{directory}/pgengine.db")
            migrate(database)
            asyncio.run(measure(database, updates, options.rounds))
            database.dispose()


if __name__ == "__main__":
    main()
