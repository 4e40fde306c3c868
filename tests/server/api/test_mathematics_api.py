"""All that the engine can do, over HTTP: kinds of environments, policies and algorithms, and what is said of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, select

import pgengine
from pgengine.labels import Label
from pgengine.spec import TrainingSpec
from server.database import Database
from server.jobs import store
from server.jobs.reports import Outcome
from server.settings import Settings
from server.tables import Environment, Idempotency, Job, Metric
from server.worker.link import Answer, Finished, Message, Start
from server.worker.runner import run

JOBS = "/v1/training-jobs"
CARTPOLE = {"kind": "gymnasium", "id": "CartPole-v1"}
BANDIT: dict[str, Any] = {
    "kind": "tabular",
    "transitions": [[[0.0, 1.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]],
    "rewards": [[0.0, 1.0], [0.0, 0.0]],
    "initial": [1.0, 0.0],
    "terminal": [1],
    "horizon": 1,
}
LQR: dict[str, Any] = {
    "kind": "lqr",
    "dynamics": [[1.0]],
    "control": [[1.0]],
    "state_cost": [[1.0]],
    "action_cost": [[1.0]],
    "horizon": 3,
}
TMAZE = {"kind": "gymnasium", "id": "pgengine/TMaze-v0"}
CHAIN = BANDIT | {"transitions": [[[0.5, 0.5], [0.9, 0.1]], [[0.0, 1.0], [0.0, 1.0]]], "horizon": 4}


class Channel:
    """A link whose supervisor always says the same."""

    def __init__(self) -> None:
        self.sent: list[Message] = []

    def send(self, message: Message) -> None:
        self.sent.append(message)

    def receive(self, timeout: float | None) -> Message | None:
        return Answer("continue")


def worked(database: Database) -> Outcome:
    """A worker takes the oldest job, runs it in this process, and writes everything that it reports."""
    with database.write() as session:
        claim = store.claim(session, "worker", 600.0)
        assert claim is not None
    start = Start(
        job_id=claim.job_id,
        updates=claim.updates,
        spec=claim.spec,
        policy_bytes=claim.policy_bytes,
        state_bytes=claim.state_bytes,
        checkpoint_seconds=60.0,
        behaviour_bytes=claim.behaviour_bytes,
        job_kind=claim.kind,
    )
    link = Channel()
    run(start, link)
    last = link.sent.pop()
    assert isinstance(last, Finished)
    with database.write() as session:
        for message in link.sent:
            store.report(session, claim.job_id, claim.token, message.report)  # type: ignore[union-attr]
        store.finish(session, claim.job_id, claim.token, last.outcome)
    return last.outcome


# --- kinds


@pytest.mark.parametrize(
    ("environment", "kind", "exact", "limit_from"),
    [
        (CARTPOLE, "gymnasium", None, "id"),
        ({"kind": "gymnasium", "id": "FrozenLake-v1"}, "gymnasium", "finite_mdp", "id"),
        (TMAZE | {"max_episode_steps": 30}, "gymnasium", "finite_mdp", "declared"),
        (BANDIT, "tabular", "finite_mdp", "horizon"),
        ({name: value for name, value in BANDIT.items() if name != "horizon"}, "tabular", "finite_mdp", "none"),
        (LQR, "lqr", "lqr", "horizon"),
    ],
)
def test_every_kind_of_environment_is_kept_and_listed(
    any_api: Any, environment: dict[str, Any], kind: str, exact: str | None, limit_from: str
) -> None:
    made = any_api.created("/v1/environments", environment)
    assert (made["exact"], made["limit_from"]) == (exact, limit_from)
    assert made["spec"].items() >= environment.items()
    assert any_api.get(f"/v1/environments/{made['id']}").json() == made
    (listed,) = any_api.get("/v1/environments").json()["data"]
    assert (listed["kind"], listed["gymnasium_id"]) == (kind, environment.get("id"))
    again = any_api.post("/v1/environments", environment)
    assert (again.status_code, again.json()["id"]) == (200, made["id"])


def test_the_engines_own_ids_stand_beside_gymnasiums(api: Any, problem: Callable[..., Any]) -> None:
    types = api.get("/v1/environment-types").json()["data"]
    ids = {one["id"]: one for one in types}
    own = {f"pgengine/{name}-v0" for name in ("Aliased", "Bandit", "Chain", "GridWorld", "Particle", "TMaze")}
    assert own | {"pgengine/ParticleContinuous-v0", "CartPole-v1"} <= ids.keys()
    assert {one["kind"] for one in types} == {"gymnasium", "tabular", "lqr"}
    length = ids["pgengine/TMaze-v0"]["arguments"]["properties"]
    assert length["length"]["type"] == "integer"
    api.created("/v1/environments", TMAZE | {"arguments": {"length": 3}})
    response = api.post("/v1/environments", TMAZE | {"arguments": {"width": 3}})
    problem(response, 422, "invalid_request", ("/arguments/width", "unknown_argument"))
    response = api.post("/v1/environments", TMAZE | {"arguments": {"length": 51}})
    told = problem(response, 422, "invalid_request", ("/arguments/length", "argument_value"))
    assert told["errors"][0]["message"] == "expected a whole number from 1 to 50"


def test_an_environment_that_an_earlier_version_has_kept_is_found_out_again(api: Any) -> None:
    environment_id = api.created("/v1/environments", BANDIT)["id"]
    with api.database.write() as session:
        row = session.scalars(select(Environment)).one()
        known = ("observation_space", "action_space", "max_episode_steps", "limit_from", "reward_threshold")
        row.facts = {name: row.facts[name] for name in known}
    assert api.get(f"/v1/environments/{environment_id}").json()["exact"] is None
    job = api.created(JOBS, {"environment": environment_id, "algorithm": {"mean_over": "own_steps"}})
    # that all episodes are one step long was not known then
    assert job["label"]["kind"] == "exact"


@pytest.mark.parametrize(
    ("environment", "policy", "memory"),
    [
        (BANDIT, {"kind": "linear", "features": {"kind": "one_hot"}}, 1),
        (CARTPOLE, {"kind": "linear", "features": {"kind": "polynomial", "degree": 2}}, 1),
        (BANDIT, {"kind": "score", "hidden": [8]}, 1),
        (TMAZE, {"kind": "transformer", "window": 4, "width": 8}, 4),
        (LQR, {"kind": "mlp", "hidden": [4], "distribution": {"kind": "gaussian", "sigma": "head"}}, 1),
        (CARTPOLE, {"kind": "mlp", "hidden": [4], "normalise_observations": True}, 1),
    ],
)
def test_every_kind_of_policy_is_kept_and_its_numbers_read_back(
    any_api: Any, environment: dict[str, Any], policy: dict[str, Any], memory: int
) -> None:
    made = any_api.created("/v1/policies", {"environment": environment, "policy": policy, "seed": 5})
    assert (made["kind"], made["memory"]) == (policy["kind"], memory)
    (listed,) = any_api.get("/v1/policies").json()["data"]
    assert listed["kind"] == policy["kind"]
    numbers = any_api.get(f"/v1/checkpoints/{made['checkpoint_id']}/parameters").json()
    assert (numbers["object"], numbers["policy_id"], numbers["updates"]) == ("checkpoint_parameters", made["id"], 0)
    content = any_api.get(f"/v1/checkpoints/{made['checkpoint_id']}/content").content
    kept = pgengine.load(content)
    assert numbers["parameters"] == {name: array.tolist() for name, array in kept.parameters.items()}
    assert numbers["buffers"] == {name: array.tolist() for name, array in kept.buffers.items()}
    assert bool(numbers["buffers"]) is policy.get("normalise_observations", False)
    # sent back they make the same policy, to the bit, whatever the seed
    again = policy | {"initial_parameters": numbers["parameters"]}
    copy = any_api.created("/v1/policies", {"environment": environment, "policy": again, "seed": 6})
    assert any_api.get(f"/v1/checkpoints/{copy['checkpoint_id']}/content").content == content


def test_the_figures_of_a_normaliser_are_in_the_content_alone(api: Any) -> None:
    policy = {"kind": "linear", "normalise_observations": True}
    stop = {"updates": 1, "target_return": None}
    brief = {"episodes": 2, "deterministic_episodes": 0}
    body = {"environment": CARTPOLE, "policy": policy, "stop": stop, "evaluation": brief, "seed": 0}
    job = api.created(JOBS, body)
    worked(api.database)
    trained = api.get(f"/v1/policies/{job['policy_id']}").json()["checkpoint_id"]
    numbers = api.get(f"/v1/checkpoints/{trained}/parameters").json()
    again = policy | {"initial_parameters": numbers["parameters"]}
    copy = api.created("/v1/policies", {"environment": CARTPOLE, "policy": again})
    copied = api.get(f"/v1/checkpoints/{copy['checkpoint_id']}/parameters").json()
    assert copied["parameters"] == numbers["parameters"]
    assert copied["buffers"] != numbers["buffers"]
    told = api.get("/openapi.json").json()["paths"]["/v1/checkpoints/{checkpoint_id}/parameters"]["get"]["description"]
    assert "unless it normalises observations" in told


def test_a_large_policy_is_read_from_its_content(api: Any, problem: Callable[..., Any]) -> None:
    body = {"environment": CARTPOLE, "policy": {"kind": "mlp", "hidden": [512, 512]}}
    checkpoint_id = api.created("/v1/policies", body)["checkpoint_id"]
    response = api.get(f"/v1/checkpoints/{checkpoint_id}/parameters")
    told = problem(response, 422, "invalid_request", ("/checkpoint_id", "too_many_parameters"))
    assert f"/v1/checkpoints/{checkpoint_id}/content" in told["errors"][0]["message"]
    nobody = "0" * 32
    problem(api.get(f"/v1/checkpoints/ckpt_{nobody}/parameters"), 404, "not_found")


# --- labels and validation

ALGORITHMS: list[tuple[dict[str, Any], dict[str, Any], str, str | None]] = [
    (BANDIT, {}, "exact", None),
    (CHAIN, {"gamma": 0.9, "discount_weight": "none"}, "biased", "discount_dropped"),
    (CHAIN, {"baseline": {"kind": "batch_mean"}}, "scaled", None),
    (CHAIN, {"credit": "total_return", "standardise": "leave_one_out"}, "scaled_unknown", None),
    (CHAIN, {"standardise": "batch"}, "biased", None),
    (CHAIN, {"baseline": {"kind": "linear_value"}}, "exact", None),
    (CHAIN, {"entropy": {"coefficient": 0.1, "as": "objective"}}, "exact", None),
    (CHAIN, {"entropy": {"coefficient": 0.1, "as": "bonus"}}, "biased", None),
    (CHAIN, {"importance": {"kind": "per_decision", "behaviour": {"kind": "mixture"}}}, "exact", None),
    (CHAIN, {"importance": {"kind": "trajectory", "clip": 1.0, "behaviour": {"kind": "mixture"}}}, "biased", None),
    (CHAIN, {"steps_per_batch": 2}, "biased", None),
]


@pytest.mark.parametrize(("environment", "algorithm", "kind", "reason"), ALGORITHMS)
def test_every_algorithm_is_labelled_alike_when_it_is_validated_and_created(
    api: Any, environment: dict[str, Any], algorithm: dict[str, Any], kind: str, reason: str | None
) -> None:
    body = {"environment": environment, "policy": {"kind": "linear"}, "algorithm": algorithm, "seed": 1}
    response = api.post(f"{JOBS}?validate_only=true", body)
    assert response.status_code == 200, response.text
    validated = response.json()
    assert (validated["object"], validated["label"]["kind"]) == ("training_job_validation", kind)
    assert validated["objective"] == validated["label"]["objective"]
    if kind != "exact":
        assert validated["label"]["reasons"]
    if reason is not None:
        assert reason in [each["code"] for each in validated["label"]["reasons"]]
    for name in ("entropy", "importance", "baseline"):
        if name in algorithm:
            assert (
                validated["algorithm"][name].items()
                >= {key: value for key, value in algorithm[name].items() if key != "behaviour"}.items()
            )
    job = api.created(JOBS, body)
    same = ("algorithm", "label", "stop", "evaluation", "diagnostics_every", "seed", "device")
    assert {name: job[name] for name in same} == {name: validated[name] for name in same}
    assert api.get(f"{JOBS}/{job['id']}").json()["algorithm"] == job["algorithm"]
    with api.database.read() as session:
        claimed = store.get(session, job["id"]).spec
    # what is stored is what the engine reads
    read = TrainingSpec.model_validate(claimed | {"environment": environment})
    assert read.algorithm.model_dump(mode="json") == claimed["algorithm"]


def test_validation_writes_nothing(any_api: Any, problem: Callable[..., Any]) -> None:
    body = {"environment": BANDIT, "policy": {"kind": "linear"}}
    headers = {"idempotency-key": "one"}
    response = any_api.post(f"{JOBS}?validate_only=true", body, headers=headers)
    assert (response.status_code, response.json()["parameters"], response.json()["seed"]) == (200, 4, None)
    with any_api.database.read() as session:
        for table in (Job, Environment, Idempotency):
            assert session.scalars(select(table)).all() == []
    # the key was not used up, and what it stands for later does not answer a validation
    assert any_api.post(JOBS, body, headers=headers).status_code == 201
    assert any_api.post(f"{JOBS}?validate_only=true", body, headers=headers).status_code == 200


def test_the_initial_parameters_that_were_given_are_said_again(api: Any) -> None:
    theta = {"theta": [[1.0, -1.0], [0.0, 0.0]]}
    body = {"environment": BANDIT, "policy": {"kind": "linear", "initial_parameters": theta}}
    validated = api.post(f"{JOBS}?validate_only=true", body).json()
    assert validated["policy"]["initial_parameters"] == theta
    check = api.created("/v1/gradient-checks", body)
    assert check["policy"]["initial_parameters"] == theta
    assert api.get(f"/v1/gradient-checks/{check['id']}").json()["policy"]["initial_parameters"] == theta


@pytest.mark.parametrize(
    ("environment", "every", "code"),
    [
        (CHAIN, 1, None),
        (CHAIN, 0, "exact_not_measured"),
        (CARTPOLE, 1, "exact_needs_a_model"),
        (CHAIN | {"horizon": 1000}, 1, "exact_too_large"),
        (CHAIN | {"horizon": 1000}, 3, None),
    ],
)
def test_a_job_says_why_exact_figures_are_missing(
    any_api: Any, environment: dict[str, Any], every: int, code: str | None
) -> None:
    body = {
        "environment": environment,
        "policy": {"kind": "linear"},
        "algorithm": {"trajectories": 2},
        "stop": {"updates": 1, "target_return": None},
        "evaluation": {"episodes": 2, "deterministic_episodes": 0},
        "diagnostics_every": every,
    }
    validated = any_api.post(f"{JOBS}?validate_only=true", body).json()
    job = any_api.created(JOBS, body)
    worked(any_api.database)
    done = any_api.get(f"{JOBS}/{job['id']}").json()
    curves = any_api.get(f"{JOBS}/{job['id']}/metrics").json()
    told = [one["exact_absent"] for one in (validated, job, done, curves)]
    assert told == [told[0]] * 4
    assert (told[0] is None) == (code is None) == any(curves["values"].get("exact_return", []))
    if told[0] is not None:
        assert told[0]["code"] == code
        assert len(told[0]["message"]) > 30
    # one evaluation may take longer than one update
    evaluation = done["result"]["evaluation"]
    assert (evaluation["exact_mean_return"] is None) == (environment == CARTPOLE)
    assert (evaluation["exact_absent"] is None) == (environment != CARTPOLE)


def test_an_environment_stored_by_an_earlier_version_is_looked_at_again(api: Any) -> None:
    environment = api.created("/v1/environments", CHAIN | {"horizon": 1000})
    assert environment["return_range"] == {"low": 0.0, "high": 1000.0, "two_values": False}
    with api.database.write() as session:
        row = session.scalars(select(Environment)).one()
        new = ("states", "return_range", "cut_return_range")
        row.facts = {name: value for name, value in row.facts.items() if name not in new}
    assert api.get(f"/v1/environments/{environment['id']}").json()["return_range"] is None
    validated = api.post(f"{JOBS}?validate_only=true", {"environment": environment["id"]}).json()
    assert validated["exact_absent"]["code"] == "exact_too_large"


def test_validation_refuses_what_creation_refuses(any_api: Any, problem: Callable[..., Any]) -> None:
    policy = any_api.created("/v1/policies", {"environment": CARTPOLE})
    busy = {"environment": policy["environment_id"], "policy": policy["id"]}
    any_api.created(JOBS, busy)
    for body in (
        busy,
        {"environment": CARTPOLE, "algorithm": {"trajectories": 1}},
        {"environment": CARTPOLE, "algorithm": {"gama": 1}},
        {"environment": {"kind": "gymnasium", "id": "Nowhere-v1"}},
        {"environment": f"env_{'0' * 32}"},
        {"environment": BANDIT, "policy": policy["id"]},
    ):
        answers = [any_api.post(f"{JOBS}{query}", body).json() for query in ("", "?validate_only=true")]
        for answer in answers:
            del answer["request_id"]
        assert answers[0] == answers[1]
        assert answers[0]["status"] in (404, 409, 422)


@pytest.mark.parametrize("path", [JOBS, f"{JOBS}?validate_only=true", "/v1/gradient-checks"])
def test_what_cannot_fit_into_memory_is_refused_before_it_is_queued(
    api: Any, problem: Callable[..., Any], path: str
) -> None:
    endless = BANDIT | {"transitions": [[[1.0], [1.0]]], "rewards": [[0.0, 1.0]], "initial": [1.0], "terminal": []}
    body: dict[str, Any] = {"environment": endless | {"horizon": 1_000_000}, "policy": {"kind": "linear"}}
    checks = path.startswith("/v1/gradient")
    body |= {"estimators": [{"trajectories": 10_000}]} if checks else {"algorithm": {"trajectories": 10_000}}
    pointer = "/estimators/0/trajectories" if checks else "/algorithm/trajectories"
    told = problem(api.post(path, body), 422, "invalid_request", (pointer, "does_not_fit"))
    assert "PGENGINE_TRAINER_MEMORY_BYTES" in told["errors"][0]["message"]
    assert api.get(path.partition("?")[0]).json()["data"] == []


def test_a_job_of_an_earlier_version_is_still_published(api: Any) -> None:
    """Specs and labels as they were written before there was more than one kind of everything."""
    job = api.created(JOBS, {"environment": BANDIT})
    with api.database.write() as session:
        row = session.scalars(select(Job)).one()
        row.spec = {
            "version": 1,
            "policy": {
                "kind": "mlp",
                "hidden": [64, 64],
                "activation": "tanh",
                "distribution": {"kind": "softmax"},
                "initial_parameters": None,
            },
            "algorithm": {
                "credit": "reward_to_go",
                "gamma": 1.0,
                "discount_weight": "gamma_power",
                "mean_over": "trajectories",
                "baseline": {"kind": "leave_one_out"},
                "trajectories": 16,
                "optimizer": {"kind": "adam", "learning_rate": 0.01, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8},
            },
            "stop": {"updates": 500, "env_steps": None, "seconds": None, "target_return": None},
            "evaluation": {"episodes": 100, "deterministic_episodes": 20},
            "seed": 1,
            "device": "auto",
        }
        row.label = {
            "kind": "exact",
            "factor": 1.0,
            "objective": {"gamma": 1.0, "max_episode_steps": 1, "limit_from": "horizon", "text": "expected return"},
            "reasons": [{"code": "time_limit_not_observed", "message": "episodes are cut"}],
        }
        assert Label.model_validate(row.label).kind == "exact"
    published = api.get(f"{JOBS}/{job['id']}").json()
    assert published["algorithm"]["baseline"] == {"kind": "leave_one_out", "over": "time_step"}
    assert published["label"]["reasons"][0]["code"] == "time_limit_not_observed"
    with api.database.write() as session:
        claim = store.claim(session, "worker", 600.0)
    assert claim is not None
    assert TrainingSpec.model_validate(claim.spec).algorithm.trajectories == 16


# --- another policy acts


def acted_by(behaviour: str | None, **more: Any) -> dict[str, Any]:
    importance = {"kind": "per_decision", "behaviour": {"kind": "policy", "id": behaviour}}
    algorithm = {"importance": importance, "trajectories": 8}
    return {
        "environment": CHAIN,
        "policy": {"kind": "linear"},
        "algorithm": algorithm,
        "stop": {"updates": 3},
        "evaluation": {"episodes": 2, "deterministic_episodes": 0},
        "seed": 2,
        **more,
    }


def test_another_policy_acts_as_it_was(any_api: Any, problem: Callable[..., Any]) -> None:
    actor = any_api.created("/v1/policies", {"environment": CHAIN, "policy": {"kind": "linear"}, "seed": 1})
    job = any_api.created(JOBS, acted_by(actor["id"]))
    pinned = job["algorithm"]["importance"]["behaviour"]
    assert pinned == {"kind": "policy", "id": actor["checkpoint_id"]}
    assert job["label"]["kind"] == "exact"
    problem(any_api.delete(f"/v1/policies/{actor['id']}"), 409, "in_use")
    assert worked(any_api.database).status == "succeeded"
    done = any_api.get(f"{JOBS}/{job['id']}").json()
    assert (done["status"], done["progress"]["updates"]) == ("succeeded", 3)
    keys = "effective_sample_size,mean_return,exact_return"
    values = any_api.get(f"{JOBS}/{job['id']}/metrics?keys={keys}").json()["values"]
    # of a batch, in trajectories
    assert all(0.0 < value <= 8.0 for value in values["effective_sample_size"])
    # a checkpoint can be named, too, and an ended job holds nothing
    again = any_api.created(JOBS, acted_by(actor["checkpoint_id"]))
    assert again["algorithm"] == job["algorithm"]
    any_api.post(f"{JOBS}/{again['id']}/cancel")
    assert any_api.delete(f"/v1/policies/{actor['id']}").status_code == 204


def test_a_behaviour_that_is_none_is_refused(api: Any, problem: Callable[..., Any]) -> None:
    where = "/algorithm/importance/behaviour/id"
    nobody = "0" * 32
    problem(api.post(JOBS, acted_by(None)), 422, "invalid_request", (where, "missing"))
    problem(api.post(JOBS, acted_by("somebody")), 422, "invalid_request", (where, "malformed_id"))
    for unknown in (f"pol_{nobody}", f"ckpt_{nobody}"):
        problem(api.post(JOBS, acted_by(unknown)), 404, "not_found", (where, "not_found"))
    other = api.created("/v1/policies", {"environment": CARTPOLE})
    problem(api.post(JOBS, acted_by(other["id"])), 422, "invalid_request", (where, "policy_does_not_fit"))
    assert api.get(JOBS).json()["data"] == []


def test_a_behaviour_too_narrow_for_the_ratio_is_refused_before_anything_is_queued(
    api: Any, problem: Callable[..., Any]
) -> None:
    def gaussian(sigma: float) -> dict[str, Any]:
        return {"kind": "linear", "distribution": {"kind": "gaussian", "sigma": "fixed", "initial_sigma": sigma}}

    def body(actor: str, policy: Any, **importance: Any) -> dict[str, Any]:
        behaviour = {"kind": "policy", "id": actor}
        return acted_by(
            None,
            environment=LQR,
            policy=policy,
            algorithm={"importance": {"kind": "per_decision", "behaviour": behaviour, **importance}},
        )

    narrow, wide = (
        api.created("/v1/policies", {"environment": LQR, "policy": gaussian(sigma)})["id"] for sigma in (0.5, 1.0)
    )
    where = ("/algorithm/importance/behaviour", "ratio_variance_unbounded")
    for policy in (gaussian(1.0), wide):
        for query in ("", "?validate_only=true"):
            problem(api.post(f"{JOBS}{query}", body(narrow, policy)), 422, "invalid_request", where)
        # a clip bounds the ratio
        assert api.post(f"{JOBS}?validate_only=true", body(narrow, policy, clip=2.0)).status_code == 200
    assert api.get(JOBS).json()["data"] == []
    api.created(JOBS, body(wide, gaussian(0.5)))


def test_an_update_whose_behaviour_was_deleted_cannot_be_repeated(any_api: Any, problem: Callable[..., Any]) -> None:
    actor = any_api.created("/v1/policies", {"environment": CHAIN, "policy": {"kind": "linear"}, "seed": 1})
    job = any_api.created(JOBS, acted_by(actor["id"]))
    told = problem(any_api.delete(f"/v1/policies/{actor['id']}"), 409, "in_use")
    assert "until it ends or is cancelled" in told["detail"]
    worked(any_api.database)
    assert any_api.delete(f"/v1/policies/{actor['id']}").status_code == 204
    response = any_api.get(f"{JOBS}/{job['id']}/updates/1")
    told = problem(response, 409, "cannot_be_repeated")
    assert "the policy that acted was deleted" in told["detail"]
    assert response.headers["x-should-retry"] == "false"


# --- updates explained


@pytest.mark.slow
def test_an_update_is_explained_as_it_was(any_api: Any, problem: Callable[..., Any]) -> None:
    body = {
        "environment": CHAIN,
        "policy": {"kind": "linear"},
        "algorithm": {"trajectories": 4},
        "stop": {"updates": 3},
        "evaluation": {"episodes": 2, "deterministic_episodes": 0},
        "seed": 3,
    }
    job = any_api.created(JOBS, body)
    path = f"{JOBS}/{job['id']}/updates"
    assert "no updates yet" in problem(any_api.get(f"{path}/1"), 404, "not_found")["detail"]
    worked(any_api.database)
    measured = any_api.get(f"{JOBS}/{job['id']}/metrics").json()
    for update in (1, 3):
        response = any_api.get(f"{path}/{update}")
        assert response.status_code == 200, response.text
        told = response.json()
        assert (told["object"], told["job_id"], told["update"]) == ("update_explanation", job["id"], update)
        assert (told["label"], told["compared"]) == (job["label"], True)
        assert (told["episodes_total"], len(told["episodes"])) == (4, 4)
        row = measured["update"].index(update)
        assert told["estimate_norm"] == pytest.approx(measured["values"]["gradient_norm"][row], rel=1e-5)
        returns = [episode["total_return"] for episode in told["episodes"]]
        assert sum(returns) / 4 == pytest.approx(measured["values"]["mean_return"][row])
    part = any_api.get(f"{path}/1?first_episode=2&episodes=1").json()
    assert [episode["number"] for episode in part["episodes"]] == [2]
    assert "updates 1 to 3" in problem(any_api.get(f"{path}/4"), 404, "not_found")["detail"]
    problem(any_api.get(f"{path}/0"), 422, "invalid_request", ("/update", "greater_than_equal"))
    problem(any_api.get(f"{path}/1?first_episode=4"), 422, "invalid_request", ("/first_episode", "less_than"))
    problem(any_api.get(f"{path}/1?episode=4"), 422, "invalid_request", ("/episode", "unknown_field"))


@pytest.mark.slow
@pytest.mark.parametrize("environment_id", ["test/GlobalNumpy-v0", "test/GlobalPython-v0"])
def test_an_update_that_comes_out_otherwise_is_not_explained(
    serve: Any, sqlite_database: Database, problem: Callable[..., Any], monkeypatch: Any, environment_id: str
) -> None:
    here = str(Path(__file__).parents[1])
    monkeypatch.syspath_prepend(here)
    monkeypatch.setenv("PYTHONPATH", here)  # of the program that plays it again
    settings = Settings(environments=[environment_id], environment_modules=["careless_environments"])
    with serve(settings, sqlite_database) as api:
        body = {"environment": {"kind": "gymnasium", "id": environment_id}, "stop": {"updates": 2}, "seed": 1}
        job = api.created(JOBS, body | {"evaluation": {"episodes": 2}})
        worked(sqlite_database)
        path = f"{JOBS}/{job['id']}/updates/2"
        told = problem(api.get(path), 409, "cannot_be_repeated")
        measured = api.get(f"{JOBS}/{job['id']}/metrics?keys=mean_return").json()["values"]["mean_return"]
        assert f"update 1 comes out otherwise: mean_return was {measured[0]:.6g} and is " in told["detail"]
        assert "random numbers that do not come from its seed" in told["detail"]
        # what was recorded is all that it is compared with
        with sqlite_database.write() as session:
            session.execute(delete(Metric))
        assert api.get(path).json()["compared"] is False


@pytest.mark.slow
def test_explaining_computes_so_a_key_that_may_only_read_cannot_ask_for_it(
    api: Any, problem: Callable[..., Any]
) -> None:
    job = api.created(JOBS, {"environment": BANDIT, "stop": {"updates": 1}, "seed": 0})
    worked(api.database)
    path = f"{JOBS}/{job['id']}/updates/1"
    assert "`train`" in problem(api.get(path, key=api.new_key("read")), 403, "forbidden")["detail"]
    assert api.get(path, key=api.new_key("train")).status_code == 200


@pytest.mark.slow
def test_an_update_of_a_later_job_is_counted_on_and_another_policy_acts_again(api: Any) -> None:
    actor = api.created("/v1/policies", {"environment": CHAIN, "policy": {"kind": "linear"}, "seed": 1})
    first = api.created(JOBS, acted_by(actor["id"]))
    worked(api.database)
    second = api.created(JOBS, acted_by(actor["id"], policy=first["policy_id"]))
    worked(api.database)
    told = api.get(f"{JOBS}/{second['id']}/updates/5")
    assert told.status_code == 200, told.text
    assert (told.json()["update"], told.json()["policy_updates"]) == (5, 4)
    assert all(step["ratio"] is not None for episode in told.json()["episodes"] for step in episode["steps"])
    assert "updates 4 to 6" in api.get(f"{JOBS}/{second['id']}/updates/3").json()["detail"]


@pytest.mark.slow
def test_an_explanation_that_takes_too_long_says_so(
    serve: Any, sqlite_database: Database, problem: Callable[..., Any]
) -> None:
    with serve(Settings(explain_seconds=0.01), sqlite_database) as api:
        job = api.created(JOBS, {"environment": BANDIT, "stop": {"updates": 1}, "seed": 0})
        worked(sqlite_database)
        response = api.get(f"{JOBS}/{job['id']}/updates/1")
        problem(response, 503, "took_too_long")
        assert response.headers["x-should-retry"] == "false"
        # the bound counts what is being answered, so the next one is asked, too
        problem(api.get(f"{JOBS}/{job['id']}/updates/1"), 503, "took_too_long")


@pytest.mark.slow
def test_a_program_that_asks_the_engine_ends_with_the_server(
    serve: Any, sqlite_database: Database, problem: Callable[..., Any]
) -> None:
    with serve(Settings(), sqlite_database) as api:
        job = api.created(JOBS, {"environment": BANDIT, "stop": {"updates": 1}, "seed": 0})
        worked(sqlite_database)
        api.app.stop()
        problem(api.get(f"{JOBS}/{job['id']}/updates/1"), 503, "unavailable")


def test_metrics_that_were_not_measured_are_null(api: Any) -> None:
    body = {
        "environment": CHAIN,
        "policy": {"kind": "linear"},
        "diagnostics_every": 2,
        "stop": {"updates": 4},
        "evaluation": {"episodes": 2, "deterministic_episodes": 0},
        "seed": 3,
    }
    job = api.created(JOBS, body)
    assert job["diagnostics_every"] == 2
    worked(api.database)
    measured = api.get(f"{JOBS}/{job['id']}/metrics?keys=exact_return,mean_return,effective_sample_size").json()
    assert [value is None for value in measured["values"]["mean_return"]] == [False] * 4
    assert sorted(value is None for value in measured["values"]["exact_return"]) == [False, False, True, True]
    assert json.dumps(measured["nonfinite"]) == "{}"
