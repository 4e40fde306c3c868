"""What the server tells Prometheus: readable by Prometheus' own parser, bounded, documented, and true."""

import re
from pathlib import Path

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from server.metrics import JobFigures, Metrics

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


def figures(env_steps: int = 0, updates: int = 0) -> JobFigures:
    return JobFigures({"queued": 2, "running": 1}, 12.5, 1, env_steps, updates)


def parsed(metrics: Metrics, at: JobFigures | None) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(metrics.exposition(at).decode())}


def value(families: dict[str, Metric], sample: str, **labels: str) -> float:
    found = [s.value for family in families.values() for s in family.samples if s.name == sample and s.labels == labels]
    assert len(found) == 1, f"{sample}{labels}"
    return found[0]


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("1.2.3")


def test_requests_are_counted_by_template_method_and_class(metrics: Metrics) -> None:
    for status in (200, 201, 404):
        metrics.request_finished("/v1/policies/{policy_id}", "GET", status, 0.003)
    families = parsed(metrics, figures())
    route = {"route": "/v1/policies/{policy_id}", "method": "GET"}
    assert value(families, "pgengine_requests_total", **route, status="2xx") == 2
    assert value(families, "pgengine_requests_total", **route, status="4xx") == 1
    assert value(families, "pgengine_request_seconds_count", **route) == 3
    assert value(families, "pgengine_request_seconds_bucket", **route, le="0.0025") == 0
    assert value(families, "pgengine_request_seconds_bucket", **route, le="0.005") == 3


def test_invented_methods_make_one_series(metrics: Metrics) -> None:
    for number in range(1000):
        metrics.request_finished("unmatched", f"METHOD{number}", 405, 0.001)
    families = parsed(metrics, figures())
    assert value(families, "pgengine_requests_total", route="unmatched", method="other", status="4xx") == 1000
    assert len(metrics._cells) == 0


def test_acts_and_streams(metrics: Metrics) -> None:
    metrics.act_answered(1, 0.0002)
    metrics.act_answered(256, 0.002)
    metrics.stream_opened()
    metrics.stream_opened()
    metrics.stream_closed()
    families = parsed(metrics, figures())
    assert value(families, "pgengine_act_observations_total") == 257
    assert value(families, "pgengine_act_seconds_count") == 2
    assert value(families, "pgengine_open_streams") == 1
    assert value(families, "pgengine_build_info", version="1.2.3") == 1


def test_figures_of_the_database(metrics: Metrics) -> None:
    families = parsed(metrics, figures())
    assert value(families, "pgengine_database_up") == 1
    assert value(families, "pgengine_jobs", state="queued") == 2
    assert value(families, "pgengine_queue_length") == 2
    assert value(families, "pgengine_queue_oldest_seconds") == 12.5
    assert value(families, "pgengine_live_leases") == 1


def test_without_a_database_nothing_stale_is_said(metrics: Metrics) -> None:
    parsed(metrics, figures())
    metrics.request_finished("/metrics", "GET", 200, 0.001)
    families = parsed(metrics, None)
    assert value(families, "pgengine_database_up") == 0
    assert "pgengine_jobs" not in families
    assert "pgengine_requests" in families


def test_training_totals_never_fall(metrics: Metrics) -> None:
    """The sum over stored jobs falls when a job is deleted or rewinds; a counter must not."""
    totals = []
    for env_steps, updates in ((1000, 10), (1500, 15), (200, 2), (300, 3)):
        families = parsed(metrics, figures(env_steps, updates))
        totals.append(
            (value(families, "pgengine_training_env_steps_total"), value(families, "pgengine_training_updates_total"))
        )
    assert totals == [(0, 0), (500, 5), (500, 5), (600, 6)]


def test_two_applications_do_not_share_numbers(metrics: Metrics) -> None:
    metrics.act_answered(5, 0.001)
    assert value(parsed(Metrics("1.2.3"), figures()), "pgengine_act_observations_total") == 0


def test_every_family_is_documented_and_every_documented_one_exists(metrics: Metrics) -> None:
    metrics.request_finished("/livez", "GET", 200, 0.001)
    families = parsed(metrics, figures())
    exposed = {
        (f"{family.name}_total" if family.type == "counter" else family.name, family.type)
        for family in families.values()
    }
    rows = re.findall(r"^\| `(pgengine_\w+)` \| (\w+) \|", DOCS.read_text(), re.MULTILINE)
    assert exposed == set(rows)
    assert all(name.startswith("pgengine_") for name, _ in exposed)


def test_documented_labels_are_the_real_ones(metrics: Metrics) -> None:
    metrics.request_finished("/livez", "GET", 200, 0.001)
    rows = re.findall(r"^\| `(pgengine_\w+)` \| \w+ \|([^|]*)\|", DOCS.read_text(), re.MULTILINE)
    documented = {name: {label.strip() for label in labels.split(",") if label.strip()} for name, labels in rows}
    for family in parsed(metrics, figures()).values():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        assert {label for sample in family.samples for label in sample.labels} - {"le"} == documented[name], name
