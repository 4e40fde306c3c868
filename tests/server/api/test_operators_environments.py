"""Environments that the operator adds: allowed, made, listed, and told of what is wrong with them."""

import logging
import threading
from collections.abc import Callable
from typing import Any

import gymnasium
import pytest
from sqlalchemy import select

from pgengine.errors import SpecError
from pgengine.spec import GymnasiumSpec
from server.database import Database
from server.environments.types import AllowList
from server.settings import Settings
from server.tables import Environment
from tests.engine import foreign_environments
from tests.engine.foreign_environments import Drawing

LUNAR = {"kind": "gymnasium", "id": "LunarLander-v3"}
INSTALL = "Box2D is not installed, you can install it by run `pip install swig` followed by `pip install"
MODULE = foreign_environments.__name__


def foreign(name: str, **arguments: Any) -> dict[str, Any]:
    return {"kind": "gymnasium", "id": f"foreign/{name}-v0", "arguments": arguments}


def types(api: Any) -> dict[str, Any]:
    return {one["id"]: one for one in api.get("/v1/environment-types").json()["data"]}


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.name == "server.environments.types"]


@pytest.fixture
def api_with(sqlite_database: Database, serve: Callable[..., Any]) -> Callable[..., Any]:
    """Opens the application with the operator's ids and modules."""

    def opened(*ids: str, modules: tuple[str, ...] = ()) -> Any:
        return serve(Settings(environments=list(ids), environment_modules=list(modules)), sqlite_database)

    return opened


