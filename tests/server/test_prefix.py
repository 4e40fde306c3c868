"""The server behind a real proxy, on real sockets: whoever knows the address below the prefix finds everything."""

import re
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).parents[2]
KEY = "a-secret-of-the-operator"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["told", "kept"])
def test_all_that_is_served_below_a_prefix_is_found_there(start: Any, mode: str) -> None:
    root_path = {"PGENGINE_ROOT_PATH": "/lab/rl"} if mode == "kept" else {}
    server = start("serve", PGENGINE_PORT="0", PGENGINE_API_KEY=KEY, **root_path)
    upstream = server.wait_for(r"^API +http://(\S+)")[1]
    proxy = start(command=[sys.executable, str(ROOT / "tests/server/prefix_proxy.py"), upstream, mode])
    outside = f"http://127.0.0.1:{proxy.wait_for(r'^port ([0-9]+)')[1]}"
    origin = {"authorization": f"Bearer {KEY}", "origin": outside}
    with httpx.Client(base_url=outside, headers=origin, timeout=60.0, follow_redirects=True) as client:
        page = client.get("/lab/rl/")
        assert page.url.path == "/lab/rl/docs"
        links = re.findall(r"""["'](/[^"']+\.(?:css|js|png|json))["']""", page.text)
        assert len(links) == 4
        for link in links:
            assert client.get(link).status_code == 200
        base = client.get(next(link for link in links if link.endswith(".json"))).json()["servers"][0]["url"]
        body = {"environment": {"kind": "gymnasium", "id": "CartPole-v1"}, "stop": {"updates": 1}}
        # the page of this server itself sends its origin, and Host is what its user typed
        made = client.post(f"{base}/v1/training-jobs", json=body)
        assert made.status_code == 201, made.text
        job = made.headers["location"]
        assert client.get(job).json()["id"] == made.json()["id"]
        with client.stream("GET", f"{job}/events", headers={"accept": "text/event-stream"}) as stream:
            events = "".join(stream.iter_text())
        assert '"status":"succeeded"' in events
        acted = client.post(f"{base}/v1/policies/{made.json()['policy_id']}/act", json={"observation": [0.0] * 4})
        assert acted.status_code == 200
        assert client.delete(job, headers={"x-request-id": "last"}).status_code == 204
    assert '"address":"203.0.113.9"' in server.wait_for('"event":"request".*"request_id":"last".*').string
    assert server.end() == 0
