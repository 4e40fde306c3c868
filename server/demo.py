"""`make demo`: from nothing to an answered action, over HTTP, as any client would go.

Starts a server of its own, posts the shortest training job, watches it learn, asks the trained policy for actions, says
how to do the same by hand, and leaves nothing behind, however it ends. Knows the server's command line and its API.
"""

import json
import os
import re
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, Self

import httpx
from rich.console import Console

from server.terminal import learning_curve, watch
from server.worker.stop import EXIT_WITH_STDIN

__all__ = ["BY_HAND", "SERVE", "run_demo"]

TARGET = 475.0
"""From this mean return on CartPole-v1 counts as solved: the reward threshold of its registration."""

ENVIRONMENT_ID = "CartPole-v1"
BODY: dict[str, Any] = {"environment": {"kind": "gymnasium", "id": ENVIRONMENT_ID}}

SAY_SECONDS = 5.0
"""How often it is said that the server is still starting; that takes as long as it takes on a busy machine."""

STOP_SECONDS = 20.0
"""What a server that has been told to stop may take, its worker and trainer included."""

SERVE = "make serve"

BY_HAND = r"""
URL=http://127.0.0.1:${PGENGINE_PORT:-8000}
KEY=$(.venv/bin/python -m server keys create curl --scope train --scope read --scope act | tail -n 1)
AUTH="authorization: Bearer $KEY"
JSON="content-type: application/json"

# post a training job; the answer names the job and its policy
curl -sS $URL/v1/training-jobs -H "$AUTH" -H "$JSON" -o job.json \
  -d '{"environment": {"kind": "gymnasium", "id": "CartPole-v1"}}'
JOB=$(grep -o 'job_[0-9a-f]*' job.json | head -n 1)
POLICY=$(grep -o 'pol_[0-9a-f]*' job.json | head -n 1)

# watch it learn; the stream ends with the job
curl -sSN $URL/v1/training-jobs/$JOB/events -H "$AUTH" -H "accept: text/event-stream"

# the job with its result, and its learning curve
curl -sS $URL/v1/training-jobs/$JOB -H "$AUTH"
curl -sS "$URL/v1/training-jobs/$JOB/metrics?keys=mean_return,entropy" -H "$AUTH" -H "accept: text/csv"

# ask the policy for an action
curl -sS $URL/v1/policies/$POLICY/act -H "$AUTH" -H "$JSON" -d '{"observation": [0.01, -0.02, 0.03, 0.04]}'

# take the policy home: a file that needs no server
CHECKPOINT=$(curl -sS $URL/v1/policies/$POLICY -H "$AUTH" | grep -o 'ckpt_[0-9a-f]*' | head -n 1)
curl -sS $URL/v1/checkpoints/$CHECKPOINT/content -H "$AUTH" -o cartpole.safetensors
.venv/bin/python -m pgengine evaluate cartpole.safetensors CartPole-v1
""".strip()
"""What the demonstration does, for a second terminal while `SERVE` runs in the first. The README has the same lines."""


class DemoFailed(Exception):
    """Something did not go as it should; the message says what."""


def run_demo(*, updates: int | None = None) -> int:
    """Run the demonstration.

    Args:
        updates: Stop training after so many updates; few do not reach the target.

    Returns:
        Exit status: 0, 1 if the mean return of the fresh episodes is below the target or something failed, 128 and the
        number of the signal if it was interrupted.
    """
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    with _Signals() as signals, ExitStack() as stack:
        try:
            # nothing may be interrupted between its start and the note that it must be ended
            with signals.later():
                directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="pgengine-demo-"))
                server = _Server(directory)
                stack.callback(server.stop)
            status = _tell(console, server, directory, updates)
        except KeyboardInterrupt:
            status = 128 + (signals.caught or signal.SIGINT)
        except (DemoFailed, httpx.HTTPError) as error:
            status = 1
            console.print(f"\nerror: {error}")
            if log := server.log():
                console.print(f"the last lines of the server:\n{log}")
        signals.ignore()
    # only now: the server and its data are gone
    if status > 128:
        console.print("\ninterrupted; the server has been stopped and its data removed")
    return status


