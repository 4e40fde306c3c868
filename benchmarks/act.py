"""How fast is `act`, against a FastAPI endpoint that only echoes?

    python benchmarks/act.py [--rounds 5] [--seconds 5] [--connections 32] [--batch 1] [--require 0.6]

Starts the project's server (one uvicorn process, SQLite, an MLP policy for CartPole-v1, authentication, Host check and
metrics on) and benchmarks/echo.py (one uvicorn process), and loads them in turn from a process of its own: with wrk
where it is installed, otherwise with the generator below. Both sides run on the same event loop and HTTP parser, both
without access log. Machines are noisy: only the ratio of the medians counts. On Linux the processor time that a server
spends on a request is printed, too, which other programs disturb less.
"""

import argparse
import asyncio
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx

HERE = Path(__file__).parent
KEY = "benchmark-key-of-one-run"
OBSERVATION = [0.01, -0.02, 0.03, 0.04]


@dataclass(frozen=True)
class Target:
    """What is loaded: where, with what body, as whom."""

    name: str
    port: int
    path: str
    body: str
    process_id: int = 0

    def request(self) -> bytes:
        """One whole HTTP request."""
        head = (
            f"POST {self.path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nAuthorization: Bearer {KEY}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(self.body)}\r\n\r\n"
        )
        return (head + self.body).encode()


@dataclass(frozen=True)
class Round:
    """One measurement: requests a second, latencies in milliseconds, microseconds of processor time a request."""

    rate: float
    p50: float
    p99: float
    cpu: float = 0.0


# --- servers


def free_port() -> int:
    """A port on which nobody listens now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def running(command: list[str], probe: str, environment: dict[str, str] | None = None) -> Iterator[int]:
    """The id of a server process, from the moment it answers."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, env={**os.environ, **(environment or {})}, stdout=subprocess.DEVNULL, stderr=errors
        )
        try:
            _await_answer(process, probe)
            yield process.pid
        except ServerStopped:
            errors.seek(0)
            raise SystemExit(f"{' '.join(command)} did not start:\n{errors.read()}") from None
        finally:
            process.terminate()
            process.wait(timeout=30)


class ServerStopped(Exception):
    """A server ended before it answered."""


def _await_answer(process: subprocess.Popen[bytes], probe: str) -> None:
    while process.poll() is None:
        try:
            if httpx.get(probe, timeout=1).status_code < 500:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise ServerStopped


@contextmanager
def project(batch: int) -> Iterator[Target]:
    """The project's server with a policy, and the request that asks it."""
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        environment = {
            "PGENGINE_DATA_DIR": directory,
            "PGENGINE_API_KEY": KEY,
            "PGENGINE_HOST": "127.0.0.1",
            "PGENGINE_PORT": str(port),
            "PGENGINE_WORKERS": "0",
        }
        python = [sys.executable, "-m", "server"]
        subprocess.run([*python, "migrate"], env={**os.environ, **environment}, check=True, stdout=subprocess.DEVNULL)
        with running([*python, "api"], f"http://127.0.0.1:{port}/readyz", environment) as process_id:
            made = httpx.post(
                f"http://127.0.0.1:{port}/v1/policies",
                headers={"Authorization": f"Bearer {KEY}"},
                json={"environment": {"kind": "gymnasium", "id": "CartPole-v1"}, "policy": {"kind": "mlp"}, "seed": 0},
                timeout=60,
            )
            made.raise_for_status()
            body = {"observation": OBSERVATION} if batch == 1 else {"observations": [OBSERVATION] * batch}
            yield Target("act", port, f"/v1/policies/{made.json()['id']}/act", json.dumps(body), process_id)


@contextmanager
def echo() -> Iterator[Target]:
    """The endpoint that echoes."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "echo:app", "--app-dir", str(HERE), "--port", str(port)]
    with running(
        [*command, "--no-access-log", "--log-level", "warning"], f"http://127.0.0.1:{port}/openapi.json"
    ) as pid:
        yield Target("echo", port, "/echo", json.dumps({"observation": OBSERVATION}), pid)


# --- load


def load(target: Target, connections: int, seconds: float) -> Round:
    """Asks as fast as the answers come, from another process."""
    if shutil.which("wrk"):
        return load_with_wrk(target, connections, seconds)
    arguments = [str(target.port), target.path, target.body, str(connections), str(seconds)]
    generator = [sys.executable, __file__, "--generate", *arguments]
    return Round(**json.loads(subprocess.run(generator, check=True, capture_output=True, text=True).stdout))


def load_with_wrk(target: Target, connections: int, seconds: float) -> Round:
    """One round of wrk; its script carries body and headers."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(f"wrk.method = 'POST'\nwrk.body = {json.dumps(target.body)}\n")
        script.write("wrk.headers['Content-Type'] = 'application/json'\n")
        script.write(f"wrk.headers['Authorization'] = 'Bearer {KEY}'\n")
        script.flush()
        url = f"http://127.0.0.1:{target.port}{target.path}"
        command = [
            "wrk",
            "-t1",
            f"-c{connections}",
            f"-d{max(1, round(seconds))}s",
            "--latency",
            "-s",
            script.name,
            url,
        ]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    if "Non-2xx" in report or "Socket errors" in report:
        raise SystemExit(f"{target.name} refused requests:\n{report}")
    rate = float(_found(r"Requests/sec:\s+([\d.]+)", report)[0])
    p50, p99 = (_milliseconds(*_found(rf"{share}%\s+([\d.]+)(\w+)", report)) for share in (50, 99))
    return Round(rate, p50, p99)


