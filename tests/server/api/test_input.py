"""Whatever is wrong with a request is said with its place, and never becomes a mistake of the server."""

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgengine.spec import LARGEST_INTEGER
from server.bodies import LARGE_BODY, decode
from server.database import Database
from server.errors import FieldError, InvalidRequest
from server.faults import field_errors
from server.request import negotiated
from server.settings import Settings

CARTPOLE: dict[str, Any] = {"kind": "gymnasium", "id": "CartPole-v1"}
CHAIN: dict[str, Any] = {
    "kind": "tabular",
    "transitions": [[[0.0, 1.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]],
    "rewards": [[1.0, 0.0], [0.0, 0.0]],
    "initial": [1.0, 0.0],
    "terminal": [1],
    "horizon": 3,
}
JSON = {"content-type": "application/json"}
UNKNOWN = "0" * 32


def changed(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return base | changes


# Each: what is wrong, the body of a training job, and the faults that must be named.
BAD_JOBS: list[tuple[str, Any, list[tuple[str, str]]]] = [
    ("nothing", {}, [("/environment", "missing")]),
    ("a list", [], [("", "object_type")]),
    ("null", None, [("", "object_type")]),
    ("a text", "CartPole-v1", [("", "object_type")]),
    ("an unknown field", {"environment": CARTPOLE, "colour": 1}, [("/colour", "unknown_field")]),
    ("an environment that is a number", {"environment": 5}, [("/environment", "id_or_object")]),
    ("a malformed id", {"environment": "CartPole-v1"}, [("/environment", "malformed_id")]),
    ("an id of another kind", {"environment": f"pol_{UNKNOWN}"}, [("/environment", "malformed_id")]),
    ("an environment without a kind", {"environment": {"id": "CartPole-v1"}}, [("/environment/kind", "missing")]),
    (
        "an environment of unknown kind",
        {"environment": {"kind": "atari"}},
        [("/environment/kind", "unknown_kind")],
    ),
    (
        "an unknown environment",
        {"environment": changed(CARTPOLE, id="CartPole-v7")},
        [("/environment/id", "environment_not_allowed")],
    ),
    (
        "an environment that is registered and not allowed",
        {"environment": changed(CARTPOLE, id="LunarLander-v3")},
        [("/environment/id", "environment_not_allowed")],
    ),
    (
        "an id that names a module",
        {"environment": changed(CARTPOLE, id="os:CartPole-v1")},
        [("/environment/id", "module_in_id")],
    ),
    (
        "an id with other characters",
        {"environment": changed(CARTPOLE, id="CartPole v1")},
        [("/environment/id", "string_pattern_mismatch")],
    ),
    (
        "an unknown argument",
        {"environment": changed(CARTPOLE, arguments={"gravity": 1.0})},
        [("/environment/arguments/gravity", "unknown_argument")],
    ),
    (
        "a window on the server",
        {"environment": changed(CARTPOLE, arguments={"render_mode": "human"})},
        [("/environment/arguments/render_mode", "unknown_argument")],
    ),
    (
        "an argument of another type",
        {"environment": changed(CARTPOLE, arguments={"sutton_barto_reward": 1})},
        [("/environment/arguments/sutton_barto_reward", "argument_type")],
    ),
    (
        "an argument that is no scalar",
        {"environment": changed(CARTPOLE, arguments={"sutton_barto_reward": [True]})},
        [("/environment/arguments/sutton_barto_reward", "argument_type")],
    ),
    (
        "an environment without an episode limit",
        {"environment": {"kind": "gymnasium", "id": "CliffWalking-v1"}},
        [("/environment/max_episode_steps", "episode_limit_missing")],
    ),
    (
        "a space that is not supported",
        {"environment": {"kind": "gymnasium", "id": "Blackjack-v1", "max_episode_steps": 10}},
        [("/environment/id", "unsupported_space")],
    ),
    (
        "an episode limit of zero",
        {"environment": changed(CARTPOLE, max_episode_steps=0)},
        [("/environment/max_episode_steps", "greater_than_equal")],
    ),
    (
        "a finite MDP without a horizon",
        {"environment": {name: value for name, value in CHAIN.items() if name != "horizon"}},
        [("/environment/horizon", "no_certain_end")],
    ),
    (
        "a probability beyond 1",
        {"environment": changed(CHAIN, transitions=[[[0.0, 1.5], [1.0, 0.0]], CHAIN["transitions"][1]])},
        [("/environment/transitions/0/0/1", "less_than_equal")],
    ),
    ("a policy that is a list", {"environment": CARTPOLE, "policy": []}, [("/policy", "id_or_object")]),
    (
        "a policy of unknown kind",
        {"environment": CARTPOLE, "policy": {"kind": "gru"}},
        [("/policy/kind", "unknown_kind")],
    ),
    (
        "a layer that is too wide",
        {"environment": CARTPOLE, "policy": {"kind": "mlp", "hidden": [64, 4096]}},
        [("/policy/hidden/1", "less_than_equal")],
    ),
    (
        "an unknown activation",
        {"environment": CARTPOLE, "policy": {"kind": "mlp", "activation": "gelu"}},
        [("/policy/activation", "literal_error")],
    ),
    (
        "a policy whose actions do not fit",
        {"environment": CARTPOLE, "policy": {"kind": "mlp", "distribution": {"kind": "gaussian"}}},
        [("/policy/distribution/kind", "action_family_mismatch")],
    ),
    (
        "initial parameters of an unknown name",
        {"environment": CARTPOLE, "policy": {"kind": "linear", "initial_parameters": {"psi": [0.0]}}},
        [("/policy/initial_parameters/psi", "unknown_parameter")],
    ),
    (
        "gamma beyond 1",
        {"environment": CARTPOLE, "algorithm": {"gamma": 1.01}},
        [("/algorithm/gamma", "less_than_equal")],
    ),
    ("gamma as text", {"environment": CARTPOLE, "algorithm": {"gamma": "1"}}, [("/algorithm/gamma", "float_type")]),
    (
        "true for a number",
        {"environment": CARTPOLE, "algorithm": {"gamma": True}},
        [("/algorithm/gamma", "float_type")],
    ),
    (
        "true for an integer",
        {"environment": CARTPOLE, "algorithm": {"trajectories": True}},
        [("/algorithm/trajectories", "int_type")],
    ),
    (
        "a fraction for an integer",
        {"environment": CARTPOLE, "algorithm": {"trajectories": 2.5}},
        [("/algorithm/trajectories", "int_type")],
    ),
    (
        "a misspelt hyperparameter",
        {"environment": CARTPOLE, "algorithm": {"optimizer": {"kind": "adam", "lr": 0.1}}},
        [("/algorithm/optimizer/lr", "unknown_field")],
    ),
    (
        "a learning rate of zero",
        {"environment": CARTPOLE, "algorithm": {"optimizer": {"kind": "sgd", "learning_rate": 0}}},
        [("/algorithm/optimizer/learning_rate", "greater_than")],
    ),
    (
        "a hyperparameter of another optimizer",
        {"environment": CARTPOLE, "algorithm": {"optimizer": {"kind": "sgd", "beta1": 0.9}}},
        [("/algorithm/optimizer/beta1", "unknown_field")],
    ),
    (
        "a constant baseline without its value",
        {"environment": CARTPOLE, "algorithm": {"baseline": {"kind": "constant"}}},
        [("/algorithm/baseline/value", "missing")],
    ),
    (
        "fields that do not fit one another",
        {"environment": CARTPOLE, "algorithm": {"credit": "total_return", "discount_weight": "gamma_power"}},
        [("/algorithm/discount_weight", "discount_counted_twice")],
    ),
    (
        "leave-one-out of a single trajectory",
        {"environment": CARTPOLE, "algorithm": {"trajectories": 1}},
        [("/algorithm/baseline", "baseline_needs_trajectories")],
    ),
    ("seconds below zero", {"environment": CARTPOLE, "stop": {"seconds": -1}}, [("/stop/seconds", "greater_than")]),
    (
        "too few episodes",
        {"environment": CARTPOLE, "evaluation": {"episodes": 1}},
        [("/evaluation/episodes", "greater_than_equal")],
    ),
    ("a negative seed", {"environment": CARTPOLE, "seed": -1}, [("/seed", "greater_than_equal")]),
    ("an unknown device", {"environment": CARTPOLE, "device": "tpu"}, [("/device", "literal_error")]),
    ("an empty name", {"environment": CARTPOLE, "name": ""}, [("/name", "string_too_short")]),
    ("metadata that are no texts", {"environment": CARTPOLE, "metadata": {"a": 1}}, [("/metadata/a", "string_type")]),
    (
        "a note that is too long",
        {"environment": CARTPOLE, "metadata": {"a": "x" * 513}},
        [("/metadata/a", "string_too_long")],
    ),
    (
        "a note with too long a name",
        {"environment": CARTPOLE, "metadata": {"a" * 65: "x"}},
        [("/metadata/" + "a" * 65, "string_too_long")],
    ),
    (
        "too many notes",
        {"environment": CARTPOLE, "metadata": {str(i): "x" for i in range(17)}},
        [("/metadata", "too_long")],
    ),
    (
        "several things",
        {"environment": CARTPOLE, "seed": -1, "algorithm": {"gamma": 2, "trajectories": 0}},
        [
            ("/algorithm/gamma", "less_than_equal"),
            ("/algorithm/trajectories", "greater_than_equal"),
            ("/seed", "greater_than_equal"),
        ],
    ),
]


@pytest.mark.parametrize(("body", "faults"), [bad[1:] for bad in BAD_JOBS], ids=[bad[0] for bad in BAD_JOBS])
def test_a_bad_training_job_is_refused_with_the_place(
    api: Any, problem: Callable[..., Any], body: Any, faults: list[tuple[str, str]]
) -> None:
    problem(api.post("/v1/training-jobs", content=json.dumps(body), headers=JSON), 422, "invalid_request", *faults)


@pytest.mark.parametrize(
    ("body", "faults"),
    [
        ({"kind": "tabular"}, [("/transitions", "missing"), ("/initial", "missing")]),
        ({"id": "CartPole-v1"}, [("/kind", "missing")]),
        ({"kind": "gymnasium", "id": "a:b"}, [("/id", "module_in_id")]),
        ({"kind": "gymnasium", "id": "Nope-v0"}, [("/id", "environment_not_allowed")]),
    ],
)
def test_a_bad_environment_is_refused_with_the_place(
    api: Any, problem: Callable[..., Any], body: Any, faults: list[tuple[str, str]]
) -> None:
    problem(api.post("/v1/environments", body), 422, "invalid_request", *faults)


@pytest.mark.parametrize(
    ("body", "faults"),
    [
        ({}, [("/environment", "missing")]),
        ({"environment": CARTPOLE, "policy": f"pol_{UNKNOWN}"}, [("/policy", "object_type")]),
        ({"environment": CARTPOLE, "policy": {"kind": "mlp", "hidden": []}}, [("/policy/hidden", "too_short")]),
        (
            {
                "environment": {"kind": "gymnasium", "id": "Pendulum-v1"},
                "policy": {"kind": "mlp", "distribution": {"kind": "softmax"}},
            },
            [("/policy/distribution/kind", "action_family_mismatch")],
        ),
    ],
)
def test_a_bad_policy_is_refused_with_the_place(
    api: Any, problem: Callable[..., Any], body: Any, faults: list[tuple[str, str]]
) -> None:
    problem(api.post("/v1/policies", body), 422, "invalid_request", *faults)


def test_a_policy_that_is_too_large_is_refused(
    sqlite_database: Database, serve: Callable[..., Any], problem: Callable[..., Any]
) -> None:
    body = {"environment": CARTPOLE, "policy": {"kind": "mlp", "hidden": [512, 512]}}
    with serve(Settings(max_policy_parameters=1000), sqlite_database) as api:
        problem(api.post("/v1/policies", body), 422, "invalid_request", ("/policy", "policy_too_large"))
        problem(api.post("/v1/training-jobs", body), 422, "invalid_request", ("/policy", "policy_too_large"))
        assert api.get("/v1/policies").json()["data"] == []


# Each: what is sent as a training job, and what the one fault in it has to say.
HINTS: list[tuple[str, dict[str, Any], str, str]] = [
    ("a field at the top", {"learning_rate": 0.1}, "/learning_rate", "Perhaps algorithm.optimizer.learning_rate or"),
    ("a field one level too high", {"algorithm": {"learning_rate": 0.1}}, "/algorithm/learning_rate", "optimizer.lear"),
    ("a field one level too low", {"stop": {"episodes": 9}}, "/stop/episodes", "Perhaps evaluation.episodes is meant."),
    ("initials", {"algorithm": {"lr": 0.1}}, "/algorithm/lr", "Perhaps algorithm.optimizer.learning_rate or"),
    ("camel case", {"diagnosticsEvery": 1}, "/diagnosticsEvery", "Perhaps diagnostics_every is meant."),
    ("a dash", {"algorithm": {"mean-over": 1}}, "/algorithm/mean-over", "Perhaps mean_over is meant."),
    ("a misspelling", {"algorithm": {"trajectoris": 1}}, "/algorithm/trajectoris", "Perhaps trajectories is meant."),
    ("a missing word", {"environment": CARTPOLE | {"max_steps": 9}}, "/environment/max_steps", "max_episode_steps is"),
    ("a field of another kind", {"policy": {"kind": "mlp", "layers": 2}}, "/policy/layers", "(of kind transformer)"),
    (
        "a field of other kinds",
        {"hidden": [8]},
        "/hidden",
        "Perhaps policy.hidden (of kind mlp or score) or algorithm.",
    ),
    ("the fields that are known", {"x": 1}, "/x", "known are: name, environment, policy, algorithm, stop, evaluation,"),
    (
        "those of the kind",
        {"algorithm": {"optimizer": {"kind": "sgd", "x": 1}}},
        "/algorithm/optimizer/x",
        "known are: kind, learning_rate, schedule.",
    ),
    (
        "a kind alone",
        {"algorithm": {"optimizer": "adam"}},
        "/algorithm/optimizer",
        'such as {"kind": "adam"}; its kinds: sgd, adagrad, adam.',
    ),
    ("a kind in capitals", {"algorithm": {"optimizer": "SGD"}}, "/algorithm/optimizer", 'such as {"kind": "sgd"};'),
    (
        "a kind with more to it",
        {"algorithm": {"baseline": "constant"}},
        "/algorithm/baseline",
        '{"kind": "constant", "value": …}',
    ),
    (
        "no kind of it",
        {"algorithm": {"baseline": 7}},
        "/algorithm/baseline",
        'such as {"kind": "none"}; its kinds: none, constant,',
    ),
    (
        "a kind among settings",
        {"algorithm": {"importance": "per_decision"}},
        "/algorithm/importance",
        '{"kind": "per_decision"}',
    ),
    (
        "a list for an object",
        {"algorithm": {"optimizer": []}},
        "/algorithm/optimizer",
        "its kinds: sgd, adagrad, adam.",
    ),
    (
        "a number for an object",
        {"algorithm": {"entropy": 0.1}},
        "/algorithm/entropy",
        'such as {"coefficient": …}; its fields: coefficient, as.',
    ),
    ("a number for limits", {"stop": 100}, "/stop", "its fields: updates, env_steps, seconds, target_return."),
    (
        "an unknown kind",
        {"algorithm": {"optimizer": {"kind": "rmsprop"}}},
        "/algorithm/optimizer/kind",
        "one of: sgd, adagrad, adam.",
    ),
    (
        "no kind",
        {"policy": {"distribution": None}},
        "/policy/kind",
        'such as {"kind": "linear"}; its kinds: linear, mlp, score,',
    ),
    (
        "no kind beside fields of one",
        {"policy": {"hidden": [8]}},
        "/policy/kind",
        'such as {"kind": "mlp"}; its kinds:',
    ),
    (
        "no kind beside a table",
        {"environment": {"transitions": [[[1.0]]], "rewards": [[0.0]], "initial": [1.0]}},
        "/environment/kind",
        'such as {"kind": "tabular", "transitions": […], "initial": […]}; its kinds: gymnasium, tabular, lqr.',
    ),
    (
        "an argument of the environment beside its id",
        {"environment": {"kind": "gymnasium", "id": "FrozenLake-v1", "is_slippery": False}},
        "/environment/is_slippery",
        "Perhaps a field of arguments is meant.",
    ),
    ("a policy's kind", {"policy": "mlp"}, "/policy", 'or an object, such as {"kind": "mlp"}; its kinds: linear, mlp,'),
    (
        "an environment's id",
        {"environment": "CartPole-v1"},
        "/environment",
        'such as {"kind": "gymnasium", "id": "CartPole-v1"};',
    ),
    ("a null for an object", {"algorithm": None}, "/algorithm", "its fields: credit, gamma,"),
]


@pytest.mark.parametrize(("body", "pointer", "said"), [hint[1:] for hint in HINTS], ids=[hint[0] for hint in HINTS])
def test_a_fault_says_the_way_out(api: Any, body: dict[str, Any], pointer: str, said: str) -> None:
    errors = api.post("/v1/training-jobs", {"environment": CARTPOLE} | body).json()["errors"]
    assert [error["pointer"] for error in errors] == [pointer]
    assert said in errors[0]["message"]


def test_faults_of_other_bodies_say_the_way_out_too(api: Any) -> None:
    def said(path: str, body: Any) -> str:
        [error] = api.post(path, body).json()["errors"]
        return str(error["message"])

    assert "estimators[].gamma is meant" in said("/v1/gradient-checks", {"environment": CARTPOLE, "gamma": 0.9})
    estimators = [{}, {"optimizer": "adam"}]
    body = {"environment": CARTPOLE, "estimators": estimators}
    assert 'such as {"kind": "adam"}' in said("/v1/gradient-checks", body)
    assert 'such as {"kind": "gymnasium", "id": "CartPole-v1"}' in said("/v1/policies", {})
    assert 'such as {"kind": "gymnasium", "id": "CartPole-v1"}' in said("/v1/environments", "CartPole-v1")
    assert "Perhaps horizon is meant" in said("/v1/environments", CHAIN | {"horizons": 3})


def test_whole_numbers_may_be_written_with_a_point(api: Any) -> None:
    body = {
        "environment": CHAIN | {"terminal": [1.0], "horizon": 3.0},
        "policy": {"kind": "mlp", "hidden": [8.0, 4.0]},
        "algorithm": {"trajectories": 4.0},
        "stop": {"updates": 1e1},
        "seed": 7.0,
    }
    job = api.post("/v1/training-jobs", content=json.dumps(body), headers=JSON).json()
    assert (job["algorithm"]["trajectories"], job["stop"]["updates"], job["seed"]) == (4, 10, 7)
    assert api.get(f"/v1/policies/{job['policy_id']}").json()["spec"]["hidden"] == [8, 4]
    acted = [
        api.post(f"/v1/policies/{job['policy_id']}/act", {"observation": 0, "seed": seed}).json() for seed in (7, 7.0)
    ]
    assert acted[0] == acted[1]
    assert "action" in acted[0]
    path = f"/v1/policies/{job['policy_id']}/act"
    batches = [api.post(path, {"observations": states, "seed": 7}).json() for states in ([0, 1], [0.0, 1.0])]
    assert batches[0] == batches[1]
    assert len(batches[0]["actions"]) == 2
    for bad in (0.5, 2.0, True, "0"):
        assert api.post(path, {"observation": bad}).status_code == 422


@pytest.mark.parametrize("number", ["7.5", "1e400", "9007199254740993.0", "true", '"7"', "-0.5"])
def test_nothing_else_becomes_a_whole_number(api: Any, number: str) -> None:
    policy = api.created("/v1/policies", {"environment": CARTPOLE})
    body = f'{{"environment": {json.dumps(CARTPOLE)}, "seed": {number}}}'
    asked = f'{{"observation": [0, 0, 0, 0], "seed": {number}}}'
    for path, content in (("/v1/training-jobs", body), (f"/v1/policies/{policy['id']}/act", asked)):
        response = api.post(path, content=content, headers=JSON)
        assert response.status_code == 422
        assert response.json()["errors"][0]["pointer"] == "/seed"


# Bodies that Python's JSON reader takes, or breaks on, in each place where a body is read.
BAD_JSON: list[tuple[str, bytes, tuple[str, str]]] = [
    ("nothing at all", b"", ("", "malformed_json")),
    ("half a body", b'{"environment": ', ("", "malformed_json")),
    ("two bodies", b"{} {}", ("", "malformed_json")),
    ("a comment", b"{} // no", ("", "malformed_json")),
    ("Latin-1", b'{"name": "caf\xe9"}', ("", "malformed_json")),
    ("UTF-16", '{"name": "a"}'.encode("utf-16"), ("", "malformed_json")),
    ("a byte order mark", b"\xef\xbb\xbf{}", ("", "malformed_json")),
    ("an encoded surrogate", b'{"name": "\xed\xa0\x80"}', ("", "malformed_json")),
    ("NaN", b'{"stop": {"target_return": NaN}}', ("/stop/target_return", "not_finite")),
    ("Infinity", b'{"stop": {"target_return": Infinity}}', ("/stop/target_return", "not_finite")),
    ("minus Infinity", b'{"stop": {"target_return": -Infinity}}', ("/stop/target_return", "not_finite")),
    ("a number beyond all floats", b'{"stop": {"target_return": 1e999}}', ("/stop/target_return", "not_finite")),
    ("an integer beyond 2^53", b'{"seed": 9007199254740992}', ("/seed", "integer_too_large")),
    ("a negative one", b'{"seed": -9007199254740992}', ("/seed", "integer_too_large")),
    ("an integer of 5000 digits", b'{"seed": ' + b"9" * 5000 + b"}", ("/seed", "integer_too_large")),
    ("half a surrogate pair", b'{"name": "\\ud800"}', ("/name", "invalid_text")),
    ("half a surrogate pair in a name", b'{"\\udfff": 1}', ("", "invalid_name")),
    ("NUL", b'{"name": "a\\u0000b"}', ("/name", "invalid_text")),
    ("NUL in a name", b'{"metadata": {"\\u0000": "x"}}', ("/metadata", "invalid_name")),
    ("a name of 10,000 characters", b'{"' + b"a" * 10_000 + b'": 1}', ("", "invalid_name")),
    ("a name twice", b'{"stop": {"updates": 1, "updates": 2}}', ("/stop", "repeated_name")),
    ("deep lists", b"[" * 65 + b"]" * 65, ("/0" * 64, "too_deep")),
    ("a million fields", json.dumps({str(i): 0 for i in range(1025)}).encode(), ("", "too_many_fields")),
    ("a million objects", json.dumps({"stop": [{}] * 200_001}).encode(), ("/stop", "too_many_values")),
    ("very deep lists", b"[" * 100_000 + b"]" * 100_000, ("/0" * 64, "too_deep")),
    ("very deep objects", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, ("/a" * 64, "too_deep")),
]


@pytest.mark.parametrize("path", ["/v1/training-jobs", "/v1/policies", "/v1/environments"])
@pytest.mark.parametrize(("body", "fault"), [bad[1:] for bad in BAD_JSON], ids=[bad[0] for bad in BAD_JSON])
def test_json_that_readers_disagree_about_is_refused(
    api: Any, problem: Callable[..., Any], path: str, body: bytes, fault: tuple[str, str]
) -> None:
    problem(api.post(path, content=body, headers=JSON), 422, "invalid_request", fault)


def test_a_large_table_with_a_million_faults_is_refused_at_once(api: Any, problem: Callable[..., Any]) -> None:
    for name in ("transitions", "transition_rewards", "features"):
        body = CHAIN | {name: [[["x"] * 4000] * 250]}
        response = api.post("/v1/environments", body)
        problem(response, 422, "invalid_request", (f"/{name}/0/0/0", "float_type"))


def test_nothing_that_was_sent_is_echoed(api: Any) -> None:
    secret = "sk-very-secret"
    for body in (
        {"environment": {"kind": secret}},
        {"environment": {"kind": "gymnasium", "id": secret}},
        {"environment": f"{secret}"},
        {"environment": CARTPOLE, "device": secret},
        {"environment": CARTPOLE, "seed": secret},
        {"environment": changed(CARTPOLE, arguments={"sutton_barto_reward": secret})},
        {"environment": CARTPOLE, "policy": {"kind": "mlp", "activation": secret}},
        {"environment": CARTPOLE, "policy": {"kind": "linear", "initial_parameters": {"theta": secret}}},
    ):
        response = api.post("/v1/training-jobs", body)
        assert response.status_code == 422
        assert secret not in response.text


IDS = [
    ("GET", "/v1/environments/{}", "environment_id", "env"),
    ("DELETE", "/v1/environments/{}", "environment_id", "env"),
    ("GET", "/v1/policies/{}", "policy_id", "pol"),
    ("DELETE", "/v1/policies/{}", "policy_id", "pol"),
    ("GET", "/v1/policies/{}/checkpoints", "policy_id", "pol"),
    ("GET", "/v1/training-jobs/{}", "job_id", "job"),
    ("DELETE", "/v1/training-jobs/{}", "job_id", "job"),
    ("POST", "/v1/training-jobs/{}/cancel", "job_id", "job"),
    ("GET", "/v1/training-jobs/{}/events", "job_id", "job"),
    ("GET", "/v1/training-jobs/{}/metrics", "job_id", "job"),
    ("GET", "/v1/training-jobs/{}/checkpoints", "job_id", "job"),
    ("GET", "/v1/checkpoints/{}", "checkpoint_id", "ckpt"),
    ("GET", "/v1/checkpoints/{}/content", "checkpoint_id", "ckpt"),
]


@pytest.mark.parametrize(("method", "path", "parameter", "prefix"), IDS)
def test_a_malformed_id_is_a_422_and_an_unknown_one_a_404(
    api: Any, problem: Callable[..., Any], method: str, path: str, parameter: str, prefix: str
) -> None:
    malformed = (
        "x",
        f"{prefix}_1",
        f"{prefix}_{UNKNOWN.replace('0', 'A')}",
        f"{prefix}_{UNKNOWN}%00",
        f"{prefix}_{UNKNOWN}%0A",
    )
    for bad in malformed:
        response = api(method, path.format(bad))
        problem(response, 422, "invalid_request", (f"/{parameter}", "malformed_id"))
    problem(api(method, path.format(f"{prefix}_{UNKNOWN}")), 404, "not_found")


LISTS = [("/v1/environments", "env"), ("/v1/policies", "pol"), ("/v1/training-jobs", "job")]


@pytest.mark.parametrize("path", [path for path, _ in LISTS])
@pytest.mark.parametrize(
    ("query", "code", "fault"),
    [
        ("limit=0", "invalid_request", ("/limit", "greater_than_equal")),
        ("limit=201", "invalid_request", ("/limit", "less_than_equal")),
        ("limit=ten", "invalid_request", ("/limit", "int_parsing")),
        ("limit=", "invalid_request", ("/limit", "int_parsing")),
        ("limit=1_0", "invalid_request", ("/limit", "int_parsing")),
        ("limit=%201", "invalid_request", ("/limit", "int_parsing")),
        ("limit=1%0A", "invalid_request", ("/limit", "int_parsing")),
        ("limit=%2B1", "invalid_request", ("/limit", "int_parsing")),
        ("limit=10.0", "invalid_request", ("/limit", "int_parsing")),
        ("limit=1e2", "invalid_request", ("/limit", "int_parsing")),
        ("limit=0x10", "invalid_request", ("/limit", "int_parsing")),
        ("limit=%EF%BC%91", "invalid_request", ("/limit", "int_parsing")),
        ("limit=%D9%A1", "invalid_request", ("/limit", "int_parsing")),
        ("limit=1&limit=2", "invalid_request", ("/limit", "repeated_parameter")),
        ("limit=1&order=asc&limit=1", "invalid_request", ("/limit", "repeated_parameter")),
        ("order=asc&order=desc", "invalid_request", ("/order", "repeated_parameter")),
        ("limit=" + "9" * 5000, "invalid_request", ("/limit", "int_parsing_size")),
        ("order=up", "invalid_request", ("/order", "literal_error")),
        ("after=nonsense", "invalid_cursor", ("/after", "invalid_cursor")),
        (f"after=ckpt_{UNKNOWN}", "invalid_cursor", ("/after", "invalid_cursor")),
        ("after=" + "x" * 100, "invalid_request", ("/after", "string_too_long")),
        ("colour=red", "invalid_request", ("/colour", "unknown_field")),
    ],
)
def test_a_bad_query_of_a_list_is_refused(
    api: Any, problem: Callable[..., Any], path: str, query: str, code: str, fault: tuple[str, str]
) -> None:
    problem(api.get(f"{path}?{query}"), 422, code, fault)


@pytest.mark.parametrize("key", ["", "x" * 256, "caf\xe9", "a\tb"])
def test_a_bad_idempotency_key_is_refused(api: Any, problem: Callable[..., Any], key: str) -> None:
    headers = {"idempotency-key": key.encode("latin-1")}
    response = api.post("/v1/environments", CARTPOLE, headers=headers)
    assert response.status_code == 422
    assert response.json()["errors"][0]["pointer"] == "/Idempotency-Key"


@pytest.mark.parametrize(
    ("query", "fault"),
    [
        ("from_update=-1", ("/from_update", "greater_than_equal")),
        ("max_points=1", ("/max_points", "greater_than_equal")),
        ("max_points=10001", ("/max_points", "less_than_equal")),
        ("from_update=9007199254740992", ("/from_update", "less_than_equal")),
        ("keys=" + "x" * 3000, ("/keys", "string_too_long")),
        ("keys=mean_return&keys=" + "x" * 65, ("/keys", "string_too_long")),
        ("keys=" + ",".join("x" * 201), ("/keys", "too_long")),
        ("max_points=1_000", ("/max_points", "int_parsing")),
        ("max_points=10&max_points=20", ("/max_points", "repeated_parameter")),
    ],
)
def test_a_bad_query_of_metrics_is_refused(
    api: Any, problem: Callable[..., Any], query: str, fault: tuple[str, str]
) -> None:
    problem(api.get(f"/v1/training-jobs/job_{UNKNOWN}/metrics?{query}"), 422, "invalid_request", fault)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/environment-types"),
        ("GET", f"/v1/environments/env_{UNKNOWN}"),
        ("DELETE", f"/v1/environments/env_{UNKNOWN}"),
        ("POST", "/v1/environments"),
        ("GET", f"/v1/policies/pol_{UNKNOWN}"),
        ("GET", f"/v1/training-jobs/job_{UNKNOWN}"),
        ("POST", f"/v1/training-jobs/job_{UNKNOWN}/cancel"),
        ("GET", f"/v1/training-jobs/job_{UNKNOWN}/events"),
        ("GET", f"/v1/training-jobs/job_{UNKNOWN}/metrics"),
        ("GET", f"/v1/training-jobs/job_{UNKNOWN}/checkpoints"),
        ("GET", f"/v1/checkpoints/ckpt_{UNKNOWN}/content"),
    ],
)
def test_a_misspelt_parameter_is_refused_by_every_route(
    api: Any, problem: Callable[..., Any], method: str, path: str
) -> None:
    faults = [("/limitt", "unknown_field"), ("/a~1b", "unknown_field")]
    problem(api(method, f"{path}?limitt=1&limitt=2&a/b="), 422, "invalid_request", *faults)


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        (f"/v1/training-jobs/job_{UNKNOWN}/updates/1_0", ("/update", "int_parsing")),
        (f"/v1/training-jobs/job_{UNKNOWN}/updates/+1", ("/update", "int_parsing")),
        (f"/v1/training-jobs/job_{UNKNOWN}/updates/1?episodes=1&episodes=1", ("/episodes", "repeated_parameter")),
        (f"/v1/training-jobs/job_{UNKNOWN}/events?after=1&after=2", ("/after", "repeated_parameter")),
        (f"/v1/training-jobs/job_{UNKNOWN}/events?lastEventId=1&lastEventId=2", ("/lastEventId", "repeated_parameter")),
        (f"/v1/training-jobs/job_{UNKNOWN}/events?follow=false&follow=true", ("/follow", "repeated_parameter")),
        (f"/v1/gradient-checks/job_{UNKNOWN}/events?limit=2_0", ("/limit", "int_parsing")),
        ("/v1/training-jobs?status=queued,runing", ("/status", "literal_error")),
        ("/v1/training-jobs?status=", ("/status", "literal_error")),
        ("/v1/gradient-checks?policy_id=a&policy_id=b", ("/policy_id", "repeated_parameter")),
    ],
)
def test_parameters_are_read_strictly_everywhere(
    api: Any, problem: Callable[..., Any], path: str, fault: tuple[str, str]
) -> None:
    problem(api.get(path), 422, "invalid_request", fault)