def _tell(console: Console, server: "_Server", directory: str, updates: int | None) -> int:
    """The whole story."""
    began = time.monotonic()
    console.print(f"1. Starting a server with a key of its own and its data in {directory}.")
    while (url := server.url(SAY_SECONDS)) is None:
        console.print(f"   {_starting(time.monotonic() - began, server.log())}")
    console.print(f"   It listens at {url}.")
    # no answer has a time limit: a server that ends closes its connections, and one that is slow is waited for
    with httpx.Client(
        base_url=url, headers={"authorization": f"Bearer {server.key}"}, timeout=None, trust_env=False
    ) as client:
        body = BODY if updates is None else BODY | {"stop": {"updates": updates}}
        job = _posted(client, "/v1/training-jobs", body)
        console.print(f"2. POST /v1/training-jobs {json.dumps(body)}")
        console.print(f"   -> {job['id']}\n   {_said(job['label'])}")
        console.print(f"3. GET /v1/training-jobs/{job['id']}/events")
        points = watch(console, job, _events(client, job["id"]))
        job = _got(client, f"/v1/training-jobs/{job['id']}")
        result = _result(job)
        for line in learning_curve(points, encoding=console.encoding):
            console.print(f"   {line}")
        evaluation = result["evaluation"]
        mean, (low, high) = evaluation["mean_return"], evaluation["confidence_interval"]
        between = f"{low:.1f} to {high:.1f}, method {evaluation['method']}" if low is not None else "not known"
        console.print(
            f"4. Mean return of {evaluation['episodes']} fresh episodes: {mean:.1f} "
            f"(95% confidence interval {between})."
        )
        for finding in result["findings"]:
            console.print(f"   {finding['code']}: {finding['message']}. What to try: {finding['suggestion']}.")
        progress = job["progress"]
        if result["target_reached"]:
            proof = "proven" if result["target_proven"] else "approximate"
            console.print(
                f"   The target was reached before, on other episodes ({proof}, method {result['target_method']})."
            )
        if (exact := evaluation["exact_mean_return"]) is not None:
            console.print(f"   The exact mean return is {exact:.1f}.")
        console.print(
            f"   Stopped by {result['stopped_by']} after {progress['updates']:,} updates, {progress['episodes']:,} "
            f"episodes and {progress['env_steps']:,} env_steps."
        )
        console.print(f"5. POST /v1/policies/{job['policy_id']}/act, once for each step of an episode")
        returned, seconds = _play(client, job["policy_id"])
        console.print(
            f"   The episode returned {returned:.0f}. {len(seconds):,} actions, "
            f"{1000 * statistics.median(seconds):.1f} ms each (median, one request an action)."
        )
    _close(console, time.monotonic() - began)
    if mean < TARGET:
        console.print(f"\nmissed: the mean return {mean:.1f} is below {TARGET:.0f}")
        return 1
    return 0


def _starting(seconds: float, log: str) -> str:
    """What is said of a server that does not listen yet."""
    said = f"its last line: {log.splitlines()[-1]}" if log else "it is loading its libraries"
    return f"It is still starting after {seconds:.0f} s; {said}. Ctrl-C ends this."


def _close(console: Console, seconds: float) -> None:
    console.print(
        f"\nIn {seconds:.0f} s a server was started, a policy was trained over HTTP, and it was asked for actions.\n"
        "The server stops now and its data is removed. The same by hand, in one terminal:\n"
    )
    console.out(SERVE)
    console.print("\nand in another:\n")
    console.out(BY_HAND)


def _said(label: Mapping[str, Any]) -> str:
    """A label in one line."""
    return f"gradient estimate {label['kind'].replace('_', ' ')} for the {label['objective']['text']}"


def _result(job: Mapping[str, Any]) -> dict[str, Any]:
    if job["status"] != "succeeded":
        why = f": {job['failure']['message']}" if job["failure"] else ""
        raise DemoFailed(f"the job has {job['status']}{why}" if job["is_terminal"] else "the event stream broke off")
    return dict(job["result"])


# --- the server -------------------------------------------------------------------------------------------------------


