"""The demonstration as a process, from its first line to its last, and interrupted on the way."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from server.demo import BY_HAND, SERVE
from server.terminal import learning_curve

slow = pytest.mark.slow


class Demo:
    """`python -m server demo`, whose lines can be waited for."""

    def __init__(self, directory: Path, *arguments: str, **environment: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PGENGINE_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "server", "demo", *arguments],
            cwd=directory,
            env=kept | {"TMPDIR": str(directory), "PYTHONUNBUFFERED": "1"} | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            process_group=0,
        )
        self.text = ""
        self._more = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_for(self, found: Callable[[str], object], seconds: float = 600.0) -> None:
        """Until what was printed is as wished."""
        with self._more:
            self._more.wait_for(lambda: found(self.text) or not self._reader.is_alive(), seconds)
            assert found(self.text), self.text

    def end(self, seconds: float = 600.0) -> int:
        """The status, once it has ended by itself."""
        status = self.process.wait(seconds)
        self._reader.join(seconds)
        return status

    def tree(self) -> list[psutil.Process]:
        """All that it has started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def close(self) -> None:
        if self.process.poll() is None:
            for process in [*self.tree(), psutil.Process(self.process.pid)]:
                process.kill()
            self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._more:
                self.text += line
                self._more.notify_all()
        with self._more:
            self._more.notify_all()


@contextmanager
def _demo(directory: Path, *arguments: str, **environment: str) -> Iterator[Demo]:
    demo = Demo(directory, *arguments, **environment)
    try:
        yield demo
    finally:
        demo.close()


def _port(text: str) -> int:
    found = re.search(r"listens at http://127\.0\.0\.1:(\d+)\.", text)
    assert found is not None, text
    return int(found[1])


def _nobody_listens(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) != 0


@slow
def test_it_trains_a_policy_and_plays_an_episode_with_it(tmp_path: Path) -> None:
    # settings of a person's own server are not for this one
    others = {"PGENGINE_NO_AUTH": "1", "PGENGINE_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/x"}
    with _demo(tmp_path, **others) as demo:
        assert demo.end() == 0, demo.text
    text = demo.text
    assert re.search(r"training, update \d+, mean return [\d.]+, [\d,]+ env_steps/s, \d+:\d\d left", text), text
    mean = re.search(r"Mean return of 100 fresh episodes: ([\d.]+) \(95% confidence interval ([\d.]+) to ", text)
    assert mean is not None, text
    assert float(mean[1]) >= 475
    assert "gradient estimate exact for the expected undiscounted return over at most 500 steps" in text
    played = re.search(r"The episode returned (\d+)\. (\d+) actions", text)
    assert played is not None, text
    assert played[1] == played[2]  # a reward of 1 for each action
    assert f"\n{SERVE}\n" in text
    assert text.endswith(f"{BY_HAND}\n")
    assert "\x1b" not in text  # a pipe is no terminal
    assert _nobody_listens(_port(text))
    assert list(tmp_path.iterdir()) == []


@slow
def test_a_missed_target_is_a_failure(tmp_path: Path) -> None:
    with _demo(tmp_path, "--updates", "1") as demo:
        assert demo.end() == 1, demo.text
    assert re.search(r"missed: the mean return [\d.]+ is below 475", demo.text), demo.text
    assert "The episode returned" in demo.text


@slow
def test_a_server_that_starts_slowly_is_waited_for_and_spoken_of(tmp_path: Path) -> None:
    with _demo(tmp_path) as demo:
        demo.wait_for(MOMENTS["while the server starts"])
        (server,) = demo.tree()
        server.suspend()  # as on a machine that is busy with other things
        demo.wait_for(lambda text: text.count("It is still starting after") >= 2)
        assert "listens at" not in demo.text
        server.resume()
        demo.wait_for(lambda text: "listens at" in text)
        demo.process.send_signal(signal.SIGINT)
        assert demo.end() == 128 + signal.SIGINT, demo.text


