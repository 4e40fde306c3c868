"""Environments, policies and checkpoints over HTTP, on both databases."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select

import pgengine
from server.checkpoints import store as checkpoints
from server.database import Database
from server.idempotency import LARGEST_KEPT
from server.settings import Settings
from server.tables import Idempotency

CARTPOLE: dict[str, Any] = {"kind": "gymnasium", "id": "CartPole-v1"}
BANDIT: dict[str, Any] = {
    "kind": "tabular",
    "transitions": [[[0.0, 1.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]],
    "rewards": [[0.0, 1.0], [0.0, 0.0]],
    "initial": [1.0, 0.0],
    "terminal": [1],
    "horizon": 1,
}
IDEMPOTENT = {"idempotency-key": "a key of mine"}


# --- environment types


def test_environment_types_are_what_can_be_made_here(api: Any) -> None:
    page = api.get("/v1/environment-types").json()
    assert (page["object"], page["has_more"], page["next_cursor"]) == ("list", False, None)
    types = {one["id"] or one["kind"]: one for one in page["data"]}
    assert types["CartPole-v1"]["max_episode_steps"] == 500
    assert types["CartPole-v1"]["observation_space"]["shape"] == [4]
    assert types["CartPole-v1"]["arguments"]["properties"] == {
        "sutton_barto_reward": {"type": "boolean", "default": False}
    }
    assert types["CliffWalking-v1"]["max_episode_steps"] is None
    assert types["Pendulum-v1"]["action_space"]["kind"] == "box"
    assert "transitions" in types["tabular"]["arguments"]["properties"]
    assert "dynamics" in types["lqr"]["arguments"]["properties"]
    assert "CartPole-v0" not in types  # an older version is nobody's wish
    unavailable = [one for one in types.values() if not one["available"]]
    assert [(one["id"], one["observation_space"]) for one in unavailable] == [("Blackjack-v1", None)]
    assert "the observation space is Tuple" in unavailable[0]["hint"]
    for one in types.values():
        assert one["available"] == (one["hint"] is None)
        assert "render_mode" not in one["arguments"]["properties"]


@pytest.mark.slow
def test_every_environment_type_can_be_created(api: Any) -> None:
    for one in api.get("/v1/environment-types").json()["data"]:
        if one["kind"] == "gymnasium" and one["available"]:
            body = {"kind": "gymnasium", "id": one["id"], "max_episode_steps": one["max_episode_steps"] or 50}
            created = api.created("/v1/environments", body)
            assert created["observation_space"] == one["observation_space"]
            arguments = {name: schema["default"] for name, schema in one["arguments"]["properties"].items()}
            api.created("/v1/environments", body | {"arguments": arguments, "max_episode_steps": 7})


def test_the_operator_adds_environments(
    sqlite_database: Database, serve: Callable[..., Any], problem: Callable[..., Any]
) -> None:
    added = Settings(environments=["CartPole-v0", "Missing-v0"])
    with serve(added, sqlite_database) as api:
        listed = {one["id"]: one for one in api.get("/v1/environment-types").json()["data"]}
        assert listed["CartPole-v0"]["available"] is True
        # as ALE/Pong-v5 where ale_py is missing, or nobody has imported it
        assert listed["Missing-v0"]["available"] is False
        assert "PGENGINE_ENVIRONMENT_MODULES" in listed["Missing-v0"]["hint"]
        body = {"kind": "gymnasium", "id": "Missing-v0"}
        problem(api.post("/v1/environments", body), 422, "invalid_request", ("/id", "environment_not_found"))


def test_an_id_that_names_nothing_is_told_to_the_operator_at_the_start(
    sqlite_database: Database, serve: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with serve(Settings(environments=["Nope-v9", "CartPole-v0"]), sqlite_database):
        warnings = [record.getMessage() for record in caplog.records if record.name == "server.environments.types"]
    assert len(warnings) == 1
    assert warnings[0].startswith("Nope-v9 cannot be used: ")


# --- environments


@pytest.mark.parametrize("spec", [CARTPOLE, BANDIT], ids=["gymnasium", "tabular"])
def test_an_environment_is_created_read_and_deleted(any_api: Any, problem: Callable[..., Any], spec: Any) -> None:
    response = any_api.post("/v1/environments", spec)
    assert response.status_code == 201
    body = response.json()
    assert response.headers["location"] == f"/v1/environments/{body['id']}"
    assert body["object"] == "environment"
    assert body["spec"].items() >= spec.items()
    assert body["action_schema"] == {"type": "integer", "minimum": 0, "maximum": 1}
    assert any_api.get(response.headers["location"]).json() == body
    assert any_api.delete(response.headers["location"]).status_code == 204
    problem(any_api.get(response.headers["location"]), 404, "not_found")
    problem(any_api.delete(response.headers["location"]), 404, "not_found")


def test_identical_environments_are_one_object(any_api: Any) -> None:
    first = any_api.post("/v1/environments", CARTPOLE)
    again = any_api.post("/v1/environments", CARTPOLE | {"arguments": {}, "max_episode_steps": None})
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == again.json()
    other = any_api.post("/v1/environments", CARTPOLE | {"max_episode_steps": 200})
    assert other.status_code == 201
    assert other.json()["limit_from"] == "declared"
    policy = any_api.created("/v1/policies", {"environment": CARTPOLE})
    assert policy["environment_id"] == first.json()["id"]


def test_an_environment_in_use_cannot_be_deleted(any_api: Any, problem: Callable[..., Any]) -> None:
    policy = any_api.created("/v1/policies", {"environment": CARTPOLE})
    path = f"/v1/environments/{policy['environment_id']}"
    response = any_api.delete(path)
    problem(response, 409, "in_use")
    assert response.headers["x-should-retry"] == "false"
    assert any_api.delete(f"/v1/policies/{policy['id']}").status_code == 204
    assert any_api.delete(path).status_code == 204


def test_many_who_create_the_same_environment_get_the_same_one(any_api: Any) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: any_api.post("/v1/environments", BANDIT), range(8)))
    assert sorted({answer.status_code for answer in answers}) == [200, 201]
    assert len({answer.json()["id"] for answer in answers}) == 1


# --- policies


def test_a_policy_is_created_with_a_checkpoint_and_acts(any_api: Any, problem: Callable[..., Any]) -> None:
    wanted = {"environment": CARTPOLE, "seed": 3, "name": "mine", "metadata": {"course": "rl"}}
    response = any_api.post("/v1/policies", wanted)
    assert response.status_code == 201
    body = response.json()
    path = response.headers["location"]
    assert path == f"/v1/policies/{body['id']}"
    assert (body["name"], body["metadata"], body["seed"], body["updates"]) == ("mine", {"course": "rl"}, 3, 0)
    assert body["spec"]["hidden"] == [64, 64]
    assert body["spec"]["distribution"] == {"kind": "softmax"}
    assert body["observation_schema"]["minItems"] == 4
    assert body["best_checkpoint_id"] is None
    assert any_api.get(path).json() == body
    acted = any_api.post(f"{path}/act", {"observation": [0.0, 0.1, 0.0, -0.1]})
    assert acted.status_code == 200
    assert acted.json()["checkpoint_id"] == body["checkpoint_id"]
    assert any_api.delete(path).status_code == 204
    problem(any_api.get(path), 404, "not_found")
    problem(any_api.get(f"/v1/checkpoints/{body['checkpoint_id']}"), 404, "not_found")


def test_a_seed_that_is_left_out_is_drawn_and_returned(api: Any) -> None:
    drawn = [api.created("/v1/policies", {"environment": CARTPOLE}) for _ in range(2)]
    assert drawn[0]["seed"] != drawn[1]["seed"]
    again = api.created("/v1/policies", {"environment": CARTPOLE, "seed": drawn[0]["seed"]})
    contents = [api.get(f"/v1/checkpoints/{one['checkpoint_id']}").json()["sha256"] for one in (drawn[0], again)]
    assert contents[0] == contents[1]


def test_a_policy_of_an_unknown_environment_is_refused(any_api: Any, problem: Callable[..., Any]) -> None:
    response = any_api.post("/v1/policies", {"environment": "env_" + "0" * 32})
    problem(response, 404, "not_found", ("/environment", "not_found"))


def test_the_start_of_a_policy_can_be_given(api: Any) -> None:
    theta = [[0.5, -0.5], [0.25, 0.0]]
    spec = {"kind": "linear", "initial_parameters": {"theta": theta}}
    created = api.created("/v1/policies", {"environment": BANDIT, "policy": spec})
    policy = pgengine.load(api.get(f"/v1/checkpoints/{created['checkpoint_id']}/content").content)
    np.testing.assert_array_equal(policy.parameters["theta"], np.array(theta, dtype=np.float32))


# --- checkpoints


def test_a_checkpoint_is_downloaded_and_loaded(any_api: Any) -> None:
    policy = any_api.created("/v1/policies", {"environment": CARTPOLE})
    path = f"/v1/checkpoints/{policy['checkpoint_id']}"
    body = any_api.get(path).json()
    assert (body["object"], body["policy_id"], body["job_id"], body["updates"]) == ("checkpoint", policy["id"], None, 0)
    response = any_api.get(f"{path}/content")
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.headers["content-disposition"] == f'attachment; filename="{body["id"]}.safetensors"'
    assert int(response.headers["content-length"]) == len(response.content) == body["size"]
    assert hashlib.sha256(response.content).hexdigest() == body["sha256"]
    assert response.headers["etag"] == f'"{body["sha256"]}"'
    assert pgengine.load(response.content).updates == 0
    known = any_api.get(f"{path}/content", headers={"if-none-match": response.headers["etag"]})
    assert (known.status_code, known.content) == (304, b"")


def test_the_latest_and_the_best_checkpoint_are_told_apart(database: Database, serve: Callable[..., Any]) -> None:
    with serve(Settings(), database) as api:
        policy = api.created("/v1/policies", {"environment": CARTPOLE})
        with database.write() as session:
            data = checkpoints.content(session, policy["checkpoint_id"])
            drawn = pgengine.load(data)
            ids = [policy["checkpoint_id"]]
            for updates, mean_return in ((1, 20.0), (2, 90.0), (3, 90.0), (4, None)):
                moved = drawn.copy(updates=updates).to_bytes()
                selection = {"mean_return": mean_return, "method": "betting", "lower_bound": 1.0, "episodes": 5}
                evaluation = {"mean_return": 95.0, "confidence_interval": [94.0, 96.0], "episodes": 5}
                row = checkpoints.put(
                    session,
                    policy["id"],
                    updates,
                    moved,
                    selection=selection if mean_return else None,
                    # a high number that decided nothing does not make a checkpoint the best
                    evaluation=evaluation if updates == 4 else None,
                )
                ids.append(row.id)
            assert checkpoints.best(session, policy["id"]).id == ids[3]
        body = api.get(f"/v1/policies/{policy['id']}").json()
        assert (body["checkpoint_id"], body["best_checkpoint_id"], body["updates"]) == (ids[4], ids[3], 4)
        listed = api.get(f"/v1/policies/{policy['id']}/checkpoints").json()["data"]
        assert [one["id"] for one in listed] == ids[::-1]
        assert (listed[1]["selection"]["mean_return"], listed[1]["evaluation"]) == (90.0, None)
        assert (listed[0]["selection"], listed[0]["evaluation"]["mean_return"]) == (None, 95.0)


def test_a_repeated_checkpoint_is_one_and_other_bytes_are_another(
    database: Database, serve: Callable[..., Any]
) -> None:
    with serve(Settings(), database) as api:
        policy = api.created("/v1/policies", {"environment": CARTPOLE})
    with database.write() as session:
        first = checkpoints.put(
            session, policy["id"], 5, b"a", state_bytes=b"state of a", evaluation={"mean_return": 1.0}
        )
        again = checkpoints.put(session, policy["id"], 5, b"a")
        assert again.id == first.id
        assert again.evaluation == {"mean_return": 1.0}
        assert checkpoints.state(session, first.id) == b"state of a"
        other = checkpoints.put(session, policy["id"], 5, b"b", state_bytes=b"state of b")
        assert other.id != first.id
        assert checkpoints.latest(session, policy["id"]).id == other.id
        assert checkpoints.content(session, other.id) == b"b"
        assert len(checkpoints.heads(session, [policy["id"], "pol_unknown"])) == 1
        newest = checkpoints.put(session, policy["id"], 6, b"c", state_bytes=b"state of c")
        # an older state is kept, too: updates are explained from the nearest one before them
        assert checkpoints.state(session, other.id) == b"state of b"
        assert checkpoints.state(session, newest.id) == b"state of c"


# --- lists


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_a_list_is_read_page_by_page(any_api: Any, order: str) -> None:
    ids = [
        any_api.created("/v1/policies", {"environment": BANDIT, "policy": {"kind": "linear"}})["id"] for _ in range(7)
    ]
    expected = ids if order == "asc" else ids[::-1]
    seen: list[str] = []
    path = f"/v1/policies?limit=3&order={order}"
    page = any_api.get(path).json()
    while True:
        assert page["object"] == "list"
        assert len(page["data"]) <= 3
        seen += [one["id"] for one in page["data"]]
        assert page["has_more"] is (page["next_cursor"] is not None)
        if not page["has_more"]:
            break
        page = any_api.get(f"{path}&after={page['next_cursor']}").json()
    assert seen == expected
    # an object's own id is a cursor, even of one that is gone
    assert any_api.delete(f"/v1/policies/{expected[2]}").status_code == 204
    after = any_api.get(f"/v1/policies?order={order}&after={expected[2]}").json()
    assert [one["id"] for one in after["data"]] == expected[3:]


def test_lists_carry_no_arrays(api: Any) -> None:
    theta = {"kind": "linear", "initial_parameters": {"theta": [[0.0, 0.0], [0.0, 0.0]]}}
    api.created("/v1/training-jobs", {"environment": BANDIT, "policy": theta})
    for path in ("/v1/environments", "/v1/policies", "/v1/training-jobs"):
        (one,) = api.get(path).json()["data"]
        assert not [name for name, value in one.items() if isinstance(value, list) and name != "notices"]
        assert not {"spec", "environment", "policy"} & set(one)


# --- idempotency


@pytest.mark.parametrize("header", ["Idempotency-Key", "X-Idempotency-Key"])
def test_a_repeated_request_creates_nothing_and_is_answered_the_same(any_api: Any, header: str) -> None:
    body = {"environment": CARTPOLE}
    answers = [any_api.post("/v1/policies", body, headers={header: "one"}) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [201] * 3
    assert len({answer.text for answer in answers}) == 1
    assert len({answer.headers["location"] for answer in answers}) == 1
    assert "idempotency-replayed" not in answers[0].headers
    assert answers[1].headers["idempotency-replayed"] == "true"
    assert len(any_api.get("/v1/policies").json()["data"]) == 1


def test_a_key_used_for_another_request_is_refused(api: Any, problem: Callable[..., Any]) -> None:
    assert api.post("/v1/policies", {"environment": CARTPOLE}, headers=IDEMPOTENT).status_code == 201
    other = api.post("/v1/policies", {"environment": CARTPOLE, "name": "b"}, headers=IDEMPOTENT)
    problem(other, 422, "idempotency_key_reused")
    problem(api.post("/v1/environments", CARTPOLE, headers=IDEMPOTENT), 422, "idempotency_key_reused")


def test_twins_at_the_same_moment_create_one_object(any_api: Any) -> None:
    body = {"environment": CARTPOLE}
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: any_api.post("/v1/policies", body, headers=IDEMPOTENT), range(6)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(any_api.get("/v1/policies").json()["data"]) == 1


def test_what_was_refused_may_be_tried_again_with_the_same_key(api: Any) -> None:
    assert api.post("/v1/policies", {"environment": "env_" + "0" * 32}, headers=IDEMPOTENT).status_code == 404
    assert api.post("/v1/policies", {"environment": CARTPOLE}, headers=IDEMPOTENT).status_code == 201


def _table(states: int) -> dict[str, Any]:
    """A finite MDP as large as wanted: each action goes on to the next state."""
    rows = [[[float(n == (s + 1) % states) for n in range(states)]] for s in range(states)]
    numbers = [[s / 7] for s in range(states)]
    initial = [1.0] + [0.0] * (states - 1)
    return {"kind": "tabular", "transitions": rows, "rewards": numbers, "initial": initial, "horizon": 2}


def test_repeated_creations_with_new_keys_do_not_store_their_tables_again(any_api: Any) -> None:
    environment = _table(80)
    features = {"kind": "table", "values": [[[s / 3] * 40] for s in range(80)]}
    bodies = {
        "/v1/environments": environment,
        "/v1/policies": {"environment": environment, "policy": {"kind": "linear", "features": features}},
    }
    for path, body in bodies.items():
        first, again = (any_api.post(path, body, headers={"idempotency-key": path}) for _ in range(2))
        assert (first.status_code, again.status_code, again.headers["idempotency-replayed"]) == (201, 201, "true")
        assert again.text == first.text
        assert len(first.text) > LARGEST_KEPT
    with any_api.database.read() as session:
        kept = session.scalars(select(Idempotency.response)).all()
    assert len(kept) == 2
    assert max(len(json.dumps(response)) for response in kept) < LARGEST_KEPT


# --- the program


def test_the_application_and_acting_load_no_torch() -> None:
    program = (
        "import sys, server.app, pgengine\n"
        "from pgengine.spec import GymnasiumSpec, MlpPolicySpec\n"
        "spec = GymnasiumSpec(id='CartPole-v1')\n"
        "policy = pgengine.create_policy(MlpPolicySpec(), spec, pgengine.describe(spec), seed=0)\n"
        "policy.act(policy.parse([0.0] * 4, batch=False))\n"
        "assert 'torch' not in sys.modules, 'torch takes more than a second to load'\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, capture_output=True).returncode == 0


@pytest.fixture
def content(api: Any) -> tuple[str, bytes, str]:
    """A checkpoint's content: its path, its bytes, its tag."""
    policy = api.created("/v1/policies", {"environment": {"kind": "gymnasium", "id": "CartPole-v1"}})
    (checkpoint,) = api.get(f"/v1/policies/{policy['id']}/checkpoints").json()["data"]
    path = f"/v1/checkpoints/{checkpoint['id']}/content"
    whole = api.get(path)
    assert whole.headers["accept-ranges"] == "bytes"
    return path, whole.content, whole.headers["etag"]


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ("{tag}", 304),
        ("*", 304),
        (' "a", {tag} ', 304),
        ('"a",W/{tag},"b"', 304),
        ('"a, b", {tag}', 304),
        ('"a"', 200),
        ("{bare}", 200),
        ('"{bare}x"', 200),
        ('"a, {bare}"', 200),
        ("", 200),
    ],
)
def test_the_tags_of_if_none_match_are_a_list(
    api: Any, content: tuple[str, bytes, str], sent: str, status: int
) -> None:
    path, _, tag = content
    headers = {"if-none-match": sent.format(tag=tag, bare=tag.strip('"'))}
    response = api.get(path, headers=headers)
    assert response.status_code == status
    assert response.headers["etag"] == tag
    assert (response.content == b"") == (status == 304)
    assert api("HEAD", path, headers=headers).status_code == status


