"""The act path behind the real gate: answers, refusals, what is kept in memory and for how long."""

import asyncio
import gc
import json
import math
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx
import numpy as np
import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine
from starlette.applications import Starlette

import pgengine
from pgengine.spec import (
    GaussianSpec,
    GymnasiumSpec,
    LinearPolicySpec,
    MlpPolicySpec,
    TabularSpec,
    TransformerPolicySpec,
)
from server.checkpoints import store as checkpoints
from server.database import Database, NamingBase
from server.environments import store as environments
from server.environments.types import AllowList
from server.keys.store import ANYBODY
from server.metrics import Metrics
from server.middleware import Gate
from server.policies import loaded
from server.policies import store as policies
from server.policies.act import LARGE_AT_ONCE, ActEndpoint
from server.policies.batches import rows_of
from server.settings import Settings
from tests.server import components_environments

CARTPOLE = GymnasiumSpec(id="CartPole-v1")
PENDULUM = GymnasiumSpec(id="Pendulum-v1")
CHAIN = TabularSpec(
    transitions=[[[0.0, 1.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]],
    rewards=[[1.0, 0.0], [0.0, 0.0]],
    initial=[1.0, 0.0],
    terminal=[1],
    horizon=3,
)
UPRIGHT = [0.01, -0.02, 0.03, 0.04]
SWINGING = [1.0, 0.0, 0.5]
MOVED = [0.5, 1.5, 0.0, -0.5]


def made(database: Database, environment: GymnasiumSpec | TabularSpec, policy: Any) -> str:
    """A stored policy at update 0."""
    with database.read() as session:
        home = environments.described(session, environment, allowed=AllowList(components_environments.IDS))
    drawn = policies.draw(policy, home.spec, home.facts, seed=3)
    with database.write() as session:
        return policies.create(session, environments.ensure(session, home)[0].id, drawn).id


def put(database: Database, policy_id: str, updates: int, mean_return: float | None = None) -> str:
    """Another checkpoint of a policy, with other parameters."""
    with database.write() as session:
        policy = pgengine.load(checkpoints.content(session, checkpoints.latest(session, policy_id).id))
        moved = {name: array + np.float32(updates) for name, array in policy.parameters.items()}
        data = policy.copy(moved, updates).to_bytes()
        selection = None if mean_return is None else {"mean_return": mean_return}
        return checkpoints.put(session, policy_id, updates, data, selection=selection).id


def head_of(database: Database, policy_id: str) -> str:
    with database.read() as session:
        return checkpoints.latest(session, policy_id).id


@contextmanager
def counted_statements() -> Iterator[list[str]]:
    """Every statement that is sent to any database in the block."""
    statements: list[str] = []

    def count(connection: Any, cursor: Any, statement: str, *more: Any) -> None:
        statements.append(statement)

    event.listen(Engine, "before_cursor_execute", count)
    try:
        yield statements
    finally:
        event.remove(Engine, "before_cursor_execute", count)


@asynccontextmanager
async def asking(database: Database, max_body_bytes: int = 200_000, **bounds: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the gate with the endpoint behind it."""
    metrics = Metrics("test")
    endpoint = ActEndpoint(database, metrics=metrics, **{"max_batch": 64, "max_depth": 16, **bounds})
    gate = Gate(
        Starlette(),
        endpoint,
        settings=Settings(max_body_bytes=max_body_bytes),
        metrics=metrics,
        verify=lambda _: None,
        anyone=ANYBODY,
    )
    transport = httpx.ASGITransport(gate)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client
    await endpoint.stop()


async def ask(client: httpx.AsyncClient, policy_id: str, **body: Any) -> dict[str, Any]:
    response = await client.post(f"/v1/policies/{policy_id}/act", json=body)
    assert response.status_code == 200, response.text
    return dict(response.json())


async def refused(client: httpx.AsyncClient, policy_id: str, body: Any, status: int = 422) -> dict[str, Any]:
    """The problem document that answers a body."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = await client.post(
        f"/v1/policies/{policy_id}/act", content=content, headers={"content-type": "application/json"}
    )
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = dict(response.json())
    assert problem["request_id"] == response.headers["x-request-id"]
    return problem


# --- answers


async def _softmax(database: Database) -> None:
    policy_id = made(database, CARTPOLE, MlpPolicySpec())
    async with asking(database) as client:
        one = await ask(client, policy_id, observation=UPRIGHT)
        assert set(one) == {"action", "log_prob", "probabilities", "checkpoint_id", "updates"}
        assert one["action"] in (0, 1)
        assert math.isclose(math.exp(one["log_prob"]), one["probabilities"][one["action"]], rel_tol=1e-5)
        assert math.isclose(sum(one["probabilities"]), 1.0, rel_tol=1e-5)
        assert (one["checkpoint_id"], one["updates"]) == (head_of(database, policy_id), 0)
        batch = await ask(client, policy_id, observations=[UPRIGHT, MOVED, UPRIGHT])
        assert set(batch) == {"actions", "log_probs", "probabilities", "checkpoint_id", "updates"}
        assert [len(batch[name]) for name in ("actions", "log_probs", "probabilities")] == [3, 3, 3]


def test_softmax_answers_action_log_prob_and_probabilities(database: Database) -> None:
    asyncio.run(_softmax(database))


def test_gaussian_answers_mean_sigma_and_the_raw_sample(sqlite_database: Database) -> None:
    async def run() -> None:
        spec = MlpPolicySpec(distribution=GaussianSpec(initial_sigma=4.0))
        policy_id = made(sqlite_database, PENDULUM, spec)
        async with asking(sqlite_database) as client:
            one = await ask(client, policy_id, observation=SWINGING, seed=1)
            assert set(one) == {"action", "log_prob", "mean", "sigma", "sample", "checkpoint_id", "updates"}
            assert one["sigma"] == pytest.approx([4.0], rel=1e-5)
            z = (one["sample"][0] - one["mean"][0]) / one["sigma"][0]
            density = -0.5 * z * z - math.log(one["sigma"][0]) - 0.5 * math.log(2 * math.pi)
            assert one["log_prob"] == pytest.approx(density, rel=1e-4)
            batch = await ask(client, policy_id, observations=[SWINGING] * 32, seed=1)
            assert set(batch) == {"actions", "log_probs", "means", "sigmas", "samples", "checkpoint_id", "updates"}
            assert np.array(batch["sigmas"]).shape == np.array(batch["means"]).shape == (32, 1)
            # the action is the sample's image inside the box, the sample is not
            assert np.abs(batch["samples"]).max() > 2.0
            assert np.array_equal(np.clip(batch["samples"], -2.0, 2.0), np.array(batch["actions"]))

    asyncio.run(run())


def test_a_head_answers_a_sigma_for_each_row(sqlite_database: Database) -> None:
    async def run() -> None:
        wide = GymnasiumSpec(id=components_environments.WIDE)
        policy_id = made(sqlite_database, wide, MlpPolicySpec(distribution=GaussianSpec(sigma="head")))
        put(sqlite_database, policy_id, 1)
        async with asking(sqlite_database) as client:
            rows = [[0.5, -0.5], [-1.0, 1.0]]
            one = await ask(client, policy_id, observation=rows[1], deterministic=True)
            batch = await ask(client, policy_id, observations=rows, deterministic=True)
            assert np.array(batch["sigmas"]).shape == np.array(batch["means"]).shape == (2, 2)
            assert (one["sigma"], one["mean"], one["log_prob"]) == (
                batch["sigmas"][1],
                batch["means"][1],
                batch["log_probs"][1],
            )
            # at the mean the density tells sigma
            expected = -sum(math.log(sigma) + 0.5 * math.log(2 * math.pi) for sigma in one["sigma"])
            assert one["log_prob"] == pytest.approx(expected, rel=1e-4)

    asyncio.run(run())


def test_actions_of_several_components(sqlite_database: Database) -> None:
    async def run() -> None:
        policy_id = made(sqlite_database, GymnasiumSpec(id=components_environments.MULTI_DISCRETE), MlpPolicySpec())
        async with asking(sqlite_database) as client:
            batch = await ask(client, policy_id, observations=[[0, 4], [1, 0], [1, 2]], seed=3)
            one = await ask(client, policy_id, observation=[0, 4], seed=3)
            assert set(one) == {"action", "log_prob", "probabilities", "checkpoint_id", "updates"}
            for name in ("action", "log_prob"):
                assert one[name] == batch[f"{name}s"][0]
            assert one["probabilities"] == batch["probabilities"][0]
            assert [[len(part) for part in row] for row in batch["probabilities"]] == [[3, 2]] * 3
            for row, action, log_prob in zip(batch["probabilities"], batch["actions"], batch["log_probs"], strict=True):
                taken = row[0][action[0] - 1] * row[1][action[1]]
                assert math.exp(log_prob) == pytest.approx(taken, rel=1e-5)
            problem = await refused(client, policy_id, {"observation": [0, 5]})
            assert problem["errors"][0]["pointer"].startswith("/observation")

    asyncio.run(run())


def test_actions_of_several_coins(sqlite_database: Database) -> None:
    async def run() -> None:
        policy_id = made(sqlite_database, GymnasiumSpec(id=components_environments.MULTI_BINARY), MlpPolicySpec())
        async with asking(sqlite_database) as client:
            batch = await ask(client, policy_id, observations=[[0, 1, 0, 1], [1, 1, 1, 1]], seed=3)
            assert np.array(batch["probabilities"]).shape == np.array(batch["actions"]).shape == (2, 3)
            for row, action, log_prob in zip(batch["probabilities"], batch["actions"], batch["log_probs"], strict=True):
                taken = math.prod(p if coin == 1 else 1.0 - p for p, coin in zip(row, action, strict=True))
                assert math.exp(log_prob) == pytest.approx(taken, rel=1e-5)

    asyncio.run(run())


MEMORY = TransformerPolicySpec(window=3, width=8)


def test_a_policy_with_memory_is_asked_with_its_history(database: Database) -> None:
    async def run() -> None:
        policy_id = made(database, CARTPOLE, MEMORY)
        rng = np.random.default_rng(0)
        with database.write() as session:
            policy = pgengine.load(checkpoints.content(session, checkpoints.latest(session, policy_id).id))
            # in the order of names: that of a file that was read differs from time to time
            shapes = {name: policy.parameters[name].shape for name in sorted(policy.parameters)}
            drawn = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
            checkpoints.put(session, policy_id, 1, policy.copy(drawn, 1).to_bytes())
        async with asking(database) as client:
            history = [UPRIGHT, MOVED, [0.1, 0.2, 0.3, 0.4]]
            whole = await ask(client, policy_id, history=history, seed=1)
            assert set(whole) == {"action", "log_prob", "probabilities", "checkpoint_id", "updates"}
            # what was seen before is remembered, and its order matters
            short = await ask(client, policy_id, history=history[1:], seed=1)
            turned = await ask(client, policy_id, history=[MOVED, UPRIGHT, history[2]], seed=1)
            assert len({json.dumps(one["probabilities"]) for one in (whole, short, turned)}) == 3
            batch = await ask(client, policy_id, histories=[history, history[1:], history[:1]], seed=1)
            assert batch["probabilities"][:2] == [whole["probabilities"], short["probabilities"]]
            assert (batch["actions"][0], batch["log_probs"][0]) == (whole["action"], whole["log_prob"])

    asyncio.run(run())


def test_histories_of_discrete_observations(sqlite_database: Database) -> None:
    async def run() -> None:
        policy_id = made(sqlite_database, CHAIN, MEMORY)
        async with asking(sqlite_database) as client:
            batch = await ask(client, policy_id, histories=[[0], [0, 1, 0]])
            assert len(batch["actions"]) == 2
            assert (await ask(client, policy_id, history=[0, 1]))["action"] in (0, 1)
            problem = await refused(client, policy_id, {"histories": [[0], [0, 2]]})
            assert problem["errors"][0]["pointer"].startswith("/histories/1")

    asyncio.run(run())


def many_histories(count: int, k: int, digits: int) -> list[Any]:
    drawn = np.random.default_rng(0).uniform(-1.0, 1.0, (count, k, len(UPRIGHT)))
    return [history[: 1 + row % k] for row, history in enumerate(np.round(drawn, digits).tolist())]


@pytest.mark.slow
def test_a_large_batch_takes_less_memory_than_its_lists_would(sqlite_database: Database) -> None:
    """With all of it as lists and floats the peak is 14 times the bytes of this body, piece by piece 4.2 times."""

    async def run() -> None:
        policy_id = made(sqlite_database, CARTPOLE, TransformerPolicySpec(window=64, width=2, heads=1, layers=1))
        histories = many_histories(2000, 64, digits=3)
        body = json.dumps({"histories": histories, "seed": 1}, separators=(",", ":")).encode()
        assert len(body) > 1_500_000
        async with asking(sqlite_database, len(body), max_batch=2000) as client:
            small = await ask(client, policy_id, histories=histories[:20], seed=1)
            tracemalloc.start()
            try:
                response = await client.post(
                    f"/v1/policies/{policy_id}/act", content=body, headers={"content-type": "application/json"}
                )
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
            answer = response.json()
            assert answer["probabilities"][:20] == small["probabilities"]
            assert answer["actions"][:20] == small["actions"]
            assert len(answer["actions"]) == 2000
            assert peak < 6 * len(body)

    asyncio.run(run())


@pytest.mark.slow
def test_a_fault_of_a_large_batch_has_its_place(sqlite_database: Database) -> None:
    async def run() -> None:
        policy_id = made(sqlite_database, CARTPOLE, TransformerPolicySpec(window=64, width=2, heads=1, layers=1))
        good = [json.dumps(history) for history in many_histories(500, 64, digits=17)]
        async with asking(sqlite_database, 2_000_000, max_batch=500) as client:
            for history, pointer, code in (
                ("[[0, 0, 0]]", "/histories/480/0", "observation_shape"),
                ("[]", "/histories/480", "observation_shape"),
                ("[[0, 0, 0, true]]", "/histories/480/0/3", "observation_kind"),
                ("[[0, 0, 0, 9007199254740993]]", "/histories/480/0/3", "integer_too_large"),
                ("[[0, 0, 0, 1e39]]", "/histories/480/0", "observation_not_finite"),
                ("[[0, 0, 0, 1e400]]", "/histories/480/0/3", "not_finite"),
                ('[[0, 0, 0, "]"]]', "/histories/480/0/3", "observation_kind"),
                ("3", "/histories/480", "observation_shape"),
                ("[[0, 0, 0, 0]", "", "malformed_json"),
            ):
                # beyond a megabyte, the rows are read piece by piece
                body = ",".join([*good[:480], history, *good[481:]])
                assert len(body) > 1_000_000
                (fault,) = (await refused(client, policy_id, f'{{"histories": [{body}]}}'.encode()))["errors"]
                assert (fault["pointer"], fault["code"]) == (pointer, code)
            (fault,) = (await refused(client, policy_id, f'{{"histories": [{",".join(good)}, []]}}'.encode()))["errors"]
            assert (fault["pointer"], fault["code"]) == ("/histories", "too_long")

    asyncio.run(run())


@pytest.mark.parametrize(
    "text", ["[]", "3", "[1, [2]]", "[[1], 2]", "[[1] , 2, [3]]", "[[1], {}]", '[["]"]]', "[[1], null]", "{}", "[{}]"]
)
def test_what_is_no_list_of_lists_is_not_taken_for_one(text: str) -> None:
    assert rows_of(memoryview(text.encode())) is None


def test_the_rows_of_a_list_are_found() -> None:
    rows = [[], [[1.5, [2]], 3], [[[]]], *([index] * 50 for index in range(5000))]
    found = rows_of(memoryview(json.dumps(rows, indent=1).encode()))
    assert found is not None
    assert len(found) == len(rows)
    pieces = list(found.pieces())
    assert len(pieces) > 3
    assert [row for _, piece in pieces for row in piece] == rows
    assert [first for first, _ in pieces] == np.cumsum([0, *(len(piece) for _, piece in pieces[:-1])]).tolist()


@pytest.mark.parametrize(
    ("policy", "body", "pointer", "code"),
    [
        (MEMORY, {"observation": UPRIGHT}, "/observation", "history_expected"),
        (MEMORY, {"observations": [UPRIGHT]}, "/observations", "history_expected"),
        (MlpPolicySpec(hidden=[4]), {"history": [UPRIGHT]}, "/history", "no_memory"),
        (MlpPolicySpec(hidden=[4]), {"histories": [[UPRIGHT]]}, "/histories", "no_memory"),
        # a transformer over one observation has nothing to remember
        (TransformerPolicySpec(window=1, width=8), {"history": [UPRIGHT]}, "/history", "no_memory"),
        (MEMORY, {"history": [UPRIGHT], "observation": UPRIGHT}, "/history", "conflict"),
        (MEMORY, {"history": [UPRIGHT], "histories": [[UPRIGHT]]}, "/histories", "conflict"),
        (MEMORY, {}, "/observation", "missing"),
        (MEMORY, {"histories": []}, "/histories", "too_short"),
        (MEMORY, {"histories": [[UPRIGHT]] * 65}, "/histories", "too_long"),
        (MEMORY, {"histories": 3}, "/histories", "list_type"),
        (MEMORY, {"history": []}, "/history", None),
        (MEMORY, {"history": [UPRIGHT] * 4}, "/history", None),
        (MEMORY, {"history": UPRIGHT[:3]}, "/history/0", None),
        (MEMORY, {"history": [UPRIGHT, UPRIGHT[:3]]}, "/history/1", None),
        (MEMORY, {"history": [UPRIGHT, [0.0, 0.0, 0.0, "1"]]}, "/history/1/3", None),
        (MEMORY, {"history": [UPRIGHT, [0.0, 0.0, 0.0, 2**53 + 2]]}, "/history/1/3", "integer_too_large"),
        (MEMORY, {"histories": [[UPRIGHT], [[1e39, 0.0, 0.0, 0.0]]]}, "/histories/1", "observation_not_finite"),
    ],
)
def test_what_is_no_history_is_refused_with_its_place(
    sqlite_database: Database, policy: Any, body: dict[str, Any], pointer: str, code: str | None
) -> None:
    async def run() -> None:
        policy_id = made(sqlite_database, CARTPOLE, policy)
        async with asking(sqlite_database) as client:
            (fault,) = (await refused(client, policy_id, body))["errors"]
            assert fault["pointer"].startswith(pointer)
            assert code is None or fault["code"] == code

    asyncio.run(run())


def test_discrete_observations_are_integers(sqlite_database: Database) -> None:
    async def run() -> None:
        policy_id = made(sqlite_database, CHAIN, LinearPolicySpec())
        async with asking(sqlite_database) as client:
            assert (await ask(client, policy_id, observation=1))["probabilities"] == pytest.approx([0.5, 0.5])
            assert len((await ask(client, policy_id, observations=[0, 1]))["actions"]) == 2
            problem = await refused(client, policy_id, {"observations": [0, 2]})
            assert problem["errors"][0]["pointer"] == "/observations/1"

    asyncio.run(run())


def test_a_row_gets_the_same_answer_alone_and_in_every_batch(sqlite_database: Database) -> None:
    async def run() -> None:
        policy_id = made(sqlite_database, CARTPOLE, MlpPolicySpec())
        rows = np.random.default_rng(0).normal(size=(37, 4)).tolist()
        async with asking(sqlite_database) as client:
            for how in ({"seed": 7}, {"deterministic": True}):
                alone = await ask(client, policy_id, observation=rows[0], **how)
                whole = await ask(client, policy_id, observations=rows, **how)
                part = await ask(client, policy_id, observations=rows[:5], **how)
                assert alone["action"] == whole["actions"][0]
                assert alone["log_prob"] == whole["log_probs"][0]
                assert alone["probabilities"] == whole["probabilities"][0]
                assert part["actions"] == whole["actions"][:5]
                assert part["log_probs"] == whole["log_probs"][:5]
            again = await ask(client, policy_id, observations=rows, seed=7)
            assert again == await ask(client, policy_id, observations=rows, seed=7)

    asyncio.run(run())


def test_unseeded_draws_follow_the_probabilities(sqlite_database: Database) -> None:
    """Null hypothesis: actions are Bernoulli(p) with the published p. 640 draws, two-sided 6 sigma: 2e-9."""

    async def run() -> None:
        policy_id = made(sqlite_database, CARTPOLE, MlpPolicySpec())
        put(sqlite_database, policy_id, 1)
        async with asking(sqlite_database) as client:
            drawn: list[int] = []
            for _ in range(10):
                answer = await ask(client, policy_id, observations=[UPRIGHT] * 64)
                drawn += answer["actions"]
            p = answer["probabilities"][0][1]
            assert abs(sum(drawn) - 640 * p) <= 6 * math.sqrt(640 * p * (1 - p)) + 1e-9

    asyncio.run(run())


# --- checkpoints


async def _checkpoints(database: Database) -> None:
    policy_id = made(database, CARTPOLE, MlpPolicySpec(hidden=[4]))
    first = head_of(database, policy_id)
    best = put(database, policy_id, 1, mean_return=100.0)
    put(database, policy_id, 2, mean_return=50.0)
    last = put(database, policy_id, 3)
    async with asking(database) as client:
        for asked, expected, updates in (
            ("latest", last, 3),
            ("best", best, 1),
            (first, first, 0),
            (last, last, 3),
        ):
            answer = await ask(client, policy_id, observation=UPRIGHT, checkpoint=asked)
            assert (answer["checkpoint_id"], answer["updates"]) == (expected, updates)


def test_latest_best_and_named_checkpoints(database: Database) -> None:
    asyncio.run(_checkpoints(database))


def test_no_best_checkpoint_before_one_was_looked_at(sqlite_database: Database) -> None:
    async def run() -> None:
        policy_id = made(sqlite_database, CARTPOLE, MlpPolicySpec(hidden=[4]))
        async with asking(sqlite_database) as client:
            problem = await refused(client, policy_id, {"observation": UPRIGHT, "checkpoint": "best"}, 404)
            assert "selection" in problem["detail"]
            assert [error["pointer"] for error in problem["errors"]] == ["/checkpoint"]

    asyncio.run(run())


def test_unknown_and_foreign_ids(sqlite_database: Database) -> None:
    async def run() -> None:
        mine = made(sqlite_database, CARTPOLE, MlpPolicySpec(hidden=[4]))
        other = made(sqlite_database, CARTPOLE, MlpPolicySpec(hidden=[5]))
        nobody = "0" * 32
        async with asking(sqlite_database) as client:
            assert (await refused(client, f"pol_{nobody}", {"observation": UPRIGHT}, 404))["code"] == "not_found"
            foreign = {"observation": UPRIGHT, "checkpoint": head_of(sqlite_database, other)}
            for _ in range(2):  # read from the database, then from memory
                problem = await refused(client, mine, foreign, 404)
                assert [error["pointer"] for error in problem["errors"]] == ["/checkpoint"]
                await ask(client, other, **foreign)
            problem = await refused(client, mine, {"observation": UPRIGHT, "checkpoint": f"ckpt_{nobody}"}, 404)
            assert [error["pointer"] for error in problem["errors"]] == ["/checkpoint"]
            problem = await refused(client, "pol_1", {"observation": UPRIGHT})
            assert problem["errors"][0] == {
                "pointer": "/policy_id",
                "code": "malformed_id",
                "message": "Expected an id: pol_ and 32 hexadecimal digits.",
            }
            for name in ("newest", "", "ckpt_1", "a\x00", mine):
                problem = await refused(client, mine, {"observation": UPRIGHT, "checkpoint": name})
                assert problem["errors"][0]["pointer"] == "/checkpoint"

    asyncio.run(run())


# --- memory


async def _fresh(database: Database) -> None:
    policy_id = made(database, CARTPOLE, MlpPolicySpec(hidden=[4]))
    async with asking(database) as client:
        assert (await ask(client, policy_id, observation=UPRIGHT))["updates"] == 0
        put(database, policy_id, 1)
        async with asyncio.timeout(loaded.STALE_SECONDS + 2):
            while (await ask(client, policy_id, observation=UPRIGHT))["updates"] == 0:
                await asyncio.sleep(0.02)
        with database.write() as session:
            policies.delete(session, policy_id)
        async with asyncio.timeout(loaded.STALE_SECONDS + 2):
            while True:
                response = await client.post(f"/v1/policies/{policy_id}/act", json={"observation": UPRIGHT})
                if response.status_code == 404:
                    break
                await asyncio.sleep(0.02)


@pytest.mark.slow
def test_latest_is_seen_and_a_deleted_policy_stops_within_seconds(database: Database) -> None:
    asyncio.run(_fresh(database))


@pytest.mark.slow
def test_after_a_pause_nothing_stale_is_answered(sqlite_database: Database) -> None:
    async def run() -> None:
        policy_id = made(sqlite_database, CARTPOLE, MlpPolicySpec(hidden=[4]))
        async with asking(sqlite_database) as client:
            await ask(client, policy_id, observation=UPRIGHT)
            await asyncio.sleep(loaded.STALE_SECONDS)
            put(sqlite_database, policy_id, 1)
            assert (await ask(client, policy_id, observation=UPRIGHT))["updates"] == 1

    asyncio.run(run())


@pytest.mark.slow
def test_hits_open_no_transaction_and_all_policies_share_one_query_a_second(sqlite_database: Database) -> None:
    async def run() -> None:
        ids = [made(sqlite_database, CARTPOLE, MlpPolicySpec(hidden=[width])) for width in (4, 5, 6)]
        async with asking(sqlite_database) as client:
            for policy_id in ids:
                await ask(client, policy_id, observation=UPRIGHT)
            time = asyncio.get_running_loop().time
            began, rounds = time(), 0
            with counted_statements() as statements:

                def selects() -> int:
                    return sum(statement.startswith("SELECT") for statement in statements)

                while selects() < 3 or rounds < 50:
                    for policy_id in ids:
                        await ask(client, policy_id, observation=UPRIGHT)
                    rounds += 1
                    await asyncio.sleep(0.01)
                # one at the beginning of each second, however many are asked and however often
                assert selects() <= 1 + (time() - began) / loaded.REFRESH_SECONDS

    asyncio.run(run())


def test_a_replaced_checkpoint_is_not_missed(sqlite_database: Database) -> None:
    """A repeated update that gives other bytes is another checkpoint; what was known names the old one."""

    async def run() -> None:
        policy_id = made(sqlite_database, CARTPOLE, MlpPolicySpec(hidden=[4]))
        first = head_of(sqlite_database, policy_id)
        with sqlite_database.write() as session:
            other = pgengine.load(checkpoints.content(session, first))
            old = checkpoints.put(session, policy_id, 5, other.copy(updates=5).to_bytes()).id
        async with asking(sqlite_database) as client:
            await ask(client, policy_id, observation=UPRIGHT, checkpoint=first)
            moved = {name: array + np.float32(1) for name, array in other.parameters.items()}
            with sqlite_database.write() as session:
                new = checkpoints.put(session, policy_id, 5, other.copy(moved, 5).to_bytes()).id
            assert new != old
            assert (await ask(client, policy_id, observation=UPRIGHT))["checkpoint_id"] == new

    asyncio.run(run())


def test_many_misses_of_one_policy_load_it_once(sqlite_database: Database) -> None:
    async def run() -> None:
        policy_id = made(sqlite_database, CARTPOLE, MlpPolicySpec())
        async with asking(sqlite_database) as client:
            with counted_statements() as statements:
                answers = await asyncio.gather(*(ask(client, policy_id, observation=UPRIGHT) for _ in range(20)))
            assert len({answer["checkpoint_id"] for answer in answers}) == 1
            assert len([s for s in statements if "policy_bytes" in s]) == 1

    asyncio.run(run())


def test_memory_is_bounded_by_count_and_by_bytes(sqlite_database: Database) -> None:
    async def run(**bounds: int) -> int:
        async with asking(sqlite_database, **bounds) as client:
            for policy_id in ids:
                await ask(client, policy_id, observation=UPRIGHT)
            with counted_statements() as statements:
                for policy_id in reversed(ids):
                    await ask(client, policy_id, observation=UPRIGHT)
            return len([s for s in statements if "policy_bytes" in s])

    ids = [made(sqlite_database, CARTPOLE, MlpPolicySpec(hidden=[64 + width])) for width in range(4)]
    assert asyncio.run(run()) == 0
    assert asyncio.run(run(cache_policies=2)) == 2
    assert asyncio.run(run(cache_bytes=1)) == 3  # the newest one stays however large it is


# --- refusals


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Database, str]]:
    """A database with one policy, for tests that change nothing."""
    database = Database(f"sqlite:///{tmp_path_factory.mktemp('asked') / 'pgengine.db'}")
    with database.connect() as connection:
        NamingBase.metadata.create_all(connection)
        connection.commit()
    yield database, made(database, CARTPOLE, MlpPolicySpec(hidden=[4]))
    database.dispose()


