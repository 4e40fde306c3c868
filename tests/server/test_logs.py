"""What the programs log: one structure, no secret, a line for each request and for each act that cannot be undone."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

CARTPOLE = {"kind": "gymnasium", "id": "CartPole-v1"}


def logged(program: str) -> list[dict[str, Any]]:
    """The lines that a program of its own writes, read as JSON."""
    source = f"import logging, sys, warnings\nfrom server.logs import *\n{program}"
    done = subprocess.run([sys.executable, "-c", source], check=True, capture_output=True, text=True)
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_every_line_is_an_object_of_one_structure() -> None:
    lines = logged(
        """
configure("info")
log("job_started", job_id="job_1", attempt=2)
audit("key_revoked", key_id="key_1")
logging.getLogger("server.jobs").info("two\\nlines of %s", "text")
logging.getLogger("uvicorn.error").error("the loop is full")
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("server.app").exception("a mistake")
warnings.warn("old")
"""
    )
    assert [(line["level"], line["event"]) for line in lines] == [
        ("info", "job_started"),
        ("warning", "audit"),
        ("info", "logged"),
        ("error", "logged"),
        ("error", "logged"),
        ("warning", "logged"),
    ]
    for line in lines:
        assert list(line)[:4] == ["at", "level", "event", "pid"]
        assert line["at"].endswith("+00:00")
    assert (lines[0]["job_id"], lines[0]["attempt"]) == ("job_1", 2)
    assert lines[1]["action"] == "key_revoked"
    assert (lines[2]["logger"], lines[2]["message"]) == ("server.jobs", "two\nlines of text")
    assert lines[4]["traceback"].startswith("Traceback")
    assert lines[4]["traceback"].endswith("ZeroDivisionError: division by zero")


@pytest.mark.parametrize(
    ("level", "events"),
    [
        ("debug", ["ours", "ours", "logged", "logged"]),
        ("info", ["ours", "logged"]),
        ("warning", ["logged"]),
        ("error", []),
    ],
)
def test_the_level_decides_and_other_libraries_count_from_warnings_on(level: str, events: list[str]) -> None:
    lines = logged(
        f"""
configure("{level}")
log("ours", "debug")
log("ours", "info")
logging.getLogger("other").info("not ours")
logging.getLogger("other").warning("not ours")
"""
    )
    assert [line["event"] for line in lines] == events


def test_secrets_are_cut_out() -> None:
    lines = logged(
        """
configure("info")
log("failed", error="cannot reach postgresql+psycopg://learner:s3cr:et@x/@db.example/pg")
logging.getLogger("server").warning("key pgk_Abc-123_x was sent")
access = AccessLog()
access.write(Answered(0.0, "id", "key_1", "127.0.0.1", "GET", "/v1/policies/pgk_Abc-123_x", "unmatched", 404, 0.001))
access.close()
"""
    )
    text = json.dumps(lines)
    assert len(lines) == 3
    assert "s3cr" not in text
    assert "et@x" not in text
    assert "Abc-123" not in text
    assert "db.example/pg" in text


def test_people_get_text_of_one_line_whatever_is_logged() -> None:
    source = r"""
from server.logs import *
configure("info")
log("failed", message="two\nlines\x1b[2J")
"""
    reader, writer = pty.openpty()
    subprocess.run([sys.executable, "-c", source], check=True, stderr=writer)
    os.close(writer)
    text = os.read(reader, 4096).decode()
    os.close(reader)
    assert text.count("\n") == 1
    assert "Z info    failed message=" in text
    assert "\x1b" not in text


def test_an_access_log_that_nobody_reads_holds_nobody_up() -> None:
    source = """
import os, sys, threading
from server.logs import *
reader, writer = os.pipe()
os.dup2(writer, 2)
configure("info")
access = AccessLog()
for number in range(50_000):
    access.write(Answered(0.0, str(number), None, None, "GET", "/" + "x" * 200, "unmatched", 404, 0.001))
print("all were noted")
sys.stdout.flush()
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", source], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout == "all were noted\n"


def test_an_access_log_goes_on_when_the_disk_has_room_again(tmp_path: Path) -> None:
    source = """
import os, resource, signal, sys, threading, time
from server.logs import *
refused = threading.Event()
signal.signal(signal.SIGXFSZ, lambda *_: refused.set())  # what the kernel says of a write beyond the limit
file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(file, 2)
configure("info")
access = AccessLog()

def write(path):
    access.write(Answered(0.0, "1", None, None, "GET", path, "unmatched", 404, 0.001))

def wait_until(holds):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)

write("/before")
wait_until(lambda: os.fstat(2).st_size)
resource.setrlimit(resource.RLIMIT_FSIZE, (os.fstat(2).st_size, resource.RLIM_INFINITY))
write("/lost")
wait_until(refused.is_set)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
write("/after")
access.close()
"""
    file = tmp_path / "log"
    done = subprocess.run([sys.executable, "-c", source, str(file)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, file.read_text()
    assert [json.loads(line)["path"] for line in file.read_text().splitlines() if '"path"' in line][-1] == "/after"


@pytest.mark.slow
def test_requests_and_what_cannot_be_undone_are_written_down(start: Any) -> None:
    secret = "a-secret-of-the-operator"
    server = start("serve", PGENGINE_PORT="0", PGENGINE_API_KEY=secret, PGENGINE_WORKERS="0")
    url = server.wait_for(r"^API +(\S+)")[1]
    headers = {"authorization": f"Bearer {secret}"}
    with httpx.Client(base_url=url, headers=headers) as client:
        client.get("/readyz")
        made = client.post("/v1/environments", json=CARTPOLE, headers={"x-request-id": "first"})
        path = f"/v1/environments/{made.json()['id']}"
        client.get(f"{path}?limit=geheim", headers={"x-request-id": "second"})
        client.delete(path, headers={"x-request-id": "third"})
        client.get("/v1/policies", headers={"authorization": "Bearer wrong", "x-request-id": "fourth"})
    server.wait_for('"request_id":"fourth"')
    assert server.end() == 0
    text = "\n".join(server.lines)
    lines = [json.loads(line) for line in server.lines if line.startswith("{")]
    requests = {line["request_id"]: line for line in lines if line["event"] == "request"}
    assert list(requests) == ["first", "second", "third", "fourth"]
    first, second, third, fourth = requests.values()
    assert first["key_id"].startswith("key_")
    assert (first["address"], first["method"], first["status"]) == ("127.0.0.1", "POST", 201)
    assert (second["path"], second["route"]) == (path, "/v1/environments/{environment_id}")
    assert 0 < second["seconds"] < 60
    assert (fourth["key_id"], fourth["status"]) == (None, 401)
    (destroyed,) = [line for line in lines if line["event"] == "audit" and line.get("request_id")]
    assert destroyed["action"] == "DELETE /v1/environments/{environment_id}"
    assert (destroyed["path"], destroyed["key_id"]) == (path, third["key_id"])
    assert secret not in text
    assert "geheim" not in text
    assert "readyz" not in text