@pytest.mark.parametrize(
    ("sent", "part"),
    [
        ("bytes=0-0", slice(0, 1)),
        ("bytes=100-199", slice(100, 200)),
        ("bytes=100-", slice(100, None)),
        ("bytes=-7", slice(-7, None)),
        ("bytes=5-999999999999", slice(5, None)),
        ("bytes=-999999999999", slice(None)),
        ("Bytes = 1 - 2", slice(1, 3)),
    ],
)
def test_a_part_of_a_content_is_sent(api: Any, content: tuple[str, bytes, str], sent: str, part: slice) -> None:
    path, data, tag = content
    response = api.get(path, headers={"range": sent, "if-range": tag})
    first, behind, _ = part.indices(len(data))
    assert (response.status_code, response.content) == (206, data[part])
    assert response.headers["content-range"] == f"bytes {first}-{behind - 1}/{len(data)}"
    assert response.headers["etag"] == tag


@pytest.mark.parametrize("sent", ["bytes=3-2", "bytes=-", "lines=1-2", "bytes=0-1,4-5", "bytes=a-b", "bytes", ""])
def test_a_range_that_is_none_gets_the_whole(api: Any, content: tuple[str, bytes, str], sent: str) -> None:
    path, data, _ = content
    response = api.get(path, headers={"range": sent})
    assert (response.status_code, response.content) == (200, data)


def test_a_part_of_something_else_gets_the_whole(api: Any, content: tuple[str, bytes, str]) -> None:
    path, data, tag = content
    for other in ('"other"', f"W/{tag}", "Sat, 01 Nov 2025 00:00:00 GMT"):
        response = api.get(path, headers={"range": "bytes=1-2", "if-range": other})
        assert (response.status_code, response.content) == (200, data)


@pytest.mark.parametrize("sent", ["bytes={size}-", "bytes=-0", "bytes=999999999999-"])
def test_bytes_that_there_are_not_are_refused(
    api: Any, problem: Callable[..., Any], content: tuple[str, bytes, str], sent: str
) -> None:
    path, data, _ = content
    response = api.get(path, headers={"range": sent.format(size=len(data))})
    problem(response, 416, "range_not_satisfiable")
    assert response.headers["content-range"] == f"bytes */{len(data)}"