@pytest.mark.parametrize(
    ("body", "pointer", "code"),
    [
        (b"", "", "malformed_json"),
        (b"{", "", "malformed_json"),
        (b"\xff\xfe", "", "malformed_json"),
        (b'{"observation": [1, 2, 3, 4]} x', "", "malformed_json"),
        (b"[]", "", "object_type"),
        (b"null", "", "object_type"),
        (b'{"observation": ' + b"[" * 5000 + b"]" * 5000 + b"}", "", "too_deep"),
        (b'{"observation": [NaN, 0, 0, 0]}', "/observation/0", "not_finite"),
        (b'{"observation": [0, 0, 0, -Infinity]}', "/observation/3", "not_finite"),
        (b'{"observations": [[0, 0, 0, 1e999]]}', "/observations/0/3", "not_finite"),
        ({}, "/observation", "missing"),
        ({"observation": UPRIGHT, "observations": [UPRIGHT]}, "/observations", "conflict"),
        ({"observation": UPRIGHT, "temperature": 1}, "/temperature", "unknown_field"),
        ({"observation": UPRIGHT, "a/b~": 1}, "/a~1b~0", "unknown_field"),
        ({"observations": UPRIGHT[0]}, "/observations", "list_type"),
        ({"observations": None}, "/observations", "list_type"),
        ({"observations": []}, "/observations", "too_short"),
        ({"observations": [UPRIGHT] * 65}, "/observations", "too_long"),
        ({"observation": UPRIGHT, "deterministic": 1}, "/deterministic", "bool_type"),
        ({"observation": UPRIGHT, "deterministic": None}, "/deterministic", "bool_type"),
        ({"observation": UPRIGHT, "seed": -1}, "/seed", "int_type"),
        ({"observation": UPRIGHT, "seed": True}, "/seed", "int_type"),
        ({"observation": UPRIGHT, "seed": "7"}, "/seed", "int_type"),
        ({"observation": UPRIGHT, "seed": 0.5}, "/seed", "int_type"),
        ({"observation": UPRIGHT, "seed": 2**53}, "/seed", "integer_too_large"),
        ({"observation": UPRIGHT, "checkpoint": 3}, "/checkpoint", "malformed_id"),
        (b'{"observation": [0, 0, 0, 0], "checkpoint": "\\ud800"}', "/checkpoint", "invalid_text"),
        (b'{"observation": [0, 0, 0, 0], "\\ud800": 1}', "", "invalid_name"),
        ({"observation": None}, "/observation", "observation_shape"),
        ({"observation": 1.0}, "/observation", "observation_shape"),
        ({"observation": [0.0, 0.0, 0.0]}, "/observation", "observation_shape"),
        ({"observation": [[0.0], 0.0, 0.0, 0.0]}, "/observation/0", "observation_kind"),
        ({"observation": [0.0, True, 0.0, 0.0]}, "/observation/1", "observation_kind"),
        ({"observation": [0.0, 0.0, "1", 0.0]}, "/observation/2", "observation_kind"),
        ({"observation": [0.0, 0.0, 0.0, 1e300]}, "/observation", "observation_not_finite"),
        ({"observation": [0, 0, 0, 10**400]}, "/observation", "observation_not_finite"),
        ({"observation": [2**53 + 1, 1, 2, 3]}, "/observation/0", "integer_too_large"),
        ({"observations": [UPRIGHT, [0, 0, -(2**53), 0]]}, "/observations/1/2", "integer_too_large"),
        (b'{"observation": [0, 0, 0, 0], "observation": [0, 0, 0, 1]}', "", "repeated_name"),
        (b'{"observation": [0, 0, 0, 0], "observ\\u0061tion": [0, 0, 0, 1]}', "", "repeated_name"),
        (b'{"seed": 1, "observation": [0, 0, 0, 0], "seed": 1}', "", "repeated_name"),
        ({"observations": [UPRIGHT, UPRIGHT, [0.0]]}, "/observations/2", "observation_shape"),
        ({"observations": [UPRIGHT, [0, 0, None, 0]]}, "/observations/1/2", "observation_kind"),
    ],
)
def test_bad_bodies_are_problems_that_name_the_field(
    asked: tuple[Database, str], body: Any, pointer: str, code: str
) -> None:
    async def run() -> None:
        async with asking(asked[0]) as client:
            problem = await refused(client, asked[1], body)
            found = problem["errors"][0]
            assert (found["pointer"], found["code"]) == (pointer, code), problem
            assert found["message"]

    asyncio.run(run())


