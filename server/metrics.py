"""What the server tells Prometheus about itself.

A registry of its own for each application, so that two of them in one process do not share numbers. What the process
counts by itself (requests, actions, streams) is counted here; what lies in the database (jobs, queue, leases) is read
when somebody scrapes and handed over as `JobFigures`. Labels are bounded: routes are templates, statuses are classes,
and no id ever becomes a label.
"""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

__all__ = ["CONTENT_TYPE", "JobFigures", "Metrics"]

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

# a second series beside each counter and histogram, with the time of its making, which nobody asks for
disable_created_metrics()  # type: ignore[no-untyped-call]

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_REQUEST_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_ACT_BUCKETS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)


@dataclass(frozen=True)
class JobFigures:
    """What the job table says at one moment.

    Attributes:
        jobs: Jobs by state, every state present.
        queue_age_seconds: Age of the oldest queued job; zero when the queue is empty.
        live_leases: Leases that have not expired.
        env_steps: Environment steps of training, over all stored jobs.
        updates: Updates of training, over all stored jobs.
    """

    jobs: Mapping[str, int]
    queue_age_seconds: float
    live_leases: int
    env_steps: int
    updates: int


class Metrics:
    """The numbers of one application. Safe to call from any thread."""

    def __init__(self, version: str) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "pgengine_requests",
            "HTTP requests that were answered.",
            ["route", "method", "status"],
            registry=self._registry,
        )
        self._request_seconds = Histogram(
            "pgengine_request_seconds",
            "Seconds from the request to the head of its answer.",
            ["route", "method"],
            buckets=_REQUEST_BUCKETS,
            registry=self._registry,
        )
        self._act_seconds = Histogram(
            "pgengine_act_seconds",
            "Seconds from the body of an act request to its answer.",
            buckets=_ACT_BUCKETS,
            registry=self._registry,
        )
        self._act_observations = Counter(
            "pgengine_act_observations", "Observations that were answered with an action.", registry=self._registry
        )
        self._open_streams = Gauge("pgengine_open_streams", "Event streams that are open.", registry=self._registry)
        Gauge("pgengine_build_info", "Always 1; the version is a label.", ["version"], registry=self._registry).labels(
            version
        ).set(1)
        # looking children up by their labels takes longer than counting, so each is looked up once
        self._cells: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        self._training = _Training()

    def request_finished(self, route: str, method: str, status: int, seconds: float) -> None:
        """Counts one request.

        Args:
            route: The template of the route, such as `/v1/policies/{policy_id}`, never the path itself.
            method: As it was sent.
            status: As it was answered.
            seconds: From the request to the head of the answer.
        """
        cell = self._cells.get((route, method, status))
        if cell is None:
            cell = self._cell(route, method, status)
        cell[0].inc()
        cell[1].observe(seconds)

    def _cell(self, route: str, method: str, status: int) -> tuple[Counter, Histogram]:
        verb = method if method in _METHODS else "other"
        cell = (self._requests.labels(route, verb, f"{status // 100}xx"), self._request_seconds.labels(route, verb))
        if verb == method:  # invented methods must not fill the table
            self._cells[route, method, status] = cell
        return cell

    def act_answered(self, observations: int, seconds: float) -> None:
        """Counts one answered act request and its observations."""
        self._act_seconds.observe(seconds)
        self._act_observations.inc(observations)

    def stream_opened(self) -> None:
        """Counts an event stream that begins."""
        self._open_streams.inc()

    def stream_closed(self) -> None:
        """Counts an event stream that has ended."""
        self._open_streams.dec()

    def exposition(self, figures: JobFigures | None) -> bytes:
        """Everything in Prometheus' text format.

        Args:
            figures: What the job table says; None when the database does not answer. Then nothing is said about jobs.
        """
        scrape = CollectorRegistry()
        scrape.register(_Scrape(figures, self._training.advance(figures)))
        return generate_latest(self._registry) + generate_latest(scrape)


class _Training:
    """Turns sums over the stored jobs into totals that never fall.

    A deleted job or a rewind after a crash makes the sum smaller; Prometheus would read that as a counter that began
    again and invent a burst of steps. So only what is added between two scrapes counts, from the first scrape on.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: tuple[int, int] | None = None
        self._totals = (0, 0)

    def advance(self, figures: JobFigures | None) -> tuple[int, int]:
        """Environment steps and updates since the first scrape."""
        with self._lock:
            if figures is not None:
                now = (figures.env_steps, figures.updates)
                last = self._last or now
                self._totals = (
                    self._totals[0] + max(0, now[0] - last[0]),
                    self._totals[1] + max(0, now[1] - last[1]),
                )
                self._last = now
            return self._totals


class _Scrape(Collector):
    """The families that are read from the database, made anew for each scrape: nothing stale can remain."""

    def __init__(self, figures: JobFigures | None, trained: tuple[int, int]) -> None:
        self._figures = figures
        self._trained = trained

    def collect(self) -> Iterator[Metric]:
        figures = self._figures
        yield GaugeMetricFamily(
            "pgengine_database_up", "1 if the database answered this scrape, otherwise 0.", value=figures is not None
        )
        if figures is None:
            return
        jobs = GaugeMetricFamily("pgengine_jobs", "Stored jobs by state.", labels=["state"])
        for state, count in figures.jobs.items():
            jobs.add_metric([state], count)
        yield jobs
        yield GaugeMetricFamily(
            "pgengine_queue_length", "Jobs that wait for a worker.", value=figures.jobs.get("queued", 0)
        )
        yield GaugeMetricFamily(
            "pgengine_queue_oldest_seconds",
            "Seconds that the oldest queued job has waited; 0 when none waits.",
            value=figures.queue_age_seconds,
        )
        yield GaugeMetricFamily(
            "pgengine_live_leases",
            "Jobs that a worker holds with a lease that has not expired.",
            value=figures.live_leases,
        )
        yield CounterMetricFamily(
            "pgengine_training_env_steps",
            "Environment steps of training since this process was first scraped.",
            value=self._trained[0],
        )
        yield CounterMetricFamily(
            "pgengine_training_updates",
            "Updates of training since this process was first scraped.",
            value=self._trained[1],
        )