def test_a_single_parameter_of_a_post_stands_once(api: Any, problem: Callable[..., Any]) -> None:
    path = "/v1/training-jobs?validate_only=true&validate_only=false"
    fault = ("/validate_only", "repeated_parameter")
    problem(api.post(path, {"environment": CARTPOLE}), 422, "invalid_request", fault)
    assert api.get("/v1/training-jobs").json()["data"] == []


def test_what_a_route_reads_from_elsewhere_is_no_query_parameter(api: Any, problem: Callable[..., Any]) -> None:
    path = f"/v1/training-jobs/job_{UNKNOWN}/metrics"
    problem(api.get(f"{path}?accept=text/csv"), 422, "invalid_request", ("/accept", "unknown_field"))
    problem(api.get(f"{path}?job_id=1"), 422, "invalid_request", ("/job_id", "unknown_field"))


def test_act_takes_no_query_parameters(api: Any, problem: Callable[..., Any]) -> None:
    path = f"/v1/policies/pol_{UNKNOWN}/act?deterministic=true"
    problem(api.post(path, {"observation": 0}), 422, "invalid_request", ("/deterministic", "unknown_field"))


# --- the reader by itself

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(categories=("Ll", "Cs", "Cc"))),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=20,
)


def outcome(raw: bytes) -> tuple[Any, tuple[FieldError, ...]]:
    """What is read, or why it is refused."""
    try:
        return decode(raw, 64), ()
    except InvalidRequest as error:
        return None, error.errors