def test_large_numbers_that_every_reader_keeps_are_taken(asked: tuple[Database, str]) -> None:
    async def run() -> None:
        async with asking(asked[0]) as client:
            for large in (2**53 - 1, -(2**53 - 1), float(2**53), 1e17):
                answer = await ask(client, asked[1], observation=[large, 0, 0, 0], checkpoint="latest")
                assert answer["action"] in (0, 1)

    asyncio.run(run())


def test_observations_that_overflow_the_network(sqlite_database: Database) -> None:
    async def run() -> None:
        spec = LinearPolicySpec(initial_parameters={"theta": [[10.0, -10.0]] * 5})
        policy_id = made(sqlite_database, CARTPOLE, spec)
        huge = [3e38, 0.0, 0.0, 0.0]
        async with asking(sqlite_database) as client:
            problem = await refused(client, policy_id, {"observation": huge})
            assert problem["errors"][0]["pointer"] == "/observation"
            problem = await refused(client, policy_id, {"observations": [UPRIGHT, huge]})
            assert problem["errors"][0]["pointer"] == "/observations/1"

    asyncio.run(run())


def test_the_bound_of_a_batch_is_named(sqlite_database: Database) -> None:
    async def run() -> None:
        policy_id = made(sqlite_database, CARTPOLE, MlpPolicySpec(hidden=[4]))
        async with asking(sqlite_database) as client:
            problem = await refused(client, policy_id, {"observations": [UPRIGHT] * 65})
            assert "64" in problem["errors"][0]["message"]
            await refused(client, policy_id, b" " * 200_001, 413)
            response = await client.post(f"/v1/policies/{policy_id}/act", content=b"{}")
            assert response.status_code == 415

    asyncio.run(run())


