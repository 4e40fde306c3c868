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

from pgengine.errors import SpecError
from server.errors import InternalError, TooManyRequests, Unavailable
from server.jobs.engine import Engine
from server.jobs.engine_program import ORPHANED
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


def asked(scenario: Callable[[Engine], Coroutine[Any, Any, None]], **settings: Any) -> None:
    async def run() -> None:
        await scenario(Engine(Settings(threads=1, **settings)))

    # the loop that uvicorn runs the server on
    uvloop.run(run())


def test_an_answer_and_a_refusal() -> None:
    async def scenario(engine: Engine) -> None:
        answer = await engine.ask("check", {"spec": SPEC})
        assert [label["kind"] for label in answer["labels"]] == ["exact"]
        with pytest.raises(SpecError) as refused:
            await engine.ask("check", {"spec": SPEC | {"policy": {"kind": "transformer"}}})
        assert (refused.value.pointer, refused.value.code) == ("/policy", "exact_needs_no_memory")
        with pytest.raises(InternalError):
            await engine.ask("check", {"spec": {"secret": 1}})

    asked(scenario)


def test_no_more_are_answered_at_once_than_allowed() -> None:
    async def scenario(engine: Engine) -> None:
        first = asyncio.create_task(engine.ask("check", {"spec": SPEC}))
        await asyncio.sleep(0)  # the first one has begun
        with pytest.raises(TooManyRequests):
            await engine.ask("check", {"spec": SPEC})
        await first
        await engine.ask("check", {"spec": SPEC})

    asked(scenario, max_explanations=1)


def test_all_are_ended_when_the_server_stops() -> None:
    async def scenario(engine: Engine) -> None:
        first = asyncio.create_task(engine.ask("check", {"spec": SPEC}))
        while not engine._running:
            await asyncio.sleep(0.001)
        (process,) = engine._running
        engine.close()
        with pytest.raises(Unavailable):
            await first
        assert process.returncode is not None
        with pytest.raises(Unavailable):
            await engine.ask("check", {"spec": SPEC})

    asked(scenario)


def test_a_program_ends_with_the_process_that_has_asked(tmp_path: Path) -> None:
    (tmp_path / "request.json").write_text(json.dumps({"question": "check", "spec": SPEC}))
    command = [sys.executable, "-m", "server.jobs.engine_program", str(tmp_path), "--threads", "1"]
    # its standard input is closed at once, as if that process had been killed
    ended = subprocess.run(command, input=b"", capture_output=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (ORPHANED, b"")