@given(ANY_JSON)
@settings(max_examples=100, deadline=None)
def test_what_is_read_can_be_written_and_what_is_refused_has_places(value: Any) -> None:
    read, faults = outcome(json.dumps(value).encode())
    json.dumps(read, allow_nan=False, ensure_ascii=False).encode()
    for fault in faults:
        fault.pointer.encode()
        assert fault.pointer == "" or fault.pointer.startswith("/")


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    outcome(raw)


@given(body=ANY_JSON)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_body_is_answered_and_never_breaks_the_server(api: Any, body: Any) -> None:
    for path in ("/v1/training-jobs", "/v1/environments", "/v1/policies"):
        content = json.dumps({"environment": body, "policy": body, "metadata": body, "kind": "gymnasium", "id": body})
        assert api.post(path, content=content, headers=JSON).status_code == 422


def test_pointers_escape_what_has_a_meaning() -> None:
    error = {"type": "int_type", "loc": ("body", "a/b", "c~d"), "msg": "no", "ctx": {}}
    assert field_errors([error], {"a/b": {"c~d": "x"}})[0].pointer == "/a~1b/c~0d"


def test_a_tag_that_is_also_a_field_is_no_place() -> None:
    error = {"type": "int_type", "loc": ("body", "mlp", "mlp"), "msg": "no", "ctx": {}}
    assert field_errors([error], {"kind": "mlp", "mlp": 1})[0].pointer == "/mlp"