def test_large_bodies_get_the_same_answers_in_a_thread(sqlite_database: Database) -> None:
    async def run() -> None:
        policy_id = made(sqlite_database, CARTPOLE, MlpPolicySpec())
        rows = np.random.default_rng(0).normal(size=(1000, 4)).tolist()
        async with asking(sqlite_database, max_batch=1000) as client:
            whole = await ask(client, policy_id, observations=rows, seed=1)
            part = await ask(client, policy_id, observations=rows[:3], seed=1)
            assert whole["log_probs"][:3] == part["log_probs"]
            problem = await refused(client, policy_id, {"observations": [*rows[:999], [0.0]]})
            assert problem["errors"][0]["pointer"] == "/observations/999"

    asyncio.run(run())


EXTREME = "5e-324"
"""The smallest number above zero; reading it takes msgspec a hundred times as long as others."""


@pytest.mark.parametrize("rows", [2, 2_000])
@pytest.mark.parametrize(
    ("body", "pointer", "code"),
    [
        ('{"observations": [%s], "temperature": 1}', "/temperature", "unknown_field"),
        ('{"observations": [%s], "observations": [%s]}', "", "repeated_name"),
        ('{"observations": [%s], "seed": 0.5}', "/seed", "int_type"),
        ('{"observations": [%s, [1e999, 0, 0, 0]]}', "/observations/{rows}/0", "not_finite"),
        ('{"observations": [%s, [0, 0, 0]]}', "/observations/{rows}", "observation_shape"),
        ('{"observations": [%s, 17', "", "malformed_json"),
    ],
)
def test_the_smallest_numbers_hide_no_fault(
    asked: tuple[Database, str], body: str, pointer: str, code: str, rows: int
) -> None:
    """Bodies with such numbers are read in another way, which says the same of what is wrong."""
    tiny = ", ".join([f"[{EXTREME}, 1E-0310, 0, -{EXTREME}]"] * rows)

    async def run() -> None:
        async with asking(asked[0], max_batch=10_000) as client:
            problem = await refused(client, asked[1], body.replace("%s", tiny).encode())
            found = problem["errors"][0]
            assert (found["pointer"], found["code"]) == (pointer.format(rows=rows), code), problem

    asyncio.run(run())