@slow
def test_a_server_that_ends_before_it_listens_is_not_waited_for(tmp_path: Path) -> None:
    with _demo(tmp_path) as demo:
        demo.wait_for(MOMENTS["while the server starts"])
        (server,) = demo.tree()
        server.kill()
        assert demo.end() == 1, demo.text
    assert "the server ended before it listened" in demo.text
    assert list(tmp_path.iterdir()) == []


MOMENTS: Mapping[str, Callable[[str], object]] = {
    "while the server starts": lambda text: "Starting a server" in text,
    "while the worker starts": lambda text: "waiting for the worker" in text,
    "while it trains": lambda text: "training, update" in text,
    "while it evaluates": lambda text: "evaluating" in text,
    "while it plays": lambda text: "/act" in text,
}


@slow
@pytest.mark.parametrize(
    ("moment", "number"), [*((moment, signal.SIGINT) for moment in MOMENTS), ("while it trains", signal.SIGTERM)]
)
def test_an_interruption_leaves_nothing_behind(tmp_path: Path, moment: str, number: int) -> None:
    with _demo(tmp_path) as demo:
        demo.wait_for(MOMENTS[moment])
        tree = demo.tree()
        os.killpg(demo.process.pid, number)  # a terminal sends Ctrl-C to the whole group in the foreground
        assert demo.end(30) == 128 + number, demo.text
    assert tree
    assert psutil.wait_procs(tree, timeout=5)[1] == []
    assert "interrupted; the server has been stopped and its data removed" in demo.text
    assert "Traceback" not in demo.text
    assert list(tmp_path.iterdir()) == []
    if "listens at" in demo.text:
        assert _nobody_listens(_port(demo.text))


@slow
def test_a_second_interruption_does_not_disturb_the_ending(tmp_path: Path) -> None:
    with _demo(tmp_path) as demo:
        demo.wait_for(MOMENTS["while it trains"])
        tree = demo.tree()
        demo.process.send_signal(signal.SIGINT)
        demo.process.send_signal(signal.SIGTERM)
        assert demo.end(30) > 128, demo.text
    assert psutil.wait_procs(tree, timeout=5)[1] == []
    assert "Traceback" not in demo.text
    assert list(tmp_path.iterdir()) == []


@slow
def test_the_server_ends_even_with_a_demonstration_that_is_killed(tmp_path: Path) -> None:
    with _demo(tmp_path) as demo:
        demo.wait_for(MOMENTS["while it trains"])
        tree = demo.tree()
        assert len(tree) >= 3  # the server, a worker, a trainer
        demo.process.kill()
        demo.process.wait()
        assert psutil.wait_procs(tree, timeout=15)[1] == []


# --- the learning curve


def test_a_curve_rises_where_the_returns_do() -> None:
    assert learning_curve([(0, 0.0), (100, 500.0)], width=20, height=4) == [
        "mean return",
        "    500 │               ▂▃▅▆█",
        "        │          ▂▃▅▆██████",
        "    250 │     ▂▃▅▆███████████",
        "        │▂▃▅▆████████████████",
        "      0 └────────────────────",
        "         0      100 env_steps",
    ]


def test_a_curve_for_terminals_without_unicode() -> None:
    lines = learning_curve([(1, 1.0), (2, 2.0)], width=4, height=2, encoding="ascii")
    assert "".join(lines).isascii()
    assert lines[1:4] == ["      2 |  ##", "      1 |####", "      0 +----"]


@pytest.mark.parametrize("points", [[(16, 22.0)], [(16, 0.0), (32, 0.0)], [(5, -3.0), (6, -2.0)]])
def test_a_curve_of_little(points: list[tuple[float, float]]) -> None:
    assert len(learning_curve(points)) == 13


def test_no_curve_of_nothing() -> None:
    assert learning_curve([]) == []