def test_the_largest_integer_is_taken() -> None:
    assert decode(b'{"a": 9007199254740991, "b": -9007199254740991}', 4) == {
        "a": LARGEST_INTEGER,
        "b": -LARGEST_INTEGER,
    }


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("*/*", "application/json"),
        ("text/csv", "text/csv"),
        ("text/*", "text/csv"),
        ("text/csv;q=0.5, application/json;q=0.4", "text/csv"),
        ("*/*, text/csv;q=0", "application/json"),
        ("application/json;q=0, */*;q=0.1", "text/csv"),
    ],
)
def test_the_most_welcome_media_type_is_chosen(accept: str, chosen: str) -> None:
    assert negotiated(accept, ("application/json", "text/csv")) == chosen


# --- bodies that are large


def filled(unit: bytes, megabytes: int = 1) -> bytes:
    """A list of about so many megabytes."""
    return b"[" + b",".join([unit] * (megabytes * 2**20 // (len(unit) + 1))) + b"]"


@pytest.mark.parametrize(
    ("unit", "code"),
    [
        (b"[]", "too_many_values"),
        (b"{}", "too_many_values"),
        (b"[0,0]", "too_many_values"),
        (b'{"a":1}', "too_many_values"),
        (b"[" * 60 + b"]" * 60, "too_many_values"),
        (b'""', "too_many_values"),
        (b"0,null", "too_many_values"),
        (b"0,0.5", "too_many_values"),
        (b"9" * 100_000, "integer_too_large"),
        (b"1e" + b"9" * 40, "not_finite"),
    ],
)
def test_a_body_that_is_dear_to_read_is_refused(unit: bytes, code: str) -> None:
    body = filled(unit, 4)
    with pytest.raises(InvalidRequest) as refused:
        decode(body, 64)
    assert refused.value.errors[0].code == code


@pytest.mark.slow
@pytest.mark.parametrize(
    "body",
    [
        filled(b"0", 8),
        filled(b"0.5", 8),
        filled(b"0.12345678901234567", 16),
        filled(b"[" + b"0," * 999 + b"1]", 8),
    ],
    ids=["integers", "numbers", "long numbers", "a table"],
)
def test_a_large_body_is_read_in_pieces_between_which_others_go_on(body: bytes) -> None:
    """Another thread has turns while the body is read; the reader of json gives it none until it is through."""
    turns = 0
    reading = threading.Event()
    over = threading.Event()

    def count() -> None:
        nonlocal turns
        reading.wait()
        while not over.is_set():
            turns += 1
            over.wait(0.001)

    other = threading.Thread(target=count)
    other.start()
    reading.set()
    decode(body, 64)
    seen, _ = turns, over.set()
    other.join()
    assert seen >= 4


def read_both_ways(text: str) -> tuple[Any, Any]:
    """What comes of a small body, and of the same body made large by blanks behind it."""

    def read(body: bytes) -> Any:
        try:
            return repr(decode(body, 8))
        except InvalidRequest as refused:
            # what is missing at the end is missing behind the blanks
            return [(fault.pointer, fault.code, fault.message.rpartition(":")[2]) for fault in refused.errors]

    return read(text.encode()), read(text.encode() + b" " * LARGE_BODY)


JSON_TEXTS = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=20,
).map(json.dumps)


@given(JSON_TEXTS, st.data())
@settings(max_examples=100, deadline=None)
def test_large_and_small_bodies_are_read_alike(text: str, data: st.DataObject) -> None:
    small, large = read_both_ways(text)
    assert small == large
    # and so are those that are no JSON, or nearly none
    at = data.draw(st.integers(0, len(text)))
    noise = data.draw(
        st.sampled_from(["", " ", ",", ":", "[", "]", "{", "}", '"', "\\", "1", "-", "e", "NaN", "\n", "\x00"])
    )
    small, large = read_both_ways(text[:at] + noise + text[at + data.draw(st.integers(0, 2)) :])
    assert small == large


@pytest.mark.parametrize(
    "middle", ["", "1", "1,", "1,,2", " 1 , 2 ", "1 2", "1,]", "tru", "1.e", "-", "[", '"', "1e999", str(2**53)]
)
def test_a_fault_far_inside_a_list_of_numbers_is_found_where_it_is(middle: str) -> None:
    body = "[" + "0," * 50_000 + middle + ",0" * 50_000 + "]"
    small = None
    try:
        json.loads(body, parse_int=lambda digits: int(digits))
    except json.JSONDecodeError as error:
        small = f"Expected JSON; line {error.lineno}, column {error.colno}: {error.msg}."
    try:
        decode(body.encode(), 64)
        assert small is None
    except InvalidRequest as refused:
        (fault,) = refused.errors
        assert (fault.code == "malformed_json") == (small is not None)
        if small is not None:
            assert fault.message == small
        else:
            assert fault.pointer == ("/50000" if middle in ("1e999", str(2**53)) else "")