@pytest.mark.parametrize("rows", [1, 100, 2_000])
def test_the_smallest_numbers_are_taken_as_they_are(asked: tuple[Database, str], rows: int) -> None:
    async def run() -> None:
        async with asking(asked[0], max_batch=2_000) as client:
            row = [5e-324, 2.5e-310, -5e-324, 1e-300]
            tiny = await ask(client, asked[1], observations=[row] * rows, seed=1)
            assert tiny == await ask(client, asked[1], observations=[[0.0] * 4] * rows, seed=1)
            # a seed that is written with a point is the integer that it is, whichever way the body is read
            whole = {"observations": [row] * rows, "seed": 1.0}
            assert tiny == await ask(client, asked[1], **whole)

    asyncio.run(run())


def test_the_smallest_numbers_are_left_to_a_reader_that_is_quick_with_them(asked: tuple[Database, str]) -> None:
    """Processor time, as a multiple of what Python's reader takes in the same process: 5, and 14 with msgspec alone."""
    row = f"[{', '.join([EXTREME] * 4)}]"
    content = f'{{"observations": [{", ".join([row] * 5_000)}]}}'.encode()

    async def run() -> tuple[float, float]:
        async with asking(asked[0]) as client:
            ours, pythons = [], []
            for _ in range(5):
                began = time.process_time()
                # refused when it has been read, so that nothing else takes time
                problem = await refused(client, asked[1], content)
                ours.append(time.process_time() - began)
                assert problem["errors"][0]["code"] == "too_long"
                began = time.process_time()
                json.loads(content)
                pythons.append(time.process_time() - began)
            return min(ours), min(pythons)

    ours, pythons = asyncio.run(run())
    assert ours < 8 * pythons


