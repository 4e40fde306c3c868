"""Gradient checks over HTTP: the real engine in its own program, the real runner, and the store for what they write."""

from collections.abc import Callable
from typing import Any

import pytest

import pgengine
from pgengine.spec import GradientCheckSpec
from server.database import Database
from server.jobs import store
from server.jobs.reports import Outcome, Report
from server.jobs.schemas import GradientCheckCreate
from server.settings import Settings
from server.worker.link import Answer, Finished, Message, Reported, Start
from server.worker.runner import run

pytestmark = pytest.mark.slow  # each question starts a program that loads torch

CHECKS = "/v1/gradient-checks"
JOBS = "/v1/training-jobs"
BANDIT: dict[str, Any] = {
    "kind": "tabular",
    "transitions": [[[0.0, 1.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]],
    "rewards": [[0.0, 1.0], [0.0, 0.0]],
    "initial": [1.0, 0.0],
    "terminal": [1],
    "horizon": 1,
}
CARTPOLE = {"kind": "gymnasium", "id": "CartPole-v1"}
LQR = {
    "kind": "lqr",
    "dynamics": [[1.0]],
    "control": [[1.0]],
    "state_cost": [[1.0]],
    "action_cost": [[1.0]],
    "horizon": 3,
}
ENUMERATED = {
    "environment": BANDIT,
    "estimators": [
        {"trajectories": 2, "baseline": {"kind": "none"}},
        {"trajectories": 2, "baseline": {"kind": "batch_mean"}},
    ],
    "mode": "enumerate",
    "seed": 3,
}


class Channel:
    """A link whose supervisor always says the same."""

    def __init__(self, command: Any = "continue") -> None:
        self.command = command
        self.sent: list[Message] = []

    def send(self, message: Message) -> None:
        self.sent.append(message)

    def receive(self, timeout: float | None) -> Message | None:
        return Answer(self.command)


def worked(database: Database) -> tuple[store.Claim, Outcome]:
    """A worker takes the oldest job, runs it and writes its end."""
    with database.write() as session:
        claim = store.claim(session, "worker", 30.0)
        assert claim is not None
    link = Channel()
    run(started(claim), link)
    last = link.sent[-1]
    assert isinstance(last, Finished)
    with database.write() as session:
        store.finish(session, claim.job_id, claim.token, last.outcome)
    return claim, last.outcome


def started(claim: store.Claim) -> Start:
    return Start(
        job_id=claim.job_id,
        updates=claim.updates,
        spec=claim.spec,
        policy_bytes=claim.policy_bytes,
        state_bytes=claim.state_bytes,
        checkpoint_seconds=5.0,
        job_kind=claim.kind,
    )


def test_a_check_goes_from_request_to_report(any_api: Any) -> None:
    response = any_api.post(CHECKS, ENUMERATED)
    assert response.status_code == 201, response.text
    check = response.json()
    assert response.headers["location"] == f"{CHECKS}/{check['id']}"
    assert (check["object"], check["status"], check["policy_id"], check["checkpoint_id"]) == (
        "gradient_check",
        "queued",
        None,
        None,
    )
    assert [label["kind"] for label in check["labels"]] == ["exact", "scaled"]
    assert check["estimators"][0]["discount_weight"] == "gamma_power"
    assert (check["progress"], check["result"], check["seed"]) == ({"fraction": 0.0}, None, 3)
    claim, outcome = worked(any_api.database)
    assert GradientCheckSpec.model_validate(claim.spec).mode == "enumerate"
    done = any_api.get(f"{CHECKS}/{check['id']}").json()
    assert (done["status"], done["progress"]) == ("succeeded", {"fraction": 1.0})
    assert done["result"] == outcome.result
    assert [each["verdict"] for each in done["result"]["estimators"]] == ["agrees", "agrees"]
    assert [each["scale"] for each in done["result"]["estimators"]] == pytest.approx([1.0, 0.5])
    assert len(done["result"]["gradient"]) == done["result"]["parameters"] == 4
    (listed,) = any_api.get(CHECKS).json()["data"]
    assert listed["result"]["gradient"] is None
    assert [each["mean"] for each in listed["result"]["estimators"]] == [None, None]
    assert listed["result"]["estimators"][1]["bias_norm"] == done["result"]["estimators"][1]["bias_norm"]
    events = any_api.get(f"{CHECKS}/{check['id']}/events").json()["data"]
    assert [event["data"]["status"] for event in events if event["type"] == "status"] == [
        "queued",
        "running",
        "succeeded",
    ]
    # nothing is kept of a policy that a check describes
    assert any_api.get("/v1/policies").json()["data"] == []
    assert any_api.get(JOBS).json()["data"] == []


def test_a_stored_policy_is_checked_where_it_was(any_api: Any, problem: Callable[..., Any]) -> None:
    theta = {"theta": [[1.0, -1.0], [0.0, 0.0]]}
    spec = {"kind": "linear", "initial_parameters": theta}
    policy = any_api.created("/v1/policies", {"environment": BANDIT, "policy": spec})
    body = ENUMERATED | {"environment": policy["environment_id"], "policy": policy["id"]}
    check = any_api.created(CHECKS, body)
    assert (check["policy_id"], check["checkpoint_id"]) == (policy["id"], policy["checkpoint_id"])
    assert check["policy"]["initial_parameters"] == theta
    assert any_api.get(CHECKS).json()["data"][0]["policy"]["initial_parameters"] is None
    problem(any_api.delete(f"/v1/policies/{policy['id']}"), 409, "in_use")
    # a training of the same policy may be at work beside it
    any_api.created(JOBS, {"environment": policy["environment_id"], "policy": policy["id"]})
    worked(any_api.database)
    result = any_api.get(f"{CHECKS}/{check['id']}").json()["result"]
    probabilities = any_api.post(f"/v1/policies/{policy['id']}/act", {"observation": 0}).json()["probabilities"]
    # the return is the probability of the arm that pays
    assert result["expected_return"] == pytest.approx(probabilities[1], rel=1e-5)
    assert [one["id"] for one in any_api.get(f"{CHECKS}?policy_id={policy['id']}").json()["data"]] == [check["id"]]


def test_checks_and_trainings_do_not_see_each_other(api: Any, problem: Callable[..., Any]) -> None:
    check, job = api.created(CHECKS, ENUMERATED), api.created(JOBS, {"environment": BANDIT})
    for path, other in ((JOBS, check), (CHECKS, job)):
        assert other["id"] not in [one["id"] for one in api.get(path).json()["data"]]
        problem(api.get(f"{path}/{other['id']}"), 404, "not_found")
        problem(api.get(f"{path}/{other['id']}/events"), 404, "not_found")
        problem(api.post(f"{path}/{other['id']}/cancel"), 404, "not_found")
        problem(api.delete(f"{path}/{other['id']}"), 404, "not_found")
    problem(api.get(f"{JOBS}/{check['id']}/metrics"), 404, "not_found")
    problem(api.get(f"{JOBS}/{check['id']}/updates/1"), 404, "not_found")


def test_cancelling_and_deleting(any_api: Any, problem: Callable[..., Any]) -> None:
    path = f"{CHECKS}/{any_api.created(CHECKS, ENUMERATED)['id']}"
    problem(any_api.delete(path), 409, "not_terminal")
    assert any_api.post(f"{path}/cancel").json()["status"] == "cancelled"
    assert any_api.post(f"{path}/cancel").json()["status"] == "cancelled"
    assert any_api.delete(path).status_code == 204
    problem(any_api.get(path), 404, "not_found")


@pytest.mark.parametrize(
    ("changes", "pointer", "code"),
    [
        ({"environment": CARTPOLE}, "/environment", "exact_needs_a_model"),
        ({"policy": {"kind": "transformer"}}, "/policy", "exact_needs_no_memory"),
        ({"estimators": [{}, {"credit": "total_return", "discount_weight": "gamma_power"}]}, None, None),
        ({"estimators": [{"trajectories": 64}], "mode": "enumerate"}, "/estimators/0/trajectories", "too_many_batches"),
        (
            {"estimators": [{"importance": {"kind": "trajectory", "behaviour": {"kind": "policy", "id": "pol"}}}]},
            "/estimators/0/importance/behaviour/kind",
            "behaviour_not_checked",
        ),
        (
            {"policy": {"kind": "linear", "distribution": {"kind": "gaussian"}}},
            "/policy/distribution/kind",
            "action_family_mismatch",
        ),
        ({"batches": 7}, "/batches", "greater_than_equal"),
    ],
)
def test_what_cannot_be_checked_is_refused_before_it_is_queued(
    api: Any, changes: dict[str, Any], pointer: str | None, code: str | None
) -> None:
    response = api.post(CHECKS, {"environment": BANDIT, **changes})
    assert response.status_code == 422, response.text
    (fault,) = response.json()["errors"]
    assert fault["pointer"].startswith("/estimators/1" if pointer is None and "estimators" in changes else "/")
    if pointer is not None:
        assert (fault["pointer"], fault["code"]) == (pointer, code)
    assert api.get(CHECKS).json()["data"] == []
    assert api.get("/v1/environments").json()["data"] == []


def test_unknown_objects_in_a_body_are_named(api: Any, problem: Callable[..., Any]) -> None:
    nobody = "0" * 32
    problem(api.post(CHECKS, {"environment": f"env_{nobody}"}), 404, "not_found", ("/environment", "not_found"))
    body = {"environment": BANDIT, "policy": f"pol_{nobody}"}
    problem(api.post(CHECKS, body), 404, "not_found", ("/policy", "not_found"))


def test_a_repeated_request_creates_one_check(any_api: Any) -> None:
    headers = {"idempotency-key": "once"}
    answers = [any_api.post(CHECKS, {"environment": BANDIT}, headers=headers) for _ in range(2)]
    assert answers[0].status_code == 201
    assert answers[0].text == answers[1].text
    assert len(any_api.get(CHECKS).json()["data"]) == 1


def test_the_bounds_are_those_of_the_engine() -> None:
    ours, engines = (model.model_json_schema()["properties"] for model in (GradientCheckCreate, GradientCheckSpec))
    for name in ("estimators", "mode", "batches", "false_alarm"):
        for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minItems", "maxItems", "enum"):
            assert ours[name].get(key) == engines[name].get(key), name
        assert ours[name].get("default") == engines[name].get("default"), name


def test_a_check_in_a_worker_follows_commands(api: Any) -> None:
    api.created(CHECKS, {"environment": BANDIT, "batches": 100_000, "seed": 0})
    with api.database.write() as session:
        claim = store.claim(session, "worker", 30.0)
    assert claim is not None
    for command in ("cancel", "release"):
        link = Channel(command)
        run(started(claim), link)
        reports = [message.report for message in link.sent if isinstance(message, Reported)]
        assert reports[0].fingerprint == pgengine.runtime_fingerprint()
        assert all(report.progress is not None and report.progress.fraction < 1.0 for report in reports)
        last = link.sent[-1]
        if isinstance(last, Finished):
            assert (command, last.outcome.status) == ("cancel", "cancelled")
        else:
            assert command == "release"
            assert isinstance(last.report, Report)  # type: ignore[union-attr]
            assert last.report.checkpoint is None  # type: ignore[union-attr]


def test_no_more_questions_are_asked_than_the_operator_allows(
    serve: Any, sqlite_database: Database, problem: Callable[..., Any]
) -> None:
    with serve(Settings(explain_seconds=0.01), sqlite_database) as api:
        response = api.post(CHECKS, {"environment": BANDIT})
        problem(response, 503, "took_too_long")
        assert response.headers["x-should-retry"] == "false"
        assert api.get(CHECKS).json()["data"] == []


REFUSED_AT_ONCE = [
    ({"environment": CARTPOLE}, "/environment", "exact_needs_a_model"),
    ({"policy": {"kind": "transformer"}}, "/policy", "exact_needs_no_memory"),
    ({"estimators": [{}, {"trajectories": 1}]}, "/estimators/1/baseline", "baseline_needs_trajectories"),
    ({"environment": LQR, "policy": {"kind": "linear"}, "mode": "enumerate"}, "/mode", "enumerate_needs_a_finite_mdp"),
    (
        {"estimators": [{"baseline": {"kind": "linear_value", "fit": "before"}}], "mode": "enumerate"},
        "/estimators/0/baseline",
        "baseline_not_enumerable",
    ),
]


@pytest.mark.parametrize(("changes", "pointer", "code"), REFUSED_AT_ONCE)
def test_what_needs_no_torch_is_refused_without_asking_the_engine(
    serve: Any, sqlite_database: Database, problem: Callable[..., Any], changes: Any, pointer: str, code: str
) -> None:
    # no program answers within so short a time
    with serve(Settings(explain_seconds=0.01), sqlite_database) as api:
        problem(api.post(CHECKS, {"environment": BANDIT} | changes), 422, "invalid_request", (pointer, code))


def test_a_list_of_checks_has_no_arrays(api: Any) -> None:
    values = [[[1.0], [-1.0]], [[0.0], [0.0]]]
    features = {"kind": "table", "values": values}
    check = api.created(CHECKS, {"environment": BANDIT, "policy": {"kind": "linear", "features": features}})
    assert check["policy"]["features"] == features
    (listed,) = api.get(CHECKS).json()["data"]
    assert listed["policy"]["features"] == features | {"values": None}
    assert listed | {"policy": None} == check | {"policy": None}