class _Server:
    """`python -m server serve` on a free port, with a worker, a key and a directory of its own.

    It is a process group of its own, so that Ctrl-C reaches the demonstration alone, and holds a pipe of ours as its
    standard input, so that it ends with the demonstration even where that is killed.

    Attributes:
        key: An admin key.
    """

    def __init__(self, directory: str) -> None:
        self.key = secrets.token_urlsafe(24)
        settings = {"DATA_DIR": directory, "HOST": "127.0.0.1", "PORT": "0", "API_KEY": self.key, "WORKERS": "1"}
        # settings that a person has for a server of theirs are not for this one
        others = {name: value for name, value in os.environ.items() if not name.startswith("PGENGINE_")}
        ours = {f"PGENGINE_{name}": value for name, value in settings.items()} | {EXIT_WITH_STDIN: "1"}
        ours["TMPDIR"] = directory  # torch makes caches there, which nobody would remove
        self._lines: deque[str] = deque(maxlen=20)
        self._url: Future[str] = Future()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "server", "serve"],
            env=others | ours,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            process_group=0,
        )
        self._reader = threading.Thread(target=self._read, name="server", daemon=True)
        self._reader.start()

    def url(self, seconds: float) -> str | None:
        """Where it listens, as soon as it does; None if it is still starting after so many seconds.

        Raises:
            DemoFailed: if it ended instead.
        """
        try:
            return self._url.result(seconds)
        except TimeoutError:
            return None

    def log(self) -> str:
        """The last lines that it has written."""
        return "\n".join(self._lines)

    def stop(self) -> None:
        """End it with all that it has started; returns when it is gone."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(line.rstrip("\n"))
            if not self._url.done() and (found := re.match(r"API +(\S+)", line)):
                self._url.set_result(found[1])
        if not self._url.done():
            self._url.set_exception(DemoFailed("the server ended before it listened"))


class _Signals:
    """Ctrl-C, SIGTERM and a closed terminal raise one KeyboardInterrupt, and never where it could not be obeyed.

    Attributes:
        caught: Number of the first signal, or None.
    """

    def __init__(self) -> None:
        self.caught: int | None = None
        self._armed = True
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @contextmanager
    def later(self) -> Iterator[None]:
        """A signal that comes in this block takes effect at its end."""
        self._armed = False
        yield
        if self.caught is not None:
            raise KeyboardInterrupt
        self._armed = True

    def ignore(self) -> None:
        """From here on signals have no effect: all ends by itself."""
        self._armed = False

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.caught = self.caught or number
        if self._armed:
            self._armed = False  # a second one must not interrupt the ending, which is bounded
            raise KeyboardInterrupt


# --- requests ---------------------------------------------------------------------------------------------------------


def _got(client: httpx.Client, path: str) -> dict[str, Any]:
    return _read(client.get(path))


def _posted(client: httpx.Client, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    return _read(client.post(path, json=body))


def _read(answer: httpx.Response) -> dict[str, Any]:
    if answer.is_error:
        request = answer.request
        raise DemoFailed(f"{request.method} {request.url.path} was answered with {answer.status_code}: {answer.text}")
    return dict(answer.json())


def _events(client: httpx.Client, job_id: str) -> Iterator[dict[str, Any]]:
    """The events of a job as Server-Sent Events bring them, until the stream ends."""
    with client.stream("GET", f"/v1/training-jobs/{job_id}/events", headers={"accept": "text/event-stream"}) as answer:
        if answer.is_error:
            answer.read()
            _read(answer)
        for line in answer.iter_lines():
            if line.startswith("data:"):
                yield json.loads(line.removeprefix("data:"))


def _play(client: httpx.Client, policy_id: str) -> tuple[float, list[float]]:
    """Play one episode here with actions from there; its return, and the seconds that each action took."""
    import gymnasium

    environment = gymnasium.make(ENVIRONMENT_ID)
    try:
        observation, _ = environment.reset()
        returned, ended, seconds = 0.0, False, []
        while not ended:
            began = time.perf_counter()
            answer = _posted(client, f"/v1/policies/{policy_id}/act", {"observation": observation.tolist()})
            seconds.append(time.perf_counter() - began)
            observation, reward, terminated, truncated, _ = environment.step(answer["action"])
            returned += float(reward)
            ended = terminated or truncated
    finally:
        environment.close()
    return returned, seconds


# --- progress ---------------------------------------------------------------------------------------------------------