def test_reading_a_large_body_looks_for_no_garbage(asked: tuple[Database, str]) -> None:
    """Nothing of a body is garbage while it is read; looking for some after every few hundred lists takes long."""
    collections: list[str] = []

    def count(phase: str, _: dict[str, int]) -> None:
        collections.append(phase)

    async def run() -> None:
        async with asking(asked[0]) as client:
            await ask(client, asked[1], observation=UPRIGHT)
            # refused when it has been read, so that no answer makes lists, too
            body = b'{"observations": [' + b"[0, 0, 0, 0]," * 15_000 + b"[0, 0, 0, 0]]}"
            gc.callbacks.append(count)
            try:
                problem = await refused(client, asked[1], body)
            finally:
                gc.callbacks.remove(count)
            assert problem["errors"][0]["code"] == "too_long"
            assert collections.count("start") <= 5
            assert gc.isenabled()
            for wrong in (b"]", b', "temperature": 1}'):
                await refused(client, asked[1], body[:-1] + wrong)
                assert gc.isenabled()

    asyncio.run(run())


def test_large_requests_are_computed_two_at_a_time(sqlite_database: Database) -> None:
    """However many come at once, there are no more threads for them, and small requests do not wait behind them."""

    async def run() -> None:
        policy_id = made(sqlite_database, CARTPOLE, MlpPolicySpec())
        rows = np.random.default_rng(0).normal(size=(1000, 4)).tolist()
        async with asking(sqlite_database, max_batch=1000) as client:
            await ask(client, policy_id, observation=UPRIGHT)
            large = [asyncio.ensure_future(ask(client, policy_id, observations=rows, seed=1)) for _ in range(8)]
            small = await ask(client, policy_id, observation=UPRIGHT, seed=1)
            answers = await asyncio.gather(*large)
            assert len([thread for thread in threading.enumerate() if thread.name.startswith("act_")]) == LARGE_AT_ONCE
            assert all(answer == answers[0] for answer in answers)
            assert small["action"] in (0, 1)

    asyncio.run(run())