def _found(pattern: str, report: str) -> tuple[str, ...]:
    match = re.search(pattern, report)
    if match is None:
        raise SystemExit(f"wrk's report was not understood:\n{report}")
    return match.groups()


def _milliseconds(number: str, unit: str) -> float:
    return float(number) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[unit]


class Asker(asyncio.Protocol):
    """One connection that asks again as soon as it is answered."""

    def __init__(self, request: bytes, latencies: list[float]) -> None:
        self._request = request
        self._latencies = latencies
        self._pending = b""
        self._asked_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        self._asked_at = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._pending += data
        head, found, body = self._pending.partition(b"\r\n\r\n")
        if not found:
            return
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        if length is None or not head.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"the request was refused: {head.decode()}")
        if len(body) >= int(length[1]):
            self._latencies.append(time.perf_counter() - self._asked_at)
            self._pending = b""
            self._ask()


async def generate(target: Target, connections: int, seconds: float) -> Round:
    """One round of our own generator, for machines without wrk."""
    latencies: list[float] = []
    loop = asyncio.get_running_loop()
    began = time.perf_counter()
    opened = [
        (await loop.create_connection(lambda: Asker(target.request(), latencies), "127.0.0.1", target.port))[0]
        for _ in range(connections)
    ]
    await asyncio.sleep(seconds)
    elapsed = time.perf_counter() - began
    for transport in opened:
        transport.abort()
    cuts = statistics.quantiles(latencies, n=100)
    return Round(len(latencies) / elapsed, 1000 * cuts[49], 1000 * cuts[98])


# --- the comparison


def processor_seconds(process_id: int) -> float:
    """Processor time of a process so far; nan where there is no /proc."""
    try:
        fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(target: Target, connections: int, seconds: float) -> Round:
    """One round, with the server's processor time."""
    began, before = time.perf_counter(), processor_seconds(target.process_id)
    measured = load(target, connections, seconds)
    requests = measured.rate * min(seconds, time.perf_counter() - began)
    return replace(measured, cpu=1e6 * (processor_seconds(target.process_id) - before) / requests)


def median(results: list[Round], field: str) -> float:
    """Median of one figure over the rounds."""
    return statistics.median(getattr(result, field) for result in results)


def compare(rounds: int, seconds: float, connections: int, batch: int) -> float:
    """Loads both sides in turn and prints what was measured; the ratio of the median rates."""
    measured: dict[str, list[Round]] = {"echo": [], "act": []}
    with echo() as floor, project(batch) as ours:
        for target in (floor, ours):  # what is slow once only: imports, caches, connections
            load(target, connections, 1)
        for number in range(rounds):
            for target in (floor, ours):
                measured[target.name].append(measure(target, connections, seconds))
            print(f"round {number + 1}: " + ", ".join(f"{name} {r[-1].rate:,.0f}/s" for name, r in measured.items()))
    for name, results in measured.items():
        rate, p50, p99, cpu = (median(results, field) for field in ("rate", "p50", "p99", "cpu"))
        figures = f"p50 {p50:.2f} ms   p99 {p99:.2f} ms   {cpu:.0f} us of processor time each"
        print(f"{name:>5}: {rate:>9,.0f} requests/s   {figures}   (medians of {rounds})")
    ours_rate = median(measured["act"], "rate")
    ratio = ours_rate / median(measured["echo"], "rate")
    if batch > 1:
        print(f"{batch} observations a request: {ours_rate * batch:,.0f} actions/s")
    generator = "wrk" if shutil.which("wrk") else "own generator"
    by_processor = median(measured["echo"], "cpu") / median(measured["act"], "cpu")
    load_by = f"{generator}, {connections} connections"
    print(f"ratio act / echo: {ratio:.2f}   by processor time {by_processor:.2f}   ({load_by})")
    return ratio


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1, help="observations a request")
    parser.add_argument("--require", type=float, default=None, help="exit 1 below this ratio")
    parser.add_argument("--generate", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.generate:
        port, path, body, connections, seconds = options.generate
        target = Target("generated", int(port), path, body)
        print(json.dumps(vars(asyncio.run(generate(target, int(connections), float(seconds))))))
        return 0
    ratio = compare(options.rounds, options.seconds, options.connections, options.batch)
    return 1 if options.require is not None and ratio < options.require else 0


if __name__ == "__main__":
    sys.exit(main())
