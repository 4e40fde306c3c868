"""Training jobs over HTTP, on both databases; a worker's writes are made through the store."""

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pgengine.spec import TrainingSpec
from server.database import Database
from server.jobs import history, store
from server.jobs.reports import Measured, Outcome, Progress, Report, Snapshot
from server.settings import Settings

CARTPOLE: dict[str, Any] = {"kind": "gymnasium", "id": "CartPole-v1"}
BANDIT: dict[str, Any] = {
    "kind": "tabular",
    "transitions": [[[0.0, 1.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]],
    "rewards": [[0.0, 1.0], [0.0, 0.0]],
    "initial": [1.0, 0.0],
    "terminal": [1],
    "horizon": 1,
}
JOBS = "/v1/training-jobs"
RESULT = {
    "evaluation": {"mean_return": 480.5, "confidence_interval": [470.0, 491.0], "episodes": 100},
    "stopped_by": "target_return",
    "target_reached": True,
}


def measured_like_the_engine(update: int) -> Measured:
    """An update with all metrics that the engine writes, among them one that stands in every row."""
    values = {name: float(update) for name in history.METRICS} | {"env_steps": update * 10.0}
    return Measured(update, update * 10, values)


def worked(database: Database, outcome: Outcome | None = None) -> store.Claim:
    """A worker takes the oldest job, makes three updates, and ends it."""
    with database.write() as session:
        claim = store.claim(session, "worker", 30.0)
        assert claim is not None
    measured = tuple(
        Measured(update, update * 10, {"mean_return": float(update), "entropy": float("nan") if update == 2 else 0.5})
        for update in (1, 2, 3)
    )
    snapshot = Snapshot(3, Progress(3, 30, 6, 0.5), claim.policy_bytes)
    with database.write() as session:
        store.report(session, claim.job_id, claim.token, Report(Progress(3, 30, 6, 0.5), measured, snapshot))
    if outcome is not None:
        with database.write() as session:
            store.finish(session, claim.job_id, claim.token, outcome)
    return claim


def test_the_shortest_body_is_a_whole_job(any_api: Any) -> None:
    response = any_api.post(JOBS, {"environment": CARTPOLE})
    assert response.status_code == 201
    job = response.json()
    assert response.headers["location"] == f"{JOBS}/{job['id']}"
    assert (job["object"], job["status"], job["is_terminal"], job["attempt"]) == ("training_job", "queued", False, 1)
    assert (job["label"]["kind"], job["label"]["factor"]) == ("exact", 1.0)
    assert job["progress"] == {"updates": 0, "env_steps": 0, "episodes": 0, "fraction": 0.0}
    assert (job["failure"], job["result"], job["started_at"], job["finished_at"]) == (None, None, None, None)
    assert job["algorithm"]["discount_weight"] == "gamma_power"
    assert job["stop"]["target_return"] == 475.0
    assert isinstance(job["seed"], int)
    assert (job["queue_position"], job["queue_reason"]["code"]) == (0, "waiting_for_worker")
    assert any_api.get(response.headers["location"]).json() == job
    policy = any_api.get(f"/v1/policies/{job['policy_id']}").json()
    assert (policy["environment_id"], policy["seed"]) == (job["environment_id"], job["seed"])


def test_a_job_that_names_a_limit_or_a_policy_has_no_target_that_was_not_named(any_api: Any) -> None:
    """A policy that is trained further may have passed the threshold of the id long ago."""
    body = {"environment": CARTPOLE}
    limited = any_api.created(JOBS, body | {"stop": {"updates": 20}})
    assert (limited["stop"]["updates"], limited["stop"]["target_return"]) == (20, None)
    policy = any_api.created("/v1/policies", body)
    further = any_api.created(JOBS, body | {"policy": policy["id"]})
    assert (further["stop"]["updates"], further["stop"]["target_return"]) == (500, None)
    other = any_api.created("/v1/policies", body)
    named = any_api.created(JOBS, body | {"policy": other["id"], "stop": {"updates": 20, "target_return": 400}})
    assert named["stop"]["target_return"] == 400


def test_an_id_with_a_table_gets_a_table_of_parameters_where_the_policy_is_left_out(api: Any) -> None:
    lake = {"environment": {"kind": "gymnasium", "id": "FrozenLake-v1"}}
    job = api.created(JOBS, lake | {"algorithm": {"gamma": 0.99}})
    assert (job["algorithm"]["trajectories"], job["algorithm"]["optimizer"]["learning_rate"]) == (128, 0.05)
    assert (job["algorithm"]["gamma"], job["label"]["kind"]) == (0.99, "exact")
    assert api.get(f"/v1/policies/{job['policy_id']}").json()["spec"]["kind"] == "linear"
    named = api.created(JOBS, lake | {"policy": {"kind": "mlp"}})
    assert (named["algorithm"]["trajectories"], named["algorithm"]["optimizer"]["learning_rate"]) == (16, 0.01)
    told = api.post(f"{JOBS}?validate_only=true", lake).json()
    assert (told["policy"]["kind"], told["parameters"], told["algorithm"]["trajectories"]) == ("linear", 64, 128)


def test_the_whole_body_is_taken(api: Any) -> None:
    body = {
        "name": "cartpole",
        "environment": CARTPOLE | {"arguments": {}, "max_episode_steps": None},
        "policy": {"kind": "mlp", "hidden": [64, 64], "activation": "tanh"},
        "algorithm": {
            "credit": "reward_to_go",
            "gamma": 1.0,
            "mean_over": "trajectories",
            "baseline": {"kind": "leave_one_out"},
            "trajectories": 32,
            "optimizer": {"kind": "adam", "learning_rate": 0.01},
        },
        "stop": {"updates": 200, "env_steps": None, "seconds": None, "target_return": 475},
        "evaluation": {"episodes": 100, "deterministic_episodes": 5},
        "seed": 0,
        "device": "auto",
        "metadata": {"course": "rl"},
    }
    job = api.created(JOBS, body)
    for name in ("name", "stop", "evaluation", "seed", "device", "metadata"):
        assert job[name] == body[name]
    assert (
        job["algorithm"].items()
        >= {name: body["algorithm"][name] for name in ("credit", "gamma", "trajectories")}.items()
    )
    assert job["algorithm"]["optimizer"].items() >= body["algorithm"]["optimizer"].items()


def test_a_biased_estimator_is_labelled(api: Any) -> None:
    job = api.created(JOBS, {"environment": CARTPOLE, "algorithm": {"gamma": 0.9, "discount_weight": "none"}})
    assert job["label"]["kind"] == "biased"
    assert job["label"]["factor"] is None
    assert job["label"]["reasons"][0]["code"] == "discount_dropped"


def test_a_job_goes_on_with_a_policy_that_exists(any_api: Any, problem: Callable[..., Any]) -> None:
    policy = any_api.created("/v1/policies", {"environment": CARTPOLE})
    body = {"environment": policy["environment_id"], "policy": policy["id"]}
    job = any_api.created(JOBS, body)
    assert job["policy_id"] == policy["id"]
    response = any_api.post(JOBS, body)
    problem(response, 409, "policy_busy")
    assert response.headers["x-should-retry"] == "false"
    assert any_api.post(f"{JOBS}/{job['id']}/cancel").status_code == 200
    assert any_api.created(JOBS, body)["policy_id"] == policy["id"]


def test_a_policy_of_other_spaces_does_not_fit(any_api: Any, problem: Callable[..., Any]) -> None:
    policy = any_api.created("/v1/policies", {"environment": BANDIT, "policy": {"kind": "linear"}})
    response = any_api.post(JOBS, {"environment": CARTPOLE, "policy": policy["id"]})
    problem(response, 422, "invalid_request", ("/policy", "policy_does_not_fit"))


def test_unknown_objects_in_a_body_are_named(any_api: Any, problem: Callable[..., Any]) -> None:
    nobody = "0" * 32
    response = any_api.post(JOBS, {"environment": f"env_{nobody}"})
    problem(response, 404, "not_found", ("/environment", "not_found"))
    response = any_api.post(JOBS, {"environment": CARTPOLE, "policy": f"pol_{nobody}"})
    problem(response, 404, "not_found", ("/policy", "not_found"))


def test_a_refused_job_leaves_nothing_behind(any_api: Any) -> None:
    assert any_api.post(JOBS, {"environment": CARTPOLE, "algorithm": {"trajectories": 1}}).status_code == 422
    for path in (JOBS, "/v1/policies", "/v1/environments"):
        assert any_api.get(path).json()["data"] == []


@pytest.mark.parametrize("environment", [CARTPOLE, BANDIT], ids=["gymnasium", "tabular"])
def test_a_claim_brings_the_environment_that_the_job_does_not_keep(any_api: Any, environment: dict[str, Any]) -> None:
    environment_id = any_api.created("/v1/environments", environment)["id"]
    published = any_api.get(f"/v1/environments/{environment_id}").json()["spec"]
    job_id = any_api.created(JOBS, {"environment": environment_id})["id"]
    with any_api.database.write() as session:
        assert "environment" not in store.get(session, job_id).spec
        claim = store.claim(session, "worker", 30.0)
    assert claim is not None
    assert claim.spec["environment"] == published
    assert TrainingSpec.model_validate(claim.spec).model_dump(mode="json") == claim.spec


def test_a_repeated_request_is_answered_after_its_environment_is_gone(any_api: Any) -> None:
    environment = any_api.created("/v1/environments", CARTPOLE)
    body, key = {"environment": environment["id"]}, {"Idempotency-Key": "one"}
    policy = any_api.post("/v1/policies", body, headers=key)
    any_api.delete(f"/v1/policies/{policy.json()['id']}")
    any_api.delete(f"/v1/environments/{environment['id']}")
    again = any_api.post("/v1/policies", body, headers=key)
    assert (again.status_code, again.text) == (201, policy.text)


def test_a_repeated_request_creates_one_job(any_api: Any) -> None:
    headers = {"idempotency-key": "once"}
    answers = [any_api.post(JOBS, {"environment": CARTPOLE}, headers=headers) for _ in range(2)]
    assert answers[0].text == answers[1].text
    assert len(any_api.get(JOBS).json()["data"]) == 1


def test_jobs_are_listed_by_state_and_policy(any_api: Any) -> None:
    first, second = (any_api.created(JOBS, {"environment": CARTPOLE}) for _ in range(2))
    any_api.post(f"{JOBS}/{first['id']}/cancel")

    def ids(query: str) -> list[str]:
        return [one["id"] for one in any_api.get(f"{JOBS}?{query}").json()["data"]]

    assert ids("") == [second["id"], first["id"]]
    assert ids("status=cancelled") == [first["id"]]
    assert ids("status=cancelled&status=queued&order=asc") == [first["id"], second["id"]]
    assert ids(f"policy_id={second['policy_id']}") == [second["id"]]
    assert ids("limit=1") == [second["id"]]


def test_a_queued_job_says_how_many_are_older(api: Any) -> None:
    jobs = [api.created(JOBS, {"environment": CARTPOLE}) for _ in range(3)]
    last = api.get(f"{JOBS}/{jobs[2]['id']}").json()
    assert (last["queue_position"], last["queue_reason"]["code"]) == (2, "behind")
    api.post(f"{JOBS}/{jobs[0]['id']}/cancel")
    assert api.get(f"{JOBS}/{jobs[2]['id']}").json()["queue_position"] == 1


def test_cancelling_and_deleting(any_api: Any, problem: Callable[..., Any]) -> None:
    job = any_api.created(JOBS, {"environment": CARTPOLE})
    path = f"{JOBS}/{job['id']}"
    problem(any_api.delete(path), 409, "not_terminal")
    problem(any_api.delete(f"/v1/policies/{job['policy_id']}"), 409, "in_use")
    for _ in range(2):
        cancelled = any_api.post(f"{path}/cancel").json()
        assert (cancelled["status"], cancelled["is_terminal"]) == ("cancelled", True)
        assert cancelled["queue_position"] is None
    assert any_api.delete(path).status_code == 204
    problem(any_api.get(path), 404, "not_found")
    problem(any_api.get(f"{path}/events"), 404, "not_found")
    assert any_api.delete(f"/v1/policies/{job['policy_id']}").status_code == 204


def test_findings_stand_in_the_result_and_in_the_last_event(any_api: Any, database: Database) -> None:
    """A job of an earlier version has none."""
    found = {"code": "returns_alike", "message": "all returns were alike", "suggestion": "let episodes be longer"}
    for result, expected in ((RESULT | {"findings": [found]}, [found]), (RESULT, [])):
        path = f"{JOBS}/{any_api.created(JOBS, {'environment': CARTPOLE})['id']}"
        worked(database, Outcome("succeeded", result=result))
        assert any_api.get(path).json()["result"]["findings"] == expected
        last = any_api.get(f"{path}/events").json()["data"][-1]
        assert (last["type"], last["data"]["result"].get("findings", [])) == ("status", expected)


def test_a_finished_job_tells_its_result(any_api: Any, database: Database, problem: Callable[..., Any]) -> None:
    job = any_api.created(JOBS, {"environment": CARTPOLE})
    path = f"{JOBS}/{job['id']}"
    worked(database, Outcome("succeeded", result=RESULT))
    body = any_api.get(path).json()
    assert (body["status"], body["is_terminal"], body["failure"]) == ("succeeded", True, None)
    assert body["result"]["stopped_by"] == "target_return"
    assert body["result"]["evaluation"]["confidence_interval"] == [470.0, 491.0]
    assert body["progress"] == {"updates": 3, "env_steps": 30, "episodes": 6, "fraction": 1.0}
    assert body["finished_at"] is not None
    made = any_api.get(f"{path}/checkpoints").json()["data"]
    assert [one["updates"] for one in made] == [3]
    assert body["result"]["checkpoint_id"] == made[0]["id"]
    assert any_api.get(f"/v1/policies/{job['policy_id']}").json()["updates"] == 3
    problem(any_api.post(f"{path}/cancel"), 409, "not_cancellable")
    # checkpoints belong to the policy
    assert any_api.delete(path).status_code == 204
    kept = any_api.get(f"/v1/checkpoints/{made[0]['id']}").json()
    assert (kept["policy_id"], kept["job_id"]) == (job["policy_id"], None)


def test_events_are_read_page_by_page(any_api: Any, database: Database) -> None:
    job = any_api.created(JOBS, {"environment": CARTPOLE})
    worked(database, Outcome("succeeded", result=RESULT))
    path = f"{JOBS}/{job['id']}/events"
    page = any_api.get(f"{path}?limit=2").json()
    assert [event["seq"] for event in page["data"]] == [1, 2]
    rest = any_api.get(f"{path}?after={page['next_cursor']}").json()
    assert rest["has_more"] is False
    assert [event["seq"] for event in rest["data"]] == list(range(3, 3 + len(rest["data"])))
    assert rest["data"][-1]["data"]["is_terminal"] is True
    stream = any_api.get(f"{path}?after=1", headers={"accept": "text/event-stream"})
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert stream.text.count("id: ") == len(rest["data"]) + 1


def test_metrics_come_in_columns_rows_and_lines(any_api: Any, database: Database, problem: Callable[..., Any]) -> None:
    job = any_api.created(JOBS, {"environment": CARTPOLE})
    worked(database)
    path = f"{JOBS}/{job['id']}/metrics"
    body = any_api.get(path).json()
    assert (body["object"], body["job_id"], sorted(body["keys"])) == ("metrics", job["id"], ["entropy", "mean_return"])
    assert (body["update"], body["env_steps"], body["attempt"]) == ([1, 2, 3], [10, 20, 30], [1, 1, 1])
    assert body["values"]["mean_return"] == [1.0, 2.0, 3.0]
    assert body["values"]["entropy"] == [0.5, None, 0.5]
    assert body["nonfinite"] == {"entropy": [2]}
    one = any_api.get(f"{path}?keys=mean_return&from_update=2").json()
    assert (one["keys"], one["update"], one["values"]) == (["mean_return"], [2, 3], {"mean_return": [2.0, 3.0]})
    table = any_api.get(f"{path}?keys=mean_return,entropy", headers={"accept": "text/csv"})
    assert table.headers["content-type"] == "text/csv; charset=utf-8"
    rows = list(csv.DictReader(io.StringIO(table.text)))
    assert rows[1] == {"update": "2", "env_steps": "20", "attempt": "1", "mean_return": "2.0", "entropy": ""}
    lines = any_api.get(path, headers={"accept": "application/x-ndjson"}).text.splitlines()
    assert json.loads(lines[1]).items() >= {"update": 2, "entropy": None, "nonfinite": ["entropy"]}.items()
    problem(any_api.get(path, headers={"accept": "image/png"}), 406, "not_acceptable")


def test_what_stands_in_every_row_is_no_second_column(any_api: Any, database: Database) -> None:
    job = any_api.created(JOBS, {"environment": CARTPOLE})
    with database.write() as session:
        claim = store.claim(session, "worker", 30.0)
        assert claim is not None
        measured = tuple(measured_like_the_engine(update) for update in (1, 2, 3))
        store.report(session, claim.job_id, claim.token, Report(Progress(3, 30, 6, 0.5), measured))
    path = f"{JOBS}/{job['id']}/metrics"
    for query, names in (
        ("", sorted(history.METRICS)),
        ("?keys=update,env_steps,attempt", []),
        ("?keys=env_steps, mean_return,mean_return", ["mean_return"]),
        ("?keys=mean_return&keys=entropy", ["entropy", "mean_return"]),
        ("?keys=mean_return,&keys=,entropy,update", ["entropy", "mean_return"]),
        ("?keys=", []),
    ):
        body = any_api.get(path + query).json()
        assert sorted(body["keys"]) == sorted(body["values"]) == names
        assert (body["update"], body["env_steps"]) == ([1, 2, 3], [10, 20, 30])
        header = any_api.get(path + query, headers={"accept": "text/csv"}).text.splitlines()[0].split(",")
        assert (header[:3], sorted(header[3:])) == (["update", "env_steps", "attempt"], names)
        lines = any_api.get(path + query, headers={"accept": "application/x-ndjson"}).text.splitlines()
        pairs = json.loads(lines[1], object_pairs_hook=list)
        assert pairs[:3] == [("update", 2), ("env_steps", 20), ("attempt", 1)]
        assert sorted(name for name, _ in pairs[3:]) == sorted([*names, "nonfinite"])


def test_lists_of_states_are_repeated_or_separated_by_commas(any_api: Any) -> None:
    job = any_api.created(JOBS, {"environment": CARTPOLE})
    for query, found in (
        ("status=queued", 1),
        ("status=running&status=queued", 1),
        ("status=running,queued", 1),
        ("status=running, queued&status=failed", 1),
        ("status=running,failed", 0),
    ):
        ids = [one["id"] for one in any_api.get(f"{JOBS}?{query}").json()["data"]]
        assert ids == [job["id"]][:found], query


def test_the_open_jobs_of_a_key_are_bounded(
    database: Database, serve: Callable[..., Any], problem: Callable[..., Any]
) -> None:
    with serve(Settings(max_open_jobs=2), database) as api:
        one, other = api.new_key("train"), api.new_key("train", "read")
        body = {"environment": CARTPOLE}
        jobs = [api.post(JOBS, body, key=one).json()["id"] for _ in range(2)]
        refused = api.post(JOBS, body, key=one)
        assert "PGENGINE_MAX_OPEN_JOBS" in problem(refused, 429, "too_many_requests")["detail"]
        assert int(refused.headers["retry-after"]) > 0
        # nothing is left of what was refused, and another key is not concerned
        assert len(api.get("/v1/policies").json()["data"]) == 2
        assert api.post(JOBS, body, key=other).status_code == 201
        # an ended job makes room
        assert api.post(f"{JOBS}/{jobs[0]}/cancel", key=one).status_code == 200
        headers = {"idempotency-key": "once"}
        assert api.post(JOBS, body, key=one, headers=headers).status_code == 201
        # and what was answered once is answered again, however many there are
        assert api.post(JOBS, body, key=one, headers=headers).status_code == 201
        problem(api.post(JOBS, body, key=one), 429, "too_many_requests")


def test_a_busy_policy_names_the_job_that_trains_it(any_api: Any, problem: Callable[..., Any]) -> None:
    job = any_api.created(JOBS, {"environment": CARTPOLE})
    body = {"environment": CARTPOLE, "policy": job["policy_id"]}
    for query in ("", "?validate_only=true"):
        refused = problem(any_api.post(JOBS + query, body), 409, "policy_busy")
        assert job["id"] in refused["detail"]
    # what was refused has left nothing half done
    assert any_api.post(f"{JOBS}/{job['id']}/cancel").status_code == 200
    assert any_api.post(JOBS, body).status_code == 201


def test_a_misspelt_metric_is_refused_with_those_that_there_are(
    any_api: Any, database: Database, problem: Callable[..., Any]
) -> None:
    job = any_api.created(JOBS, {"environment": CARTPOLE})
    path = f"{JOBS}/{job['id']}/metrics"
    fault = ("/keys", "unknown_metric")
    # nothing is measured yet, but it is known what will be
    assert any_api.get(f"{path}?keys=mean_return,episodes").json()["values"] == {"mean_return": [], "episodes": []}
    body = problem(any_api.get(f"{path}?keys=mean_return,mean_retrun"), 422, "invalid_request", fault)
    assert "gradient_norm" in body["errors"][0]["message"]
    worked(database)
    body = problem(any_api.get(f"{path}?keys=mean_retrun"), 422, "invalid_request", fault)
    assert "entropy, gradient_norm" in body["errors"][0]["message"]
    assert "retrun" not in json.dumps(body)
    problem(any_api.get(f"{path}?keys=mean_retrun&from_update=1000"), 422, "invalid_request", fault)
    # not every metric is measured of every update, or of every job
    unmeasured = any_api.get(f"{path}?keys=exact_return,mean_return").json()
    assert unmeasured["values"] == {"exact_return": [None] * 3, "mean_return": [1.0, 2.0, 3.0]}
    assert unmeasured["nonfinite"] == {}


def test_the_metrics_that_can_be_asked_for_are_documented() -> None:
    page = (Path(__file__).parents[3] / "docs" / "engine" / "metrics.md").read_text()
    documented = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert documented == {*history.METRICS, "env_steps"}


@pytest.mark.parametrize("max_points", [2, 3, 7, 21, 22, 100, 199, 200])
def test_the_most_points_are_never_exceeded(api: Any, max_points: int) -> None:
    job = api.created(JOBS, {"environment": CARTPOLE})
    with api.database.write() as session:
        claim = store.claim(session, "worker", 30.0)
        assert claim is not None
        measured = tuple(measured_like_the_engine(update) for update in range(1, 201))
        store.report(session, claim.job_id, claim.token, Report(Progress(200, 2000, 6, 0.5), measured))
    for query in ("", "&keys=mean_return", "&keys=update"):
        body = api.get(f"{JOBS}/{job['id']}/metrics?max_points={max_points}{query}").json()
        updates = body["update"]
        assert 2 <= len(updates) == len(set(updates)) <= max_points
        assert (updates[0], updates[-1], body["recorded"]) == (1, 200, 200)


def test_an_expired_lease_is_ended_by_the_api_process(sqlite_database: Database, serve: Callable[..., Any]) -> None:
    with serve(Settings(renew_seconds=0.02), sqlite_database) as api:
        job = api.created(JOBS, {"environment": CARTPOLE})
        with sqlite_database.write() as session:
            store.claim(session, "a worker that dies", 0.05)
        stream = api.get(f"{JOBS}/{job['id']}/events?after=2&follow=false")
        assert stream.status_code == 200
        for _ in range(500):
            body = api.get(f"{JOBS}/{job['id']}").json()
            if body["status"] == "queued":
                break
        assert (body["status"], body["attempt"]) == ("queued", 2)


def test_a_job_with_a_seed_begins_with_the_policy_of_that_seed(api: Any) -> None:
    body = {"environment": BANDIT, "policy": {"kind": "mlp", "hidden": [4]}, "seed": 11}
    job = api.created(JOBS, body)
    alone = api.created("/v1/policies", {name: body[name] for name in ("environment", "policy", "seed")})
    own = api.get(f"/v1/policies/{job['policy_id']}").json()
    digests = [api.get(f"/v1/checkpoints/{one['checkpoint_id']}").json()["sha256"] for one in (own, alone)]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_following_an_unknown_job_is_a_404_and_no_broken_stream(
    api: Any, problem: Callable[..., Any], accept: str
) -> None:
    problem(api.get(f"{JOBS}/job_{'0' * 32}/events", headers={"accept": accept}), 404, "not_found")