def test_an_answer_of_too_many_numbers_is_refused(sqlite_database: Database) -> None:
    """A batch is bounded by what its answer holds, not by its rows alone."""

    async def run() -> None:
        many = TabularSpec(transitions=[[[1.0]] * 256], rewards=[[0.0] * 256], initial=[1.0], horizon=1)
        policy_id = made(sqlite_database, many, LinearPolicySpec())
        async with asking(sqlite_database, max_batch=20_000) as client:
            problem = await refused(client, policy_id, {"observations": [0] * 15_626})
            assert problem["errors"][0]["pointer"] == "/observations"
            assert "Expected 1 to 15625 observations" in problem["errors"][0]["message"]
            assert "256 numbers" in problem["errors"][0]["message"]
            assert len((await ask(client, policy_id, observations=[0] * 100))["probabilities"]) == 100

    asyncio.run(run())


def test_a_body_in_pieces_is_read_whole(sqlite_database: Database) -> None:
    async def run() -> None:
        policy_id = made(sqlite_database, CARTPOLE, MlpPolicySpec(hidden=[4]))

        async def pieces() -> AsyncIterator[bytes]:
            for piece in (b'{"observation": [0.0, ', b"0.0, 0.0, ", b"0.0]}"):
                yield piece

        async with asking(sqlite_database) as client:
            response = await client.post(
                f"/v1/policies/{policy_id}/act", content=pieces(), headers={"content-type": "application/json"}
            )
            assert response.status_code == 200

    asyncio.run(run())


@pytest.mark.slow
def test_acting_imports_no_torch() -> None:
    code = "import sys, server.policies.act, pgengine.policies; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
