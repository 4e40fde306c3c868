"""What the README shows is run as it stands there."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

import pgengine
from server.demo import BY_HAND, SERVE

CHECKOUT = Path(__file__).parents[1]
README = (CHECKOUT / "README.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def test_it_begins_with_the_two_commands_and_then_the_server() -> None:
    commands = re.findall(r"^ {4}(make \w+)", README, flags=re.MULTILINE)
    assert commands[:3] == ["make demo", "make test", SERVE]


def test_it_has_the_lines_that_the_demonstration_prints() -> None:
    assert [block.strip() for block in _blocks("sh")] == [SERVE, BY_HAND]


def test_what_it_links_to_is_there() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert links
    assert [link for link in links if not (CHECKOUT / link).exists()] == []


def test_the_lines_for_a_policy_at_home_play_an_episode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = pgengine.GymnasiumSpec(id="CartPole-v1")
    policy = pgengine.create_policy(pgengine.MlpPolicySpec(), spec, pgengine.describe(spec), seed=0)
    (tmp_path / "cartpole.safetensors").write_bytes(policy.to_bytes())
    monkeypatch.chdir(tmp_path)
    lines = re.search(r"^ {4}import gymnasium, pgengine\n(?:(?: {4}.*)?\n)*", README, flags=re.MULTILINE)
    assert lines is not None
    played: dict[str, Any] = {}
    exec(textwrap.dedent(lines[0]), played)
    assert played["terminated"] or played["truncated"]


@pytest.mark.slow
def test_the_lines_in_python_train_a_policy_and_ask_it(tmp_path: Path) -> None:
    (code,) = _blocks("python")
    assert len(code.strip().splitlines()) <= 10
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert (ended.returncode, ended.stderr) == (0, "")
    *updates, evaluated, acted = ended.stdout.splitlines()
    assert [int(line.split()[0]) for line in updates] == list(range(1, len(updates) + 1))
    mean_return = re.search(r"mean_return=([\d.]+)", evaluated)
    assert mean_return is not None
    assert float(mean_return[1]) >= 475
    assert acted in ("0", "1")


@pytest.mark.slow
def test_the_lines_for_two_terminals_run_as_they_stand(tmp_path: Path) -> None:
    """In a directory that looks like an installed checkout, so that data and files stay out of the real one.

    Nothing is replaced in the lines: the port comes from the environment, as it may for anybody.
    """
    if Path(sys.prefix) != CHECKOUT / ".venv" or not (CHECKOUT / ".venv" / "installed").exists():
        pytest.skip("the lines use the environment that `make install` makes, and this is another one: use `make test`")
    for name in (".venv", "Makefile"):
        (tmp_path / name).symlink_to(CHECKOUT / name)
    for name in ("pyproject.toml", "constraints.txt"):  # older than the installation, so that make calls no pip
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    first, second = _blocks("sh")
    bash = shutil.which("bash")
    assert bash is not None
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PGENGINE_", "MAKE"))}
    environment |= {"PGENGINE_PORT": str(_free_port())}
    with _terminal([bash, "-c", first], tmp_path, environment):
        shell = [bash, "-euo", "pipefail", "-c", second]
        ended = subprocess.run(shell, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    # nothing but the line of the log which says that a key was made
    assert [json.loads(line)["action"] for line in ended.stderr.splitlines()] == ["key_created"]
    job = json.loads((tmp_path / "job.json").read_text())
    assert job["status"] == "queued"
    events = [json.loads(line) for line in re.findall(r"^data: (.*)$", ended.stdout, flags=re.MULTILINE)]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert events[-1]["data"]["status"] == "succeeded"
    assert events[-1]["data"]["result"]["evaluation"]["mean_return"] >= 475
    after = ended.stdout[ended.stdout.rindex("data: ") :]
    got, end = json.JSONDecoder().raw_decode(after, after.index('{"object":"training_job"'))
    assert got["id"] == job["id"]
    assert got["result"] == events[-1]["data"]["result"]
    header, *rows = after[end : after.index('{"action"')].strip().splitlines()
    assert header == "update,env_steps,attempt,mean_return,entropy"
    assert [int(row.split(",")[0]) for row in rows] == list(range(1, got["progress"]["updates"] + 1))
    acted, end = json.JSONDecoder().raw_decode(after, after.index('{"action"'))
    assert acted["action"] in (0, 1)
    assert acted["checkpoint_id"] == got["result"]["checkpoint_id"]
    assert json.loads(after[end:])["mean_return"] >= 475
    assert (tmp_path / "data" / "pgengine.db").is_file()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def _terminal(command: list[str], directory: Path, environment: dict[str, str]) -> Iterator[None]:
    """The first terminal: what runs in it until Ctrl-C, from the moment the server says where it is."""
    process = subprocess.Popen(
        command,
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
    )
    assert process.stdout is not None
    lines: list[str] = []
    listening = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if line.startswith("try "):
                listening.set()
        listening.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        listening.wait(60)
        assert process.poll() is None, "".join(lines)
        assert any(line.startswith(f"API    http://127.0.0.1:{environment['PGENGINE_PORT']}") for line in lines), lines
        yield
        tree = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C does: the whole foreground group
        process.wait(30)
        assert psutil.wait_procs(tree, timeout=10)[1] == []
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)
        reader.join()
        process.stdout.close()