def test_an_environment_whose_package_is_missing_stops_nobody(
    api_with: Callable[..., Any], problem: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with api_with("LunarLander-v3") as api:
        assert [
            text for text in warnings(caplog) if text.startswith("LunarLander-v3 cannot be used") and INSTALL in text
        ]
        listed = types(api)
        assert (listed["LunarLander-v3"]["available"], listed["CartPole-v1"]["available"]) == (False, True)
        assert INSTALL in listed["LunarLander-v3"]["hint"]
        for body in (LUNAR, LUNAR | {"arguments": {"gravity": -5.0}}):
            pointer = "/arguments" if "arguments" in body else "/id"
            told = problem(
                api.post("/v1/environments", body), 422, "invalid_request", (pointer, "environment_not_made")
            )
            assert INSTALL in told["errors"][0]["message"]


def test_what_a_module_registers_is_allowed_by_that(api_with: Callable[..., Any], problem: Callable[..., Any]) -> None:
    with api_with() as api:
        problem(
            api.post("/v1/environments", foreign("Open")), 422, "invalid_request", ("/id", "environment_not_allowed")
        )
    with api_with(modules=(MODULE,)) as api:
        api.created("/v1/environments", foreign("Open", size=3, names=["a", {"b": None}]))
        listed = types(api)
        assert listed["foreign/Open-v0"]["arguments"]["additionalProperties"] is True
        assert listed["foreign/Composite-v0"]["hint"].startswith("the observation space is Dict")
        assert "foreign/Game-v0" in listed


def test_a_pattern_allows_every_id_that_fits_it(
    api_with: Callable[..., Any], problem: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with api_with("foreign/Fr*", "nothing/*") as api:
        assert {name for name in types(api) if name and name.startswith("foreign/")} == {
            "foreign/FromRandom-v0", "foreign/FromNumpy-v0", "foreign/FromConstructor-v0",
            "foreign/FromEarlierEpisodes-v0",
        }  # fmt: skip
        problem(
            api.post("/v1/environments", foreign("Open")), 422, "invalid_request", ("/id", "environment_not_allowed")
        )
    assert "nothing/* in PGENGINE_ENVIRONMENTS fits no registered environment" in warnings(caplog)


def test_why_a_constructor_failed_is_told_to_the_client_and_to_the_operator(
    api_with: Callable[..., Any], problem: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with api_with("foreign/Refusing-v0") as api:
        caplog.clear()
        response = api.post("/v1/environments", foreign("Refusing"))
        told = problem(response, 422, "invalid_request", ("/id", "environment_not_made"))
        assert "the licence has expired" in told["errors"][0]["message"]
        assert types(api)["foreign/Refusing-v0"]["available"] is False
    logged = [one for one in caplog.records if "the licence has expired" in one.getMessage()]
    assert logged[0].levelno == logging.WARNING
    assert logged[0].exc_info is not None


def test_arguments_are_published_and_checked(api_with: Callable[..., Any], problem: Callable[..., Any]) -> None:
    with api_with("foreign/Game-v0") as api:
        published = types(api)["foreign/Game-v0"]["arguments"]
        assert published["additionalProperties"] is False
        assert published["properties"]["obs_type"]["enum"] == ["rgb", "grayscale", "ram"]
        assert not {"rom_path", "render_mode", "hook"} & set(published["properties"])
        api.created("/v1/environments", foreign("Game", obs_type="ram", frameskip=[2, 5], rewards={"win": 1}))
        for name, value, code in (
            ("obs_type", "jpeg", "argument_value"),
            ("frameskip", [1, 2, 3], "argument_value"),
            ("sizes", {"a": 1}, "argument_type"),
            ("rom_path", "/etc/passwd", "unknown_argument"),
            ("render_mode", "human", "unknown_argument"),
        ):
            response = api.post("/v1/environments", foreign("Game", **{name: value}))
            problem(response, 422, "invalid_request", (f"/arguments/{name}", code))


def test_names_that_were_nearly_right_are_answered(api: Any, problem: Callable[..., Any]) -> None:
    for wrong, right in (("Taxi-v3", "Taxi-v4"), ("cartpole-v1", "CartPole-v1"), ("Bandit-v0", "pgengine/Bandit-v0")):
        response = api.post("/v1/environments", {"kind": "gymnasium", "id": wrong})
        told = problem(response, 422, "invalid_request", ("/id", "environment_not_allowed"))
        assert f"{right} is there" in told["errors"][0]["message"]
    lake = {"kind": "gymnasium", "id": "FrozenLake-v1"}
    response = api.post("/v1/environments", lake | {"arguments": {"max_episode_steps": 5}})
    told = problem(response, 422, "invalid_request", ("/arguments/max_episode_steps", "unknown_argument"))
    assert "beside arguments" in told["errors"][0]["message"]
    response = api.post("/v1/environments", lake | {"arguments": {"success_rate": -5}})
    problem(response, 422, "invalid_request", ("/arguments/success_rate", "argument_value"))
    response = api.post("/v1/environments", {"kind": "gymnasium", "id": "Blackjack-v1"})
    told = problem(response, 422, "invalid_request", ("/id", "unsupported_space"))
    assert "gymnasium.wrappers.FlattenObservation" in told["errors"][0]["message"]


def test_what_cannot_be_repeated_is_said_everywhere(api_with: Callable[..., Any]) -> None:
    with api_with("foreign/FromRandom-v0", "foreign/Drawing-v0") as api:
        made = api.created("/v1/environments", foreign("FromRandom"))
        assert made["repeatable"] is False
        assert [notice["code"] for notice in made["notices"]] == ["not_repeatable"]
        body = {"environment": foreign("FromRandom"), "stop": {"updates": 1}}
        checked = api.post("/v1/training-jobs?validate_only=true", body).json()
        job = api.created("/v1/training-jobs", body)
        assert checked["notices"] == job["notices"] == made["notices"]
        assert api.get(f"/v1/training-jobs/{job['id']}").json()["notices"] == made["notices"]
        events = api.get(f"/v1/training-jobs/{job['id']}/events").json()["data"]
        assert [event["data"] for event in events if event["type"] == "log"] == made["notices"]
        well = api.created("/v1/environments", foreign("Drawing"))
        assert (well["repeatable"], well["notices"]) == (True, [])


def test_an_environment_of_an_earlier_version_is_looked_at_again(api_with: Callable[..., Any]) -> None:
    with api_with("foreign/FromNumpy-v0") as api:
        environment_id = api.created("/v1/environments", foreign("FromNumpy"))["id"]
        with api.database.write() as session:
            row = session.scalars(select(Environment)).one()
            row.facts = {name: value for name, value in row.facts.items() if name != "repeatable"}
        job = api.created("/v1/training-jobs", {"environment": environment_id, "stop": {"updates": 1}})
        assert [notice["code"] for notice in job["notices"]] == ["not_repeatable"]
        assert api.post("/v1/environments", foreign("FromNumpy")).json()["repeatable"] is False
        assert api.get(f"/v1/environments/{environment_id}").json()["repeatable"] is False


@pytest.mark.slow
def test_an_image_given_to_a_network_is_allowed_and_said(api_with: Callable[..., Any]) -> None:
    with api_with("foreign/Picture-v0") as api:
        body = {"environment": foreign("Picture"), "policy": {"kind": "mlp", "hidden": [8]}}
        policy = api.created("/v1/policies", body)
        job = api.created("/v1/training-jobs", {"environment": foreign("Picture"), "policy": policy["id"]})
        checked = api.post("/v1/training-jobs?validate_only=true", body).json()
        for answer in (policy, job, checked):
            (notice,) = answer["notices"]
            assert (notice["code"], "84 x 84 x 3" in notice["message"]) == ("image_as_numbers", True)


# --- constructors that never come back

_begun, _never = threading.Event(), threading.Event()


class Hanging(Drawing):
    """Waits for something that happens at the end of the test alone."""

    made = 0

    def __init__(self) -> None:
        type(self).made += 1
        _begun.set()
        _never.wait()


def test_a_constructor_that_never_comes_back_is_waited_for_once() -> None:
    gymnasium.register("foreign/Hanging-v0", Hanging, max_episode_steps=3)
    spec = GymnasiumSpec(id="foreign/Hanging-v0")
    try:
        allowed = AllowList(["foreign/Hanging-v0"], make_seconds=0.05)  # tries it, and warns
        _begun.wait()
        for _ in range(3):
            with pytest.raises(SpecError, match=r"have not come back within 0\.05 seconds"):
                allowed.described(spec)
        assert Hanging.made == 1
        # others are made as ever, and this one as soon as it comes back
        assert AllowList().described(GymnasiumSpec(id="CartPole-v1")).max_episode_steps == 500
        _never.set()
        for thread in [one for one in threading.enumerate() if one.name == "make foreign/Hanging-v0"]:
            thread.join()
        assert AllowList().described(spec).max_episode_steps == 3
    finally:
        _never.set()
        gymnasium.registry.pop("foreign/Hanging-v0")
