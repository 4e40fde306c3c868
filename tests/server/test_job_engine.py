"""Questions to the engine in programs of their own: how many, how long, and how they end."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop
from starlette.requests import ClientDisconnect, Request

from pgengine.errors import SpecError
from server.errors import InternalError, TooManyRequests, Unavailable
from server.jobs.engine import Engine, EngineFailed, while_connected
from server.jobs.engine_program import ORPHANED
from server.memory import LEAST_BYTES
from server.settings import Settings

pytestmark = pytest.mark.slow  # each question starts a program that loads torch

BANDIT: dict[str, Any] = {
    "kind": "tabular",
    "transitions": [[[1.0], [1.0]]],
    "rewards": [[0.0, 1.0]],
    "initial": [1.0],
    "horizon": 1,
}
SPEC = {"environment": BANDIT}
EXPLAINED = {"update": 1, "first_episode": 0, "episodes": 1, "recorded": [], "runtime": None}


def asked(scenario: Callable[[Engine], Coroutine[Any, Any, None]], **settings: Any) -> None:
    async def run() -> None:
        await scenario(Engine(Settings(threads=1, **settings)))

    # the loop that uvicorn runs the server on
    uvloop.run(run())


def test_an_answer_and_a_refusal() -> None:
    async def scenario(engine: Engine) -> None:
        answer = await engine.ask("check", {"spec": SPEC}, caller="key_1")
        assert [label["kind"] for label in answer["labels"]] == ["exact"]
        with pytest.raises(SpecError) as refused:
            await engine.ask("check", {"spec": SPEC | {"policy": {"kind": "transformer"}}}, caller="key_1")
        assert (refused.value.pointer, refused.value.code) == ("/policy", "exact_needs_no_memory")
        with pytest.raises(InternalError):
            await engine.ask("check", {"spec": {"secret": 1}}, caller="key_1")

    asked(scenario)


def test_no_more_are_answered_at_once_than_allowed() -> None:
    async def scenario(engine: Engine) -> None:
        first = asyncio.create_task(engine.ask("check", {"spec": SPEC}, caller="key_1"))
        await asyncio.sleep(0)  # the first one has begun
        with pytest.raises(TooManyRequests):
            await engine.ask("check", {"spec": SPEC}, caller="key_1")
        await first
        await engine.ask("check", {"spec": SPEC}, caller="key_1")

    asked(scenario, max_explanations=1)


def test_the_last_place_is_for_a_caller_who_has_none() -> None:
    async def scenario(engine: Engine) -> None:
        first = asyncio.create_task(engine.ask("check", {"spec": SPEC}, caller="key_1"))
        await asyncio.sleep(0)
        with pytest.raises(TooManyRequests, match="for other keys"):
            await engine.ask("check", {"spec": SPEC}, caller="key_1")
        second = asyncio.create_task(engine.ask("check", {"spec": SPEC}, caller="key_2"))
        await asyncio.sleep(0)
        with pytest.raises(TooManyRequests):
            await engine.ask("check", {"spec": SPEC}, caller="key_3")
        await asyncio.gather(first, second)
        await engine.ask("check", {"spec": SPEC}, caller="key_1")

    asked(scenario, max_explanations=2)


def test_a_client_that_goes_away_frees_its_place() -> None:
    async def scenario(engine: Engine) -> None:
        messages = asyncio.Queue[dict[str, Any]]()
        await messages.put({"type": "http.request", "body": b""})
        request = Request({"type": "http"}, messages.get)
        question = engine.ask("check", {"spec": SPEC}, caller="key_1")
        first = asyncio.create_task(while_connected(request, question))
        while messages.qsize():
            await asyncio.sleep(0)
        with pytest.raises(TooManyRequests):
            await engine.ask("check", {"spec": SPEC}, caller="key_1")
        assert not first.done()
        await messages.put({"type": "http.disconnect"})
        with pytest.raises(ClientDisconnect):
            await first
        staying = Request({"type": "http"}, messages.get)
        again = await while_connected(staying, engine.ask("check", {"spec": SPEC}, caller="key_1"))
        assert [label["kind"] for label in again["labels"]] == ["exact"]
        with pytest.raises(SpecError):
            await while_connected(
                staying, engine.ask("check", {"spec": SPEC | {"policy": {"kind": "transformer"}}}, caller="key_1")
            )

    asked(scenario, max_explanations=1)


def test_explanations_do_not_shut_out_checks() -> None:
    async def scenario(engine: Engine) -> None:
        explanation = asyncio.create_task(engine.ask("explain", {"spec": SPEC, **EXPLAINED}, caller="key_1"))
        await asyncio.sleep(0)
        with pytest.raises(TooManyRequests):
            await engine.ask("explain", {"spec": SPEC, **EXPLAINED}, caller="key_2")
        await engine.ask("check", {"spec": SPEC}, caller="key_2")
        assert (await explanation)["update"] == 1

    asked(scenario, max_explanations=1)


def test_where_nobody_has_a_key_all_places_are_for_everybody() -> None:
    async def scenario(engine: Engine) -> None:
        questions = [engine.ask("check", {"spec": SPEC}, caller="anybody") for _ in range(2)]
        assert len(await asyncio.gather(*questions)) == 2

    asked(scenario, max_explanations=2, no_auth=True)


def test_a_question_that_takes_too_much_memory_is_no_mistake_of_the_server() -> None:
    long = {"environment": BANDIT | {"horizon": 2000}, "algorithm": {"trajectories": 10_000}}

    async def scenario(engine: Engine) -> None:
        with pytest.raises(EngineFailed, match="not enough memory"):
            await engine.ask("explain", {"spec": long, **EXPLAINED}, caller="key_1")

    asked(scenario, trainer_memory_bytes=LEAST_BYTES, explain_seconds=600)


def test_all_are_ended_when_the_server_stops() -> None:
    async def scenario(engine: Engine) -> None:
        first = asyncio.create_task(engine.ask("check", {"spec": SPEC}, caller="key_1"))
        while not engine._running:
            await asyncio.sleep(0.001)
        (process,) = engine._running
        engine.close()
        with pytest.raises(Unavailable):
            await first
        assert process.returncode is not None
        with pytest.raises(Unavailable):
            await engine.ask("check", {"spec": SPEC}, caller="key_1")

    asked(scenario)


def test_a_program_ends_with_the_process_that_has_asked(tmp_path: Path) -> None:
    (tmp_path / "request.json").write_text(json.dumps({"question": "check", "spec": SPEC}))
    command = [sys.executable, "-m", "server.jobs.engine_program", str(tmp_path), "--threads", "1"]
    command += ["--memory", str(2**32)]
    # its standard input is closed at once, as if that process had been killed
    ended = subprocess.run(command, input=b"", capture_output=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (ORPHANED, b"")
